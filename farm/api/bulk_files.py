"""Files of lines as they come in a request's body: part after part, and compared where they come again."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from typing import NoReturn, Self

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from farm.api.inputs import fetched, renamed
from farm.bulk.lines import MAX_LINE, Error, Read
from farm.bulk.parts import Intake, Part
from farm.errors import Conflict, FarmError, Fault, Invalid, TooLarge
from farm.features import STORED, refs_of

PART = 1 << 19  # bytes of a file that are taken in together: some 5,000 lines, and 10 MB of memory
KNOWN = 10_000  # images by URL that an upload remembers
AT_ONCE = 2  # parts that a process stores at the same time: the other connections are for other requests


async def take_in(
    request: Request, intake: Intake, *, final: bool, unseen: Callable[[bytes], bytes] = lambda part: part
) -> None:
    """Take in the request's body, part after part: while one is stored the next is read, and no more than that.

    Where the connection is cut, the whole lines that came are taken in.
    """
    rest = bytearray()
    async with _Storing(request, intake) as storing:
        try:
            async for part in request.stream():
                rest += unseen(part)
                if len(rest) >= PART:
                    del rest[: await storing.read(bytes(rest))]
                if len(rest) >= PART + MAX_LINE:
                    raise TooLarge(
                        f"line {intake.lines + 1} has no end within {MAX_LINE} bytes", allowed_bytes=MAX_LINE
                    )
        except ClientDisconnect:
            await storing.read(bytes(rest))
            raise Conflict("the connection was cut") from None
        while rest and (used := await storing.read(bytes(rest), final=final)):
            del rest[:used]


class _Storing:
    """Stores one part in the background, while the next is read; at the end, however that comes, it is stored."""

    def __init__(self, request: Request, intake: Intake) -> None:
        self._room, self._intake = room(request), intake
        self._stored: asyncio.Task[None] | None = None
        self._names: dict[str, str] = {}  # of images by URL that were taken in

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            await self._done()
        except FarmError:
            if error is None:
                raise

    async def read(self, data: bytes, *, final: bool = False) -> int:
        """Read the whole lines at the start of this, once the part before last is stored. Returns the bytes used."""
        if not data:
            return 0
        part = await run_in_threadpool(self._intake.read, data, final=final)
        if part.read.unresolved:
            await self._fetch(part.read)
        await self._done()
        if part.read.used:
            self._stored = asyncio.create_task(self._store(part))
        return part.read.used

    async def _fetch(self, read: Read) -> None:
        """Take in the images that lines name by URL; a line whose image is not taken is an error."""
        urls = {
            ref: at for one in read.unresolved for at, ref in refs_of(one.asked) if not STORED.fullmatch(ref)
        }
        found = await fetched(
            self._intake.caller.account_id, {r: at for r, at in urls.items() if r not in self._names}
        )
        found |= {ref: self._names[ref] for ref in urls.keys() & self._names.keys()}
        names = {ref: name for ref, name in found.items() if isinstance(name, str)}
        if len(self._names) > KNOWN:
            self._names.clear()
        self._names |= {ref: name for ref, name in names.items() if not ref.startswith("data:")}
        lines, read.unresolved = read.unresolved, []
        for one in lines:
            faults = [
                Fault(at, fault.value, fault.allowed)
                for at, ref in refs_of(one.asked)
                if isinstance(refused := found.get(ref), Invalid)
                for fault in refused.faults
            ]
            read.errors.extend(Error(one.line, one.name, fault) for fault in faults)
            if not faults:
                read.unresolved.append(one._replace(asked=renamed(one.asked, names)))

    async def _store(self, part: Part) -> None:
        async with self._room:
            await run_in_threadpool(self._intake.store, part)

    async def _done(self) -> None:
        task, self._stored = self._stored, None
        if task is not None:
            await task


def room(request: Request) -> asyncio.Semaphore:
    state = request.app.state
    if not hasattr(state, "bulk_room"):
        state.bulk_room = asyncio.Semaphore(AT_ONCE)
    found: asyncio.Semaphore = state.bulk_room
    return found


class Again:
    """Compares a file that comes again with what was taken in of it, part by part."""

    def __init__(self, known: Sequence[tuple[int, bytes]], key: str) -> None:
        self._known, self._key = list(known), key
        self._at, self._next, self._hash = 0, 0, hashlib.sha256()
        self._beyond = self.differs = False

    def left(self, data: bytes) -> bytes:
        """What of this was not there before. Raises Invalid if it is not what came then."""
        while data and self._next < len(self._known):
            upto, digest = self._known[self._next]
            piece, data = data[: upto - self._at], data[upto - self._at :]
            self._hash.update(piece)
            self._at += len(piece)
            if self._at == upto:
                if self._hash.digest() != digest:
                    self._refuse()
                self._hash = hashlib.sha256()
                self._next += 1
        self._beyond = self._beyond or bool(data)
        return data

    def end(self, *, whole: bool) -> None:
        """The file has ended. whole: nothing may have come beyond what was there."""
        if self._next < len(self._known) or (whole and self._beyond):
            self._refuse()

    def _refuse(self) -> NoReturn:
        self.differs = True
        raise Invalid(
            [Fault("Idempotency-Key", self._key, "it came before with another file; use another key")]
        )
