"""What happens, as it happens, for everybody who waits in this process: one connection listens for all of them.

The relay speaks on the channel after it has numbered events. Each time it does, one query says which of the jobs
that are waited for have ended, and one reads the new events for all listeners. Nobody who waits holds a thread or a
connection. While the connection is away waits go on, and listeners read what they missed when it is back.
"""

import asyncio
import base64
import json
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Self
from uuid import UUID

import psycopg
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import format_sse_event
from psycopg.rows import namedtuple_row

from farm import accounts, answers, events, ids
from farm.api.progress import Progress, Step
from farm.db import OPTIONS, transaction
from farm.errors import Unauthorized
from farm.events import CHANNEL, COMMON, ENDS
from farm.settings import settings

log = logging.getLogger(__name__)

Connection = psycopg.AsyncConnection[Any]

LOOK_EVERY_S = 2.0  # whether or not somebody speaks
FIRST_RETRY_S, LONGEST_RETRY_S = 0.1, 3.0
ANSWER_WITHIN_S = 10.0  # a connection that takes longer is given up
PAGE = 1000  # events read at once for one listener
AT_ONCE = 5000  # and for all of them
BUFFERED = 1000  # events that wait for a slow listener; more are read again once it comes for them
PUSHED = 2000  # to listeners, without a pause
PICTURED = 64  # frames with a preview that wait for a listener
STEPS_EVERY_S = 0.25  # of one listener
KEYS_EVERY_S = 20.0
MANY_OWNERS = 10_000  # jobs whose account is remembered

ENDED = """
    SELECT id, account_id FROM jobs
    WHERE id = ANY (%(jobs)s::uuid[]) AND status IN ('finished', 'cancelled')"""
NEWS = """
    SELECT number, account_id, job_id, frame_id, kind, data, at FROM events
    WHERE number > %(seen)s AND number <= %(last)s AND account_id = ANY (%(accounts)s::uuid[])
      AND (%(common)s::boolean OR kind <> 'frame.done')
    ORDER BY number LIMIT %(n)s"""
LAST = "SELECT number FROM events ORDER BY number DESC LIMIT 1"
OWNERS = "SELECT id, account_id FROM jobs WHERE id = ANY (%(jobs)s::uuid[])"

Place = tuple[UUID, UUID]  # job and account


@dataclass(frozen=True)
class Told:
    """One thing that a listener is told. Steps and previews carry no number: they are not kept."""

    kind: str
    data: dict[str, Any]
    number: int | None = None
    job_id: UUID | None = None
    frame_id: UUID | None = None
    at: datetime | None = None

    @cached_property
    def shown(self) -> answers.Event:
        """An event as the API shows it."""
        assert self.number is not None
        assert self.at is not None
        return answers.Event(
            number=self.number,
            kind=self.kind,
            job=self.job_id and ids.public("job", self.job_id),
            frame=self.frame_id and ids.public("frm", self.frame_id),
            data=self.data,
            at=self.at,
        )

    @cached_property
    def sse(self) -> bytes:
        """It as a stream carries it; made once for all listeners."""
        if self.number is None:
            job = {"job": ids.public("job", self.job_id)} if self.job_id else {}
            return format_sse_event(data_str=json.dumps({**job, **self.data}), event=self.kind)
        body = json.dumps(self.shown.model_dump(mode="json"))  # ASCII: no line ends but those of the format
        return format_sse_event(data_str=body, event=self.kind, id=str(self.number))


