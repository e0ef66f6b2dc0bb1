"""/ws: what happens to the prompts of a client, as it happens. It holds neither a thread nor a connection.

A client is told of the prompts that it queued under its own id, as ComfyUI does; status counts all of the account's.
"""

import asyncio
import json
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from fastapi import APIRouter, WebSocket
from fastapi.concurrency import run_in_threadpool
from starlette.websockets import WebSocketDisconnect

from farm import outcomes, tickets
from farm.accounts import Caller, Role
from farm.api.auth import address_of, key_in
from farm.api.dialects.answers import answered
from farm.api.dialects.browsers import refuse_other_pages
from farm.api.dialects.comfyui import history
from farm.api.dialects.comfyui.errors import said
from farm.api.dialects.comfyui.history import ms
from farm.api.feed import Feed, Told
from farm.db import transaction
from farm.errors import FarmError
from farm.events import ENDS
from farm.outcomes import Outcome
from farm.settings import settings
from farm.storage import open_store
from farm.tables import Image, Ticket
from farm.tickets import Dialect

KINDS = ("job.accepted", *ENDS, "progress")
LOOK_EVERY_S = 2.0
MOST_KNOWN = 10_000  # jobs that are known to be another client's
GOING_AWAY, REVOKED = 1001, 1008
PREVIEW, PNG = 1, 2  # of a binary message: what it is, and in which format

router = APIRouter(tags=["dialects"])


@dataclass
class Running:
    """A prompt of this client's: its ticket, what it asked for, and how much of each frame is made."""

    ticket: Ticket
    asked: Mapping[str, Any]
    shares: dict[int, float] = field(default_factory=dict)
    begun: bool = False


@router.websocket("/ws")
async def comfy_socket(socket: WebSocket) -> None:
    """Tell a client what happens to its prompts."""
    try:
        refuse_other_pages(socket)
        key = key_in(socket.headers.get("authorization"))
        caller = (await socket.app.state.door.find(key, address=address_of(socket))).caller
        caller.require(Role.READ)
    except FarmError as e:
        body = {"error": said("unauthorized", e.detail or e.title), "node_errors": {}}
        await socket.send_denial_response(answered(body, e.http_status))
        return
    client = socket.query_params.get("clientId") or uuid4().hex
    feed: Feed = socket.app.state.feed
    async with feed.listen(caller.account_id, None, kinds=KINDS, key=key) as listener:
        await socket.accept()
        teller = Teller(socket, caller, client)
        leaving = asyncio.create_task(_left(socket))
        try:
            await teller.greet()
            while not leaving.done():
                some = await listener.some(LOOK_EVERY_S)
                if some is None:
                    code = REVOKED if listener.closed == "revoked" else GOING_AWAY
                    await socket.close(code, listener.closed)
                    return
                if some:
                    await teller.tell(some)
        except (WebSocketDisconnect, RuntimeError):
            return  # it left while it was told something
        finally:
            leaving.cancel()


async def _left(socket: WebSocket) -> None:
    """Until the client leaves; what it says meanwhile is not listened to."""
    with suppress(WebSocketDisconnect, RuntimeError):
        while (await socket.receive())["type"] != "websocket.disconnect":
            pass


