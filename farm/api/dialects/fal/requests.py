"""Requests: submit, look, stream, fetch, cancel."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from sqlalchemy.orm import Session

from farm import jobs, outcomes, tickets
from farm import webhooks as callbacks
from farm.accounts import Caller
from farm.api import links, problems
from farm.api.auth import Reader, Submitter
from farm.api.bodies import Body, described, read
from farm.api.dialects import asking
from farm.api.dialects.answers import Responses, answered
from farm.api.dialects.fal.asked import NAMES, FalInput, model_of, spec_of
from farm.api.dialects.fal.errors import ERRORS, FalRefusal, errors
from farm.api.dialects.fal.shown import FalCancelled, FalOutput, FalQueued, output_of, status_of, trouble_of
from farm.api.dialects.served import submitted, translated
from farm.api.params import IdempotencyHeader
from farm.api.progress import Progress
from farm.db import transaction
from farm.errors import Conflict, Fault, Invalid, NotFound
from farm.outcomes import Outcome
from farm.settings import settings
from farm.spec import PRIORITIES, Priority
from farm.tables import Ticket
from farm.tickets import Dialect

OWNERS = ("fal-ai", "farm")
LOOK_EVERY_S = 1.0
PRIORITY = {"normal": PRIORITIES[Priority.STANDARD], "low": PRIORITIES[Priority.BULK]}

router = APIRouter(tags=["dialects"], route_class=translated(errors))


QueuePriority = Annotated[str | None, Header(alias="X-Fal-Queue-Priority", description="normal or low")]
StartTimeout = Annotated[
    str | None, Header(alias="X-Fal-Request-Timeout", description="seconds in which work on it has to begin")
]
Hook = Annotated[str | None, Query(description="an https URL to tell of its end", max_length=4096)]
Logs = Annotated[str | None, Query(description="1 or true: with lines of progress", max_length=10)]


async def submit_fal(
    caller: Submitter,
    app: str,
    body: Body,
    request: Request,
    *,
    fal_webhook: Hook = None,
    priority: QueuePriority = None,
    start_timeout: StartTimeout = None,
    idempotency_key: IdempotencyHeader = None,
) -> Response:
    """Queue a request; on a host that runs, wait for its images."""
    owner = request.scope["path"].removeprefix("/fal/queue").removeprefix("/fal/run").split("/")[1]
    model = model_of(owner, app)
    asked = await run_in_threadpool(read, FalInput, body)
    farm_url = links.base(request)
    start_s = _start_s(start_timeout)
    said = {"app": f"{owner}/{app}", "sync_mode": asked.sync_mode}

    def keep(db: Session, job_id: UUID) -> None:
        start_by = None if start_s is None else datetime.now(UTC) + timedelta(seconds=start_s)
        tickets.write(
            db, caller.account_id, job_id,
            dialect=Dialect.FAL, name=str(job_id), asked=said, start_by=start_by,
        )  # fmt: skip

    submission = asking.submission(spec_of(asked, model), names=NAMES, priority=_priority(priority))
    if fal_webhook is not None:
        hook = asking.callback(
            fal_webhook, callbacks.ENDS, shape=Dialect.FAL, base=farm_url, field="fal_webhook"
        )
        submission = submission.model_copy(update={"webhook": hook})
    job_id = await submitted(
        request, caller, submission, body=body, key=idempotency_key, names=NAMES, also=keep
    )
    if _queues(request):
        return await run_in_threadpool(_taken, caller, str(job_id), farm_url, request)
    await request.app.state.feed.ended(caller.account_id, job_id, settings().sync_wait_s)
    return await run_in_threadpool(_result, caller, str(job_id), farm_url, waited=True)


def _queues(request: Request) -> bool:
    label = request.headers.get("host", "").partition(".")[0].lower()
    if label == "queue":
        return True
    return not request.scope["path"].startswith("/fal/run/") and label not in ("run", "fal")


def _priority(name: str | None) -> int | None:
    if name is not None and name not in PRIORITY:
        raise Invalid([Fault("X-Fal-Queue-Priority", name, f"allowed are {', '.join(PRIORITY)}")])
    return PRIORITY[name] if name is not None else None


def _start_s(text: str | None) -> float | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,6}(\.\d{1,9})?", text) or not 1 <= float(text) <= 86_400:
        raise Invalid([Fault("X-Fal-Request-Timeout", text, "allowed are 1 to 86400 seconds")])
    return float(text)


def _found(db: Session, caller: Caller, request_id: str) -> tuple[Ticket, Outcome]:
    ticket = tickets.find(db, caller.account_id, Dialect.FAL, request_id)
    return ticket, outcomes.find(db, caller.account_id, ticket.job_id)


def _status(
    caller: Caller, request_id: str, farm_url: str, progress: Progress, *, logs: bool
) -> dict[str, Any]:
    with transaction() as db:
        ticket, outcome = _found(db, caller, request_id)
        return status_of(db, outcome, ticket, farm_url, progress=progress, logs=logs)


def _taken(caller: Caller, request_id: str, farm_url: str, request: Request) -> Response:
    said = _status(caller, request_id, farm_url, request.app.state.progress, logs=False)
    return answered(
        {
            **said,
            "status": "IN_QUEUE",
            "queue_position": said.get("queue_position", 0),
            "gateway_request_id": request_id,
        },
        headers={"x-fal-request-id": request_id},
    )


def _result(caller: Caller, request_id: str, farm_url: str, *, waited: bool = False) -> Response:
    headers = {"x-fal-request-id": request_id}
    with transaction() as db:
        ticket, outcome = _found(db, caller, request_id)
        trouble = trouble_of(outcome, ticket)
        over = outcome.over
    if trouble is not None:
        status, kind, words = trouble
        headers["X-Fal-Error-Type"] = kind
        if status == 504:
            headers["X-Fal-Request-Timeout-Type"] = "user"
        if kind == "generation_error":
            detail: Any = [{"loc": ["body"], "msg": words, "type": kind}]
            return answered({"detail": detail, "error_type": kind}, status, headers=headers)
        return answered({"detail": words, "error_type": kind}, status, headers=headers)
    if over:
        return answered(output_of(outcome, ticket, farm_url), headers=headers)
    if waited:
        headers |= {"X-Fal-Error-Type": "request_timeout", "X-Fal-Request-Timeout-Type": "infra"}
        words = f"The images are not there yet; the request goes on as {request_id}, in the queue"
        return answered({"detail": words, "error_type": "request_timeout"}, 504, headers=headers)
    return answered({"detail": "Request is still in progress"}, 400, headers=headers)


def show_fal_status(
    caller: Reader, app: str, request_id: str, request: Request, logs: Logs = None
) -> Response:
    """Where a request is: in the queue, in progress, or completed."""
    del app
    wanted = (logs or "").lower() in ("1", "true")
    said = _status(caller, request_id, links.base(request), request.app.state.progress, logs=wanted)
    return answered(
        said, 200 if said["status"] == "COMPLETED" else 202, headers={"x-fal-request-id": request_id}
    )


async def stream_fal_status(
    caller: Reader, app: str, request_id: str, request: Request, logs: Logs = None
) -> Response:
    """Where a request is, told again whenever that changes, until it is completed."""
    del app
    wanted = (logs or "").lower() in ("1", "true")
    farm_url, progress = links.base(request), request.app.state.progress
    first = await run_in_threadpool(_status, caller, request_id, farm_url, progress, logs=wanted)

    async def told_again() -> AsyncIterator[str]:
        said = first
        while True:
            yield f"data: {json.dumps(said)}\n\n"
            before = said
            while said == before and said["status"] != "COMPLETED":
                began = asyncio.get_running_loop().time()
                ended = await request.app.state.feed.ended(caller.account_id, UUID(request_id), LOOK_EVERY_S)
                if not ended:  # a feed that has stopped answers at once
                    await asyncio.sleep(max(0.0, began + LOOK_EVERY_S - asyncio.get_running_loop().time()))
                said = await run_in_threadpool(_status, caller, request_id, farm_url, progress, logs=wanted)
            if said == before:
                return

    headers = {"Cache-Control": "no-store", "x-fal-request-id": request_id}
    return StreamingResponse(told_again(), media_type="text/event-stream", headers=headers)


def show_fal_result(caller: Reader, app: str, request_id: str, request: Request) -> Response:
    """What a request made; 400 while it goes on."""
    del app
    return _result(caller, request_id, links.base(request))


def cancel_fal(caller: Submitter, app: str, request_id: str) -> Response:
    """Stop a request."""
    del app
    status, said = 202, "CANCELLATION_REQUESTED"
    try:
        with transaction() as db:
            ticket, outcome = _found(db, caller, request_id)
            if outcome.over:
                raise Conflict("it has ended")
            jobs.cancel(db, caller.account_id, ticket.job_id)
    except NotFound:
        status, said = 404, "NOT_FOUND"
    except Conflict:
        status, said = 400, "ALREADY_COMPLETED"
    return answered({"status": said}, status)


def _add(prefix: str, *, shown: bool) -> None:
    """The routes of apps under a prefix. The longest come first: an app's name may hold slashes."""
    name, one = prefix.strip("/").replace("/", "_").replace("-", "_"), "/requests/{request_id}"
    queued: Any = {200: {"model": FalQueued}, 202: {"model": FalQueued, "description": "It goes on"}}
    cancelled: Any = {s: {"model": FalCancelled} for s in (202, 400, 404)}
    result: Responses = {
        200: {"model": FalOutput},
        **ERRORS(404, 410, 422),
        **{s: {"model": FalRefusal} for s in (400, 499, 504)},
    }
    sent: Responses = {200: {"model": FalQueued}, **ERRORS(402, 403, 404, 409, 410, 413, 422, 429)}
    stream: Responses = {
        200: {"description": "Server-sent events", "content": {"text/event-stream": {}}},
        **ERRORS(404, 422),
    }
    routes: list[tuple[str, str, Any, Responses, dict[str, Any]]] = [
        ("GET", f"{one}/status/stream", stream_fal_status, stream, {}),
        ("GET", f"{one}/status", show_fal_status, {**queued, **ERRORS(404, 422)}, {}),
        ("PUT", f"{one}/cancel", cancel_fal, {**ERRORS(403), **cancelled}, {}),
        ("GET", one, show_fal_result, result, {}),
        ("POST", "", submit_fal, {**sent, 504: {"model": FalRefusal}}, described(FalInput)),
    ]
    for method, path, handler, responses, extra in routes:
        # a name with a line's end in it is no path at all
        missing = responses[404].setdefault("content", {})
        missing[problems.MEDIA_TYPE] = {"schema": {"$ref": "#/components/schemas/Problem"}}
        router.add_api_route(
            f"{prefix}/{{app:path}}{path}",
            handler,
            methods=[method],
            name=f"{handler.__name__}_{name}",
            response_class=Response,
            responses=responses,
            openapi_extra=extra,
            include_in_schema=shown,
            operation_id=None,
        )


for _owner in OWNERS:
    for _before in ("", "/fal/queue", "/fal/run"):
        _add(f"{_before}/{_owner}", shown=not _before)
