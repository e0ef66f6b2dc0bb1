"""What happened, as pages; and what happens, as it happens, where the client accepts text/event-stream."""

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import format_sse_event
from starlette.types import Receive, Scope, Send

from farm import answers, events, jobs
from farm.accounts import Caller
from farm.api.auth import Reader, key_in
from farm.api.feed import Feed, Listener, told_of
from farm.api.params import MAX_BIGINT, JobId, job_id
from farm.api.problems import documented
from farm.db import transaction
from farm.errors import FarmError, Fault, Invalid, TooMany

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1", tags=["events"])

STREAM = "text/event-stream"
HEARTBEAT_S = 15.0
STALLED_S = 30.0  # a client that takes nothing for so long is cut
RETRY_MS = 2000  # a client whose connection broke comes back after this
MOST_STREAMS = 10_000  # of this process
MOST_OF_AN_ACCOUNT = 2000  # of them

After = Annotated[
    int | None, Query(ge=0, le=MAX_BIGINT, description="the number of the last one seen", examples=[0])
]
Limit = Annotated[int, Query(ge=1, le=1000, description="of a page; a stream goes on")]
KindsAsked = Annotated[
    str | None,
    Query(
        max_length=1000,
        description="only these kinds, with commas: job.*,frame.failed. A stream also has progress",
        examples=["job.*"],
    ),
]
LastEventId = Annotated[
    str | None, Header(alias="Last-Event-ID", description="where a stream goes on; as after, and before it")
]
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {STREAM: {"schema": {"type": "string"}}}},
    204: {"description": "the job has ended, and all of it was seen: a stream's client need not come back"},
}


@router.get(
    "/jobs/{job}/events", responses={**STREAMED, **documented(404, 422)}, response_model=answers.Events
)
async def list_events(
    caller: Reader,
    *,
    request: Request,
    job: JobId,
    after: After = None,
    limit: Limit = 1000,
    kinds: KindsAsked = None,
    previews: Annotated[bool, Query(description="a stream shows what frames look like meanwhile")] = False,
    last_event_id: LastEventId = None,
) -> Response | answers.Events:
    """What happened to a job, in order; with `Accept: text/event-stream` all that happens until it has ended."""
    wanted = _kinds(kinds)
    start = _start(after, last_event_id)
    if not _is_stream(request):
        return await run_in_threadpool(_page, caller, job_id(job), start or 0, wanted, limit)
    found = await run_in_threadpool(_seen_all, caller, job_id(job), start or 0, wanted)
    if found and last_event_id is not None:
        return Response(status_code=204)
    return _stream(request, caller, job_id(job), after=start, kinds=wanted, previews=previews)


@router.get("/events", responses={200: STREAMED[200], **documented(422)}, response_model=answers.Events)
async def list_account_events(
    caller: Reader,
    *,
    request: Request,
    after: After = None,
    limit: Limit = 1000,
    kinds: KindsAsked = None,
    last_event_id: LastEventId = None,
) -> Response | answers.Events:
    """What happened to the account's jobs and budgets, in order; with `Accept: text/event-stream` what happens.

    A stream begins now, or after the number that was seen last. It has the steps of frames if kinds names progress.
    """
    wanted = _kinds(kinds)
    start = _start(after, last_event_id)
    if not _is_stream(request):
        return await run_in_threadpool(_page, caller, None, start or 0, wanted, limit)
    return _stream(request, caller, None, after=start, kinds=wanted)


def _kinds(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    return events.checked_kinds([k.strip() for k in text.split(",")], field="kinds")


def _start(after: int | None, last_event_id: str | None) -> int | None:
    if last_event_id is None:
        return after
    if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 20):
        raise Invalid([Fault("Last-Event-ID", last_event_id, "allowed is the id of an event, a number")])
    return min(int(last_event_id), MAX_BIGINT)


def _is_stream(request: Request) -> bool:
    return any(part.strip().startswith(STREAM) for part in request.headers.get("accept", "").split(","))


def _page(caller: Caller, job: UUID | None, after: int, kinds: tuple[str, ...], limit: int) -> answers.Events:
    with transaction() as db:
        if job is not None:
            jobs.find(db, caller.account_id, job)
        rows = events.after(db, after, account_id=caller.account_id, job_id=job, kinds=kinds, limit=limit)
    page = [told_of(row).shown for row in rows]
    return answers.Events(events=page, next=page[-1].number if page else after)


def _seen_all(caller: Caller, job: UUID, after: int, kinds: tuple[str, ...]) -> bool:
    """Whether a job has ended, and nothing of it comes after this. Raises NotFound."""
    with transaction() as db:
        jobs.find(db, caller.account_id, job)
        if not events.has_ended(db, caller.account_id, job):
            return False
        more = events.after(db, after, account_id=caller.account_id, job_id=job, kinds=kinds, limit=1)
    return not more


def _stream(
    request: Request,
    caller: Caller,
    job: UUID | None,
    *,
    after: int | None,
    kinds: tuple[str, ...],
    previews: bool = False,
) -> Response:
    feed: Feed = request.app.state.feed
    if feed.listeners >= MOST_STREAMS or feed.listeners_of(caller.account_id) >= MOST_OF_AN_ACCOUNT:
        raise TooMany(f"allowed are {MOST_OF_AN_ACCOUNT} streams of an account", retry_after_s=10)
    key = key_in(request.headers.get("authorization"))
    return Stream(feed.listen(caller.account_id, job, after=after, kinds=kinds, previews=previews, key=key))


class Stream(Response):
    """Server-sent events of one listener, until it is closed or the client left.

    One that stops reading is cut: what it has not read is bounded meanwhile, and nobody waits for it.
    """

    media_type = STREAM

    def __init__(self, listening: AbstractAsyncContextManager[Listener]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._listening = listening

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["streamed"] = True
        async with self._listening as listener:
            gone = asyncio.create_task(_gone(receive, listener))
            try:
                await send(
                    {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                )
                await self._tell(listener, send)
            except TimeoutError:
                log.info("a stream was cut: its client took nothing for a while")
            except FarmError as e:  # the client comes back, and goes on where it was
                log.warning("a stream was ended: %s", e)
                await _send(send, b"", more=False)
            finally:
                gone.cancel()

    async def _tell(self, listener: Listener, send: Send) -> None:
        await _send(send, format_sse_event(comment="farm", retry=RETRY_MS))
        while (some := await listener.some(HEARTBEAT_S)) is not None:
            body = b"".join(told.sse for told in some)
            await _send(send, body or format_sse_event(comment="still here"))
        if listener.closed == "ended":
            await _send(send, format_sse_event(event="end", data_str="{}"))
        if listener.closed != "left":
            await _send(send, b"", more=False)


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    async with asyncio.timeout(STALLED_S):
        await send({"type": "http.response.body", "body": body, "more_body": more})


async def _gone(receive: Receive, listener: Listener) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    listener.close("left")
