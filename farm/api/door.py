"""Who comes in: API keys that are known for some seconds, their rates, and when each was used last.

Looking a key up takes a query and a thread: one that was looked up is taken for what it was then for KNOWN_S. A key
that is rotated, revoked, expired or limited otherwise is what it is now at once in the process that did it, and after
KNOWN_S at most in the others.

Wrong keys are counted by the address they come from. From one that sent too many, keys that did not open before are
looked up one at a time, so that guessing holds one connection at most; and those that are wrong answer 429.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from uuid import UUID

from fastapi.concurrency import run_in_threadpool

from farm import accounts, limits
from farm.accounts import Caller
from farm.api.limits import Buckets, Failures, Taken
from farm.db import transaction
from farm.errors import FarmError, Unauthorized
from farm.limits import Limits

log = logging.getLogger(__name__)

KNOWN_S = 3.0
MOST = 10_000  # keys known at a time
USE_S = 60.0  # how often it is written down that a key was used


@dataclass(frozen=True, slots=True)
class Known:
    """A key that was looked up, and what was set for its account and for itself."""

    caller: Caller
    account: Limits
    key: Limits
    until: float


class Door:
    """Of one process. Its methods are for the event loop, but forget()."""

    def __init__(self) -> None:
        self._known: dict[bytes, Known] = {}  # by the hash of the key's text
        self._looking: dict[bytes, asyncio.Task[Known]] = {}  # up, just now: for all who ask meanwhile
        self._buckets = Buckets()
        self._failures = Failures()
        self._doubted = asyncio.Lock()
        self._used: dict[UUID, float] = {}

    def take(self, found: Known, kind: str) -> Taken:
        """Count a request: reads, writes or submissions."""
        return self._buckets.take(found.caller, kind, found.account, found.key)

    async def find(self, text: str, *, address: str = "") -> Known:
        """Who this API key belongs to. address: where it comes from; without one it is not counted there.

        Raises Unauthorized as accounts.authenticate() does, RateLimited if that came too often from the address.
        """
        name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        try:
            if address and name not in self._known and self._failures.too_many(address):
                async with self._doubted:
                    return await self._find(text, name)
            return await self._find(text, name)
        except Unauthorized:
            self._known.pop(name, None)
            self._count(address)
            raise

    @asynccontextmanager
    async def counting(self, address: str) -> AsyncIterator[None]:
        """Count who is refused in here as one who sent a wrong key, and look at one at a time who did so often.

        Raises RateLimited in the place of Unauthorized if that came too often from the address.
        """
        try:
            async with self._doubted if self._failures.too_many(address) else nullcontext():
                yield
        except Unauthorized:
            self._count(address)
            raise

    def _count(self, address: str) -> None:
        """Raises RateLimited if wrong keys came too often from there."""
        if address and (refused := self._failures.count(address)) is not None:
            raise refused from None

    async def _find(self, text: str, name: bytes) -> Known:
        known, looking = self._known, self._looking  # forget() puts others in their place
        found = known.get(name)
        if found is None or found.until < time.monotonic():
            if (task := looking.get(name)) is None:
                task = looking[name] = asyncio.create_task(run_in_threadpool(_look_up, text))
                task.add_done_callback(lambda _: looking.pop(name))
            found = await asyncio.shield(task)  # one of them may leave
            if len(known) >= MOST:
                known.clear()
            known[name] = found
        self._used[found.caller.key_id] = time.monotonic()
        return found

    def forget(self) -> None:
        """Look every key up again: one of them was changed."""
        self._looking, self._known = {}, {}

    # -------------------------------------------------------------------------------------------- last used

    async def follow(self) -> None:
        """Write down when keys were used, once a minute; and once more when this is cancelled."""
        try:
            while True:
                await asyncio.sleep(USE_S)
                await run_in_threadpool(self.note)
        finally:
            self.note()

    def note(self) -> None:
        """Write down which keys were used since the last time."""
        used, self._used = self._used, {}
        if not used:
            return
        now = time.monotonic()
        try:
            with transaction() as db:
                accounts.note_use(db, {key: now - at for key, at in used.items()})
        except FarmError as e:
            log.warning("when keys were used is not written down: %s", e)


def _look_up(text: str) -> Known:
    with transaction() as db:
        caller = accounts.authenticate(db, text)
        account, key = limits.both(db, caller)
    return Known(caller, account, key, time.monotonic() + KNOWN_S)