class Teller:
    """What one client was told, and what it still has to be."""

    def __init__(self, socket: WebSocket, caller: Caller, client: str) -> None:
        self._socket = socket
        self._caller = caller
        self._client = client
        self._running: dict[UUID, Running] = {}
        self._others: set[UUID] = set()  # prompts of other clients
        self._strange: set[UUID] = set()  # jobs that are no prompts

    async def greet(self) -> None:
        """How much waits, and which of its prompts go on."""
        mine, count = await run_in_threadpool(self._open)
        for ticket in mine:
            self._running[ticket.job_id] = Running(ticket, tickets.asked(ticket))
        await self._status(count, sid=self._client)

    def _open(self) -> tuple[Sequence[Ticket], int]:
        with transaction() as db:
            owner = self._caller.account_id
            mine = tickets.still_open(db, owner, Dialect.COMFYUI, client=self._client)
            return mine, tickets.count_open(db, owner, Dialect.COMFYUI)

    async def tell(self, some: Sequence[Told]) -> None:
        """Tell it what of this concerns it."""
        await self._look_up({t.job_id for t in some if t.job_id is not None})
        counts_differ = False
        for told in some:
            running = self._running.get(told.job_id) if told.job_id else None
            counts_differ |= told.kind != "progress" and told.job_id not in self._strange
            if running is None or told.job_id is None:
                continue
            if told.kind == "progress":
                await self._progress(running, told.data["frames"])
            elif told.kind in ENDS:
                del self._running[told.job_id]
                await self._end(running)
        if counts_differ:
            await self._status(await run_in_threadpool(self._count))

    def _count(self) -> int:
        with transaction() as db:
            return tickets.count_open(db, self._caller.account_id, Dialect.COMFYUI)

    async def _look_up(self, jobs: set[UUID]) -> None:
        """Find out whose prompts these jobs are: this client's, another one's, or no prompts at all."""
        unknown = jobs - self._running.keys() - self._others - self._strange
        if not unknown:
            return
        found = await run_in_threadpool(self._tickets, unknown)
        if len(self._others) + len(self._strange) > MOST_KNOWN:
            self._others, self._strange = set(), set()
        for job in unknown:
            ticket = found.get(job)
            if ticket is None:
                self._strange.add(job)
            elif ticket.client != self._client:
                self._others.add(job)
            else:
                self._running[job] = Running(ticket, tickets.asked(ticket))

    def _tickets(self, jobs: set[UUID]) -> dict[UUID, Ticket]:
        with transaction() as db:
            return tickets.of_jobs(db, self._caller.account_id, Dialect.COMFYUI, jobs)

    # -------------------------------------------------------------------------------------------- messages

    async def _send(self, kind: str, data: Mapping[str, Any]) -> None:
        await self._socket.send_text(json.dumps({"type": kind, "data": data}))

    async def _status(self, count: int, *, sid: str | None = None) -> None:
        status: dict[str, Any] = {"status": {"exec_info": {"queue_remaining": count}}}
        await self._send("status", status | ({"sid": sid} if sid else {}))

    async def _begin(self, running: Running, at_ms: int) -> None:
        if not running.begun:
            running.begun = True
            start = {"prompt_id": running.ticket.name, "timestamp": at_ms}
            await self._send("execution_start", start)
            await self._send("execution_cached", {**start, "nodes": []})

    async def _node(self, running: Running, node: str | None) -> None:
        await self._send("executing", {"node": node, "display_node": node, "prompt_id": running.ticket.name})

    async def _progress(self, running: Running, frames: list[dict[str, Any]]) -> None:
        if not running.begun:
            await self._begin(running, ms(datetime.now(UTC)))
            await self._node(running, next(iter(running.asked["samplers"])))
        running.shares |= {f["index"]: float(f["progress"]) for f in frames}
        first = 0
        for node, sampler in running.asked["samplers"].items():
            count, steps = sampler["frames"], sampler["steps"]
            shares = [running.shares.get(k, 0.0) for k in range(first, first + count)]
            first += count
            if any(shares):
                value = round(sum(shares) / count * steps)
                words = {"value": value, "max": steps, "prompt_id": running.ticket.name, "node": node}
                await self._send("progress", words)

    async def _end(self, running: Running) -> None:
        """Everything that ComfyUI says when a prompt has ended, in its order."""
        outcome = await run_in_threadpool(self._outcome, running.ticket.job_id)
        if outcome.started_at is not None:
            await self._begin(running, ms(outcome.started_at))
        kind, words = history.ending(running.ticket, running.asked, outcome)
        if kind == "execution_success":
            await self._begin(running, words["timestamp"])
            await self._outputs(running, outcome)
        await self._send(kind, words)
        await self._node(running, None)

    def _outcome(self, job_id: UUID) -> Outcome:
        with transaction() as db:
            return outcomes.find(db, self._caller.account_id, job_id)

    async def _outputs(self, running: Running, outcome: Outcome) -> None:
        for node in running.asked["samplers"]:
            await self._node(running, node)
        outputs = history.outputs_of(running.asked, outcome)
        for node, save in running.asked["saves"].items():
            await self._node(running, node)
            if node in outputs:
                words = {"node": node, "display_node": node, "output": outputs[node]}
                await self._send("executed", {**words, "prompt_id": running.ticket.name})
                continue
            for part in outcome.parts[save["first"] : save["first"] + save["count"]]:
                if part.image is not None:  # SaveImageWebsocket: the image itself
                    data = await run_in_threadpool(_bytes, part.image)
                    await self._socket.send_bytes(struct.pack(">II", PREVIEW, PNG) + data)


def _bytes(image: Image) -> bytes:
    return open_store(settings().storage_url.get_secret_value()).get(image.key)
