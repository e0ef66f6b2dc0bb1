"""Claims for a step engine: made beside its ticks, by a thread of their own, so that the device never waits.

A claim brings what the next tick has room for. Full for one class is not full for a more urgent one: of its frames
as many are claimed as a tick takes, and the less urgent ones are not picked meanwhile. A frame that must be alone is
not claimed here: once it waited too long nothing is taken in, until the device is empty.
"""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from uuid import UUID

from farm import queue, tokens
from farm.catalog import Model
from farm.db import Db
from farm.errors import RenderFailed
from farm.queue import ClaimedPack, Head
from farm.settings import settings
from farm.spec import shape_key
from workers.books import book, book_directly
from workers.checkpoints import Checkpoints
from workers.encode import engine_of
from workers.engine import Ask
from workers.leases import Leases

log = logging.getLogger(__name__)

SHAPES = 4  # in flight at once: they take turns, so that more would make each of them slow
AHEAD = 32  # packs in a row a loaded model may get before another one whose turn it is
WAKE_EVERY_S = 1.0
RETRY_S = 1.0


@dataclass
class Turns:
    """Whose turn it was: what one claim of a worker has to know of those before."""

    aged: bool = False  # the last one was an aged lane's: every other at most
    warm: str | None = None  # the model claimed last
    ahead: float = AHEAD  # packs it may still get before others

    @property
    def preferred(self) -> str | None:
        """The model to prefer inside a class; None once it had its packs in a row."""
        return self.warm if self.ahead > 0 else None

    def took(self, pack: ClaimedPack, *, packs: float = 1.0) -> None:
        """Count a claim: of how much of a full pack."""
        if pack.model != self.warm or self.ahead <= 0:
            self.warm, self.ahead = pack.model, AHEAD
        self.ahead -= packs
        self.aged = pack.aged


@dataclass(frozen=True, slots=True)
class Arrival:
    """A pack and what its frames need to start; or go on, if a state was saved."""

    pack: ClaimedPack
    asks: Mapping[UUID, Ask | RenderFailed]
    saved: Mapping[UUID, bytes]