class Listener:
    """One reader's view: what happened after a number, in order, each once, and then what happens."""

    def __init__(
        self,
        feed: "Feed",
        account_id: UUID,
        job_id: UUID | None,
        *,
        after: int | None,
        kinds: tuple[str, ...],
        previews: bool,
        key: str | None,
    ) -> None:
        self.account_id = account_id
        self.job_id = job_id
        self.previews = previews
        self.key = key
        self.kinds = kinds
        self.wants = events.wants(kinds)
        # of an account's many jobs only where they are asked for by name
        self.wants_steps = self.wants("progress") if job_id else "progress" in kinds
        self.last = after  # number of the last event handed out; None: none, and none from before
        self.closed = ""  # why nothing more will come
        self._feed = feed
        self._live: deque[Told] = deque()
        self._one_by_one: deque[Told] = deque()
        self._behind = True  # something has to be read from the database first
        self._over = False  # the job has ended
        self._steps: dict[tuple[str, int], float] = {}
        self._stepped = 0.0
        self._pictures: dict[tuple[str, int], bytes] = {}
        self._ready = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Told:
        told = await self.get()
        if told is None:
            raise StopAsyncIteration
        return told

    async def get(self) -> Told | None:
        """The next thing, however long it takes; None: nothing more will come. For one that reads one by one."""
        while not self._one_by_one:
            some = await self.some(LOOK_EVERY_S)
            if some is None:
                return None
            self._one_by_one.extend(some)
        return self._one_by_one.popleft()

    async def some(self, within_s: float) -> list[Told] | None:
        """What there is; an empty list if nothing came in time, None if nothing more will come."""
        deadline = time.monotonic() + within_s
        while not self.closed:
            if self._behind:
                if page := await self._catch_up():
                    return page
                continue
            if ready := self._take():
                return ready
            if self._over:
                self.close("ended")
                break
            self._ready.clear()
            left = deadline - time.monotonic()
            if self._steps or self._pictures:
                left = min(left, self._stepped + STEPS_EVERY_S - time.monotonic())
            if left > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._ready.wait()
            elif time.monotonic() >= deadline:
                return []
        return None

    def close(self, why: str) -> None:
        self.closed = self.closed or why
        self._ready.set()

    # -------------------------------------------------------------------------------------------- by the feed

    def push(self, told: Told) -> None:
        """Take what happened just now."""
        if told.kind in ENDS and self.job_id is not None:
            self._over = True
            self._ready.set()
        if self._behind or not self.wants(told.kind):
            return
        if len(self._live) >= BUFFERED:
            self.miss()
            return
        self._live.append(told)
        self._ready.set()

    def miss(self) -> None:
        """Read from the database again, from the last one handed out on."""
        self._live.clear()
        self._behind = True
        self._ready.set()

    def step(self, place: tuple[str, int], share: float) -> None:
        self._steps[place] = share
        self._ready.set()

    def picture(self, place: tuple[str, int], jpeg: bytes) -> None:
        if place in self._pictures or len(self._pictures) < PICTURED:
            self._pictures[place] = jpeg
            self._ready.set()

    # -------------------------------------------------------------------------------------------- by the reader

    def _take(self) -> list[Told]:
        taken = [t for t in self._live if t.number is None or self.last is None or t.number > self.last]
        self._live.clear()
        for told in taken:
            self.last = told.number or self.last
        now = time.monotonic()
        if (self._steps or self._pictures) and now >= self._stepped + STEPS_EVERY_S:
            self._stepped = now
            taken += self._stepping()
        return taken

    def _stepping(self) -> list[Told]:
        steps, self._steps = self._steps, {}
        pictures, self._pictures = self._pictures, {}
        jobs: dict[str, list[dict[str, Any]]] = {}
        for (job, index), share in steps.items():
            jobs.setdefault(job, []).append({"index": index, "progress": round(share, 4)})
        shown = [Told("progress", {"frames": frames}, job_id=UUID(hex=j)) for j, frames in jobs.items()]
        for (job, index), jpeg in pictures.items():
            data = {
                "index": index,
                "content_type": "image/jpeg",
                "image": base64.b64encode(jpeg).decode(),
            }
            shown.append(Told("preview", data, job_id=UUID(hex=job)))
        return shown

    async def _catch_up(self) -> list[Told]:
        """A page of what happened before; what is pushed meanwhile waits behind it."""
        self._live.clear()
        self._behind = False
        if self.last is None and self.job_id is None and self._feed.seen is not None:
            self.last = self._feed.seen  # what comes after it will be pushed
            return []
        try:
            last, page, over = await run_in_threadpool(self._read)
        except BaseException:
            self._behind = True
            raise
        if len(page) == PAGE:
            self._behind = True
        else:
            self._over = self._over or over
        self.last = page[-1].number if page else last
        return page

    def _read(self) -> tuple[int, list[Told], bool]:
        with transaction() as db:
            last = self.last
            if last is None:
                last = 0 if self.job_id else events.last(db)
            # in this order: an end that is seen here is on a page
            over = self.job_id is not None and events.has_ended(db, self.account_id, self.job_id)
            rows = events.after(
                db, last, account_id=self.account_id, job_id=self.job_id, kinds=self.kinds, limit=PAGE
            )
        return last, [told_of(row) for row in rows], over