@dataclass(frozen=True)
class Room:
    """What a tick takes and what is in flight, as seen between two ticks."""

    model: Model
    caps: Mapping[str, int] = field(default_factory=dict)  # shape key → frames a tick takes, as far as known
    flying: Mapping[tuple[str, int], int] = field(default_factory=dict)  # (shape key, priority) → frames

    def cap(self, shape: str, pixels: int) -> int:
        """How many frames of a shape a tick takes; as the catalog says, until one took some."""
        pack = self.model.pack
        rows = min(pack.rows, max(1, pack.pixels // pixels) * self.model.guided_rows)
        return self.caps.get(shape) or max(1, rows // self.model.guided_rows)

    def of(self, head: Head) -> int:
        """How many frames like this head, or more urgent, the next tick would take."""
        ahead = Counter[str]()
        for (shape, priority), frames in self.flying.items():
            if priority >= head.priority:
                ahead[shape] += frames
        if head.shape_key not in ahead and len(+ahead) >= SHAPES:
            return 0
        return max(0, self.cap(head.shape_key, head.pixels) - ahead[head.shape_key])

    @property
    def above(self) -> int:
        """The class below which there is no room; −1 if there is some for each."""
        shapes = Counter[str]()
        for (shape, _), frames in self.flying.items():
            shapes[shape] += frames
        if any(frames < self.caps.get(shape, 1) for shape, frames in shapes.items() if frames):
            return -1
        return min((priority for (_, priority), frames in self.flying.items() if frames), default=-1)

    @property
    def most_urgent(self) -> int:
        return max((priority for (_, priority), frames in self.flying.items() if frames), default=-1)

    def with_(self, packs: Sequence[ClaimedPack]) -> "Room":
        """The same with packs that are on their way to the engine."""
        flying = Counter(self.flying)
        for pack in packs:
            for frame in pack.frames:
                flying[shape_key(frame.spec, self.model), frame.priority] += 1
        return Room(self.model, self.caps, flying)


class Claims:
    """Claims frames for one engine until told to stop."""

    def __init__(
        self,
        worker: str,
        model: Model,
        *,
        others: Sequence[Model],
        turns: Turns,
        leases: Leases,
        checkpoints: Checkpoints,
        ask: Callable[[queue.ClaimedFrame], Ask],
        may: Callable[[], bool],
        reached: Callable[[str], None],
        above: int = -1,
    ) -> None:
        """above: nothing of this class or a less urgent one."""
        self._worker = worker
        self._model = model
        self._others = others
        self._turns = turns
        self._leases = leases
        self._checkpoints = checkpoints
        self._ask = ask
        self._may = may
        self._reached = reached
        self._above = above
        self._lock = threading.Lock()
        self._room: Room | None = None
        self._inbox: list[Arrival] = []
        self._coming: list[ClaimedPack] = []  # claimed, and not in the room's flying yet
        self._waits: tuple[int, float] | None = (
            None  # a suspect's priority, and until when others may pass it
        )
        self._woken = 0.0
        self._over = threading.Event()
        self._running: Future[None] | None = None
        self.pending: ClaimedPack | None = (
            None  # of another model, whose turn it is when this one's frames are done
        )

    def start(self, threads: Executor) -> None:
        self._over.clear()
        self._running = threads.submit(self._run)

    def stop(self) -> None:
        """Claim no more; returns when no claim is under way."""
        self._over.set()
        if self._running is not None:
            self._running.result()
            self._running = None

    def post(self, room: Room, taken: Sequence[Arrival]) -> None:
        """Say what the next tick has room for; taken: arrivals that are counted in it."""
        ids = {a.pack.id for a in taken}
        with self._lock:
            self._room = room
            self._coming = [p for p in self._coming if p.id not in ids]

    def arrivals(self) -> list[Arrival]:
        """What was claimed since the last time."""
        with self._lock:
            found, self._inbox = self._inbox, []
        return found

    def prepare(self, pack: ClaimedPack) -> Arrival:
        """Fetch what a pack's frames need, off the device's thread."""
        asks: dict[UUID, Ask | RenderFailed] = {}
        for frame in pack.frames:
            try:
                asks[frame.id] = self._ask(frame)
            except RenderFailed as e:
                asks[frame.id] = e
        return Arrival(pack, asks, self._checkpoints.fetch([f.id for f in pack.frames]))

    # ------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                if self.pending is None and self._may():
                    self._look()
            except Exception:  # no fault of the engine's: what is in flight goes on
                log.exception("could not claim for %s", self._model.name)
                self._over.wait(RETRY_S)
            self._over.wait(settings().look_s)

    def _look(self) -> None:
        with self._lock:
            room = self._room and self._room.with_(self._coming)
        if room is None:
            return
        pack = book_directly(lambda db: self._claim(db, room), give_up=self._over)
        if pack is None:
            return
        self._leases.hold(pack.id)
        self._reached("claimed")
        if pack.full and time.monotonic() >= self._woken + WAKE_EVERY_S:
            self._woken = time.monotonic()
            tokens.wake([pack.model])
        aside = pack.model != self._model.name and pack.priority > room.most_urgent
        if not aside:
            spec = pack.frames[0].spec
            self._turns.took(pack, packs=len(pack.frames) / room.cap("", spec.width * spec.height))
        if pack.model != self._model.name and not aside:
            self.pending = pack
            return
        arrival = self._prepared(pack)
        with self._lock:
            self._coming.append(pack)
            self._inbox.append(arrival)

    def _prepared(self, pack: ClaimedPack) -> Arrival:
        try:
            return self.prepare(pack)
        except Exception:
            book(lambda db: queue.release(db, [pack.id]), give_up=self._over)
            self._leases.drop(pack.id)
            raise

    def _claim(self, db: Db, room: Room) -> ClaimedPack | None:
        urgent = self._urgent_of_others(db, room)
        if urgent is not None:
            return urgent
        models = [self._model.name]
        if self._others and self._turns.preferred is None:  # it had its packs in a row: whoever's turn it is
            models += [m.name for m in self._others]
        above = max(self._above, room.above)
        head = self._head(db, models, above)
        if head is None or (self._makes_way and head.priority <= self._waiting_priority):
            return None
        if head.model != self._model.name:
            return self._take(db, head, queue.frames_in(self._of(head).pack, head.pixels), above)
        frames = room.of(head)
        above = above if above < 0 else max(self._above, head.priority - 1)  # what fills up is as urgent
        return self._take(db, head, frames, above) if frames else None

    def _urgent_of_others(self, db: Db, room: Room) -> ClaimedPack | None:
        """A pack of another model that is more urgent than everything in flight."""
        if not self._others or room.most_urgent >= 9:
            return None
        names = [m.name for m in self._others]
        head = queue.find_head(db, models=names, ageing=False, above=room.most_urgent, suspects=False)
        if head is None:
            return None
        return self._take(db, head, queue.frames_in(self._of(head).pack, head.pixels), room.most_urgent)

    def _head(self, db: Db, models: Sequence[str], above: int) -> Head | None:
        ageing = above < 0 and not self._turns.aged
        head = queue.find_head(db, models=models, ageing=ageing, above=above)
        if head is None or not head.suspect:
            self._note_other(head, above)
            return head
        if self._waits is None:  # not all workers at once make way
            self._waits = (head.priority, time.monotonic() + settings().suspect_s * random.uniform(1, 1.5))
        if self._makes_way:
            return None
        return queue.find_head(db, models=models, ageing=ageing, above=above, suspects=False)

    def _note_other(self, head: Head | None, above: int) -> None:
        """Forget the suspect that waited if somebody else has it by now."""
        if above < self._waiting_priority and (head is None or head.priority <= self._waiting_priority):
            self._waits = None

    @property
    def _waiting_priority(self) -> int:
        return -1 if self._waits is None else self._waits[0]

    @property
    def _makes_way(self) -> bool:
        """Whether a suspect waited so long that nothing as urgent as it is taken in any more."""
        return self._waits is not None and time.monotonic() >= self._waits[1]

    def _of(self, head: Head) -> Model:
        return next(m for m in (self._model, *self._others) if m.name == head.model)

    def _take(self, db: Db, head: Head, frames: int, above: int) -> ClaimedPack:
        model = self._of(head)
        return queue.take(
            db,
            head,
            worker=self._worker,
            frames=min(frames, queue.frames_in(model.pack, head.pixels)),
            engine=engine_of(model),
            by_shape=model.packs_by == "shape",
            above=above,
        )