def told_of(row: Any) -> Told:
    """A row of events, as listeners are told it."""
    return Told(row.kind, row.data, row.number, row.job_id, row.frame_id, row.at)


class Feed:
    """Who waits in this process, and the one connection that listens for them."""

    def __init__(self, progress: Progress) -> None:
        self.state = "away"
        self.seen: int | None = None  # events up to this number were handed to listeners
        self._head = 0  # the last number that was said
        self._asked = 0  # what it was when everybody who waits was last looked at
        self._progress = progress
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[Place, set[asyncio.Future[bool]]] = {}
        self._fresh: set[Place] = set()  # of those, who has not been looked at yet
        self._jobs: dict[str, set[Listener]] = {}
        self._accounts: dict[UUID, set[Listener]] = {}
        self._all: set[Listener] = set()
        self._counts: Counter[UUID] = Counter()  # of listeners, by account
        self._owners: dict[str, UUID | None] = {}  # by job, where an account's steps are wanted
        self._wake = asyncio.Event()
        progress.tell = self.heard

    @property
    def waiters(self) -> int:
        """Who waits for the end of a job."""
        return sum(map(len, self._waiting.values()))

    @property
    def listeners(self) -> int:
        return len(self._all)

    def listeners_of(self, account_id: UUID) -> int:
        return self._counts[account_id]

    # -------------------------------------------------------------------------------------------- to wait

    async def ended(self, account_id: UUID, job_id: UUID, timeout_s: float) -> bool:
        """Wait until the account's job has ended: finished or cancelled. False if it has not by then.

        It holds neither a thread nor a connection. Of a job that is not there it waits in vain.
        """
        if self._stopped:
            return False
        place = (job_id, account_id)
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(place, set()).add(waiter)
        self._fresh.add(place)
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter
        except TimeoutError:
            return False
        finally:
            others = self._waiting.get(place, set())
            others.discard(waiter)
            if not others:
                self._waiting.pop(place, None)
                self._fresh.discard(place)

    @asynccontextmanager
    async def listen(
        self,
        account_id: UUID,
        job_id: UUID | None,
        *,
        after: int | None = None,
        kinds: tuple[str, ...] = (),
        previews: bool = False,
        key: str | None = None,
    ) -> AsyncIterator[Listener]:
        """Listen to an account, or to one job of it: see that it is the account's before.

        after: the number of the last event that is known; without one an account's begin now, and a job's with its
        first. key: of the API; once it is not valid any more, the listener is closed.
        A job's listener is closed when the job has ended.
        """
        listener = Listener(self, account_id, job_id, after=after, kinds=kinds, previews=previews, key=key)
        if self._stopped:
            listener.close("stopped")
        places: Any = self._accounts if job_id is None else self._jobs
        place = account_id if job_id is None else job_id.hex
        places.setdefault(place, set()).add(listener)
        self._all.add(listener)
        self._counts[account_id] += 1
        try:
            yield listener
        finally:
            self._all.discard(listener)
            self._counts[account_id] -= 1
            if not self._counts[account_id]:
                del self._counts[account_id]
            places[place].discard(listener)
            if not places[place]:
                del places[place]

    def stop(self) -> None:
        """Let everybody who waits go, at once: the process ends. Any thread may call it, and a signal's handler."""
        self._stopped = True
        for listener in list(self._all):
            listener.closed = listener.closed or "stopped"
        if self._loop is not None:
            with suppress(RuntimeError):  # it runs no more
                self._loop.call_soon_threadsafe(self._let_go)

    def _let_go(self) -> None:
        for listener in list(self._all):
            listener.close("stopped")
        for waiters in list(self._waiting.values()):
            _answer(waiters, False)

    # -------------------------------------------------------------------------------------------- to follow

    async def follow(self) -> None:
        """Listen until cancelled; come back when the database does."""
        self._loop = asyncio.get_running_loop()
        if not settings().database_url.get_secret_value():
            return
        checking = asyncio.create_task(self._check_keys())
        wait_s = FIRST_RETRY_S
        try:
            while True:
                began = time.monotonic()
                try:
                    await self._follow_once()
                except (psycopg.Error, OSError, TimeoutError) as e:
                    if self.state == "up":
                        log.warning("nobody is told what happens until the database is back: %s", e)
                except Exception:
                    log.exception("the feed broke, and starts again")
                self.state = "away"
                wait_s = FIRST_RETRY_S if time.monotonic() - began > 10 else wait_s
                await asyncio.sleep(wait_s)
                wait_s = min(LONGEST_RETRY_S, wait_s * 2)
        finally:
            checking.cancel()
            self._stopped = True
            self._let_go()

    async def _follow_once(self) -> None:
        url = settings().database_url.get_secret_value().replace("postgresql+psycopg://", "postgresql://", 1)
        connection: Connection = await psycopg.AsyncConnection.connect(
            url,
            autocommit=True,
            row_factory=namedtuple_row,
            connect_timeout=5,
            options=" ".join(f"-c {option}" for option in OPTIONS),
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
            tcp_user_timeout=15000,
        )
        async with connection:
            connection.add_notify_handler(self._spoken)
            await connection.execute(f"LISTEN {CHANNEL}")
            row: Any = await (await connection.execute(LAST)).fetchone()
            self._head = self._asked = self.seen = row.number if row else 0
            self.state = "up"
            for listener in self._all:  # of what happened meanwhile nobody told
                listener.miss()
            looked = 0.0
            while True:
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    await connection.execute("SELECT 1")  # reads what was said
                    everybody = time.monotonic() >= looked + LOOK_EVERY_S or self._head > self._asked
                    if everybody:
                        looked, self._asked = time.monotonic(), self._head
                    await self._look(connection, everybody=everybody)
                await self._until_woken(connection, looked + LOOK_EVERY_S - time.monotonic())

    def _spoken(self, notice: psycopg.Notify) -> None:
        if notice.payload.isdigit():
            self._head = max(self._head, int(notice.payload))

    async def _until_woken(self, connection: Connection, within_s: float) -> None:
        """Wait until the connection has something to read, or somebody new waits."""
        if self._head > self._asked:
            return
        loop, fd = asyncio.get_running_loop(), connection.fileno()
        loop.add_reader(fd, self._wake.set)
        try:
            async with asyncio.timeout(max(0.0, within_s)):
                await self._wake.wait()
        except TimeoutError:
            pass
        finally:
            loop.remove_reader(fd)
            self._wake.clear()

    async def _look(self, connection: Connection, *, everybody: bool) -> None:
        """Answer who waits, and tell who listens."""
        places = set(self._waiting) if everybody else self._fresh & set(self._waiting)
        self._fresh.clear()
        for listener in self._all:
            if listener.previews and listener.job_id is not None:
                self._progress.watch(listener.job_id)
        if places:
            jobs = list({job for job, _ in places})
            for row in await (await connection.execute(ENDED, {"jobs": jobs})).fetchall():
                _answer(self._waiting.get((row.id, row.account_id), ()), True)
        if strange := [UUID(hex=job) for job, owner in self._owners.items() if owner is None]:
            found = await (await connection.execute(OWNERS, {"jobs": strange})).fetchall()
            self._owners |= {row.id.hex: row.account_id for row in found}
            for job in {job.hex for job in strange} - {row.id.hex for row in found}:
                del self._owners[job]
        await self._read_news(connection)

    async def _read_news(self, connection: Connection) -> None:
        """Hand every listener what it is to be told, up to what was last said."""
        last = self._head
        while self.seen is not None and self.seen < last and self._all:
            listeners = list(self._all)
            facts = {
                "seen": self.seen,
                "last": last,
                "accounts": list({x.account_id for x in listeners}),
                "common": any(x.wants(COMMON) for x in listeners),
                "n": AT_ONCE,
            }
            # whoever comes while this is read has to find what it leaves out by itself
            known = set(listeners)
            rows = await (await connection.execute(NEWS, facts)).fetchall()
            upto = rows[-1].number if len(rows) == AT_ONCE else last
            await self._hand_out(rows)
            self.seen = upto
            for listener in self._all:
                if listener not in known:
                    listener.miss()
        self.seen = max(self.seen or 0, last)

    async def _hand_out(self, rows: Sequence[Any]) -> None:
        pushed = 0
        for row in rows:
            told = None
            for listener in self._hearers(row.account_id, row.job_id):
                told = told or told_of(row)
                listener.push(told)
                pushed += 1
            if pushed >= PUSHED:  # other requests have their turn
                pushed = 0
                await asyncio.sleep(0)

    def _hearers(self, account_id: UUID, job_id: UUID | None) -> Iterable[Listener]:
        yield from self._accounts.get(account_id, ())
        if job_id is not None:
            for listener in self._jobs.get(job_id.hex, ()):
                if listener.account_id == account_id:
                    yield listener

    # -------------------------------------------------------------------------------------------- steps

    def heard(self, steps: Sequence[Step], pictures: Sequence[tuple[str, int, bytes]]) -> None:
        """Take what a worker said, in the loop's own thread."""
        if not self._all:
            return
        of_accounts = any(x.wants_steps for many in self._accounts.values() for x in many)
        for job, index, share in steps:
            for listener in self._jobs.get(job, ()):
                if listener.wants_steps:
                    listener.step((job, index), share)
            if of_accounts and (owner := self._owner(job)) is not None:
                for listener in self._accounts.get(owner, ()):
                    if listener.wants_steps:
                        listener.step((job, index), share)
        for job, index, jpeg in pictures:
            for listener in self._jobs.get(job, ()):
                if listener.previews:
                    listener.picture((job, index), jpeg)

    def _owner(self, job: str) -> UUID | None:
        """Whose job it is; asked for with the next query if nobody knows."""
        if job not in self._owners:
            with suppress(ValueError):
                UUID(hex=job)
                if len(self._owners) >= MANY_OWNERS:
                    self._owners.clear()
                self._owners[job] = None
        return self._owners.get(job)

    # -------------------------------------------------------------------------------------------- keys

    async def _check_keys(self) -> None:
        """Close the listeners of keys that are not valid any more."""
        while True:
            await asyncio.sleep(KEYS_EVERY_S)
            for key in {x.key for x in self._all if x.key is not None}:
                if not await run_in_threadpool(_is_valid, key):
                    for listener in [x for x in self._all if x.key == key]:
                        listener.close("revoked")


def _is_valid(key: str) -> bool:
    try:
        with transaction() as db:
            accounts.authenticate(db, key)
    except Unauthorized:
        return False
    except Exception as e:
        log.warning("whether listeners' keys are still valid is looked at later: %s", e)
    return True


def _answer(waiters: Iterable["asyncio.Future[bool]"], ended: bool) -> None:
    for waiter in list(waiters):
        if not waiter.done():
            waiter.set_result(ended)
