"""The burst of a step engine: a loop of ticks, with claims made beside them.

Frames join and leave between two ticks, each by itself, and go to the shelf as they leave; a pack is over with its
last frame. What the engine took on the device is shared among the frames of each tick, and so among their packs.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from farm import queue
from farm.catalog import Model
from farm.errors import OutOfMemory, RenderFailed
from farm.queue import ClaimedFrame, ClaimedPack
from farm.settings import settings
from farm.spec import Spec, shape_key
from workers.books import book
from workers.checkpoints import Checkpoints
from workers.claims import Arrival, Claims, Room
from workers.engine import Ask, Pixels, StepEngine, Tick
from workers.leases import Leases
from workers.progress import PREVIEW_EVERY_S, Progress
from workers.shelf import Shelf
from workers.stop import Stop
from workers.trust import Blame, Trust, too_fast

log = logging.getLogger(__name__)

MOST_URGENT = 9
TELL_EVERY_S = 0.5
HAND_OVER_EVERY_S = 1.0  # what could not be saved is tried again


@dataclass(slots=True)
class Load:
    """A pack of which frames are in flight."""

    pack: ClaimedPack
    seconds: float = 0.0  # on the device so far
    left: set[UUID] = field(default_factory=set)

    @property
    def gpu_ms(self) -> int:
        return round(1000 * self.seconds)


@dataclass(slots=True)
class Flight:
    """A frame in flight."""

    load: Load
    frame: ClaimedFrame
    ask: Ask
    shape: str
    priority: int
    left: int | None = None  # steps it still needs, once it made one
    seconds: float = 0.0  # of the ticks it took part in
    made: float = 0.0  # share of its steps that were made here
    parked_at: float | None = None  # since when more urgent ones hold it up


@dataclass(frozen=True, slots=True)
class Hands:
    """What of its worker a burst works with."""

    name: str
    leases: Leases
    shelf: Shelf
    progress: Progress
    checkpoints: Checkpoints
    stop: Stop
    threads: Executor  # one, for claims
    clerk: Executor  # one, for what goes back
    reached: Callable[[str], None]
    trust: Trust


class Steps:
    """Frames in flight on one step engine, from the first pack until the device is empty."""

    def __init__(
        self,
        model: Model,
        engine: StepEngine,
        claims: Claims,
        hands: Hands,
        *,
        aside: Callable[[ClaimedPack], None],
        tell: Callable[[ClaimedPack], None],
        measured_s: Callable[[Spec], float],
    ) -> None:
        """aside: renders a more urgent pack of another model meanwhile. tell: hears of each pack that came.

        measured_s: how long a frame takes at least, as verify measured it; 0 if it never did.
        """
        self._model = model
        self._engine = engine
        self._claims = claims
        self._hands = hands
        self._aside = aside
        self._tell = tell
        self._measured_s = measured_s
        self._flights: dict[UUID, Flight] = {}
        self._loads: dict[int, Load] = {}
        self._caps: dict[str, int] = {}
        self._were_urgent = False
        self._tick_s = 0.0
        self._heard = -1
        now = time.monotonic()
        self._saved_at = self._told_at = self._shown_at = now
        self._handed_over_at = 0.0
        self._going_back: list[Future[None]] = []

    def run(self, pack: ClaimedPack) -> ClaimedPack | None:
        """Render this pack and all that joins it. Returns a pack of another model that was claimed for after it.

        Raises what the engine raised if it, or the device, is lost; its frames are with the queue again then.
        """
        try:
            self._take_in([self._claims.prepare(pack)])
            if not pack.alone:
                self._claims.start(self._hands.threads)
            while self._flights or self._more():
                self._news()
                if self._flights:
                    self._after(self._engine.tick())
        except Exception as e:
            self._claims.stop()
            self._lose(e)
            if (pending := self._claims.pending) is not None:
                self._claims.pending = None
                self._release(pending, [f.id for f in pending.frames], "the engine is lost")
            raise
        finally:
            self._claims.stop()
            for arrival in self._claims.arrivals():
                self._release(arrival.pack, [f.id for f in arrival.pack.frames], "claimed too late")
            for future in self._going_back:
                future.result()
        return self._pending()

    def _more(self) -> bool:
        """The device is empty: whether a claim that was under way brought something."""
        self._claims.stop()
        arrivals = self._claims.arrivals()
        if not arrivals:
            return False
        self._claims.start(self._hands.threads)
        self._take_in(arrivals)
        return True

    def _pending(self) -> ClaimedPack | None:
        pack, self._claims.pending = self._claims.pending, None
        if pack is not None and self._hands.stop.draining:
            self._release(pack, [f.id for f in pack.frames], "the worker stops")
            return None
        return pack

    # ------------------------------------------------------------------------------------------ in

    def _take_in(self, arrivals: Sequence[Arrival]) -> None:
        taken = []
        for arrival in arrivals:
            if arrival.pack.model != self._model.name:
                self._give_way(arrival.pack)
                continue
            taken.append(arrival)
            self._tell(arrival.pack)
            load = Load(arrival.pack)
            for frame in arrival.pack.frames:
                self._add(load, frame, arrival)
            if load.left:
                self._loads[arrival.pack.id] = load
            else:
                self._hands.leases.drop(arrival.pack.id)
        self._post(taken)

    def _add(self, load: Load, frame: ClaimedFrame, arrival: Arrival) -> None:
        """Take a frame in, or fail it alone if its own inputs break."""
        if frame.id in self._flights:  # its lease ran out, and it came back here before that was heard of
            self._forget([frame.id])
        ask = arrival.asks[frame.id]
        pack = arrival.pack
        priority = MOST_URGENT if pack.aged and frame.priority == pack.priority else frame.priority
        if not isinstance(ask, RenderFailed):
            try:
                self._engine.add(frame.id, ask, priority=priority, saved=arrival.saved.get(frame.id))
            except OutOfMemory as e:
                if self._flights:
                    self._back(load.pack, [frame.id], str(e))
                    return
                ask = e
            except RenderFailed as e:
                ask = e
        if isinstance(ask, RenderFailed):
            self._hands.shelf.put(pack, self._model, [frame], [ask], gpu_ms=load.gpu_ms)
            return
        load.left.add(frame.id)
        self._flights[frame.id] = Flight(load, frame, ask, shape_key(frame.spec, self._model), priority)

    def _give_way(self, pack: ClaimedPack) -> None:
        """Let a more urgent pack of another model have the device; what is in flight here waits."""
        self._claims.stop()
        for pack_id in self._loads:
            self._hands.leases.progress(pack_id, next_within_s=settings().frame_limit_s)
        self._aside(pack)
        self._claims.post(Room(self._model, dict(self._caps), self._flying()), [Arrival(pack, {}, {})])
        self._claims.start(self._hands.threads)

    def _post(self, taken: Sequence[Arrival]) -> None:
        self._claims.post(Room(self._model, dict(self._caps), self._flying()), taken)

    def _flying(self) -> Counter[tuple[str, int]]:
        """Frames in flight, without those that will have left when a claim made now has arrived."""
        soon = max(1, round(settings().look_s / self._tick_s)) if self._tick_s else 1
        return Counter(
            (f.shape, f.priority) for f in self._flights.values() if f.left is None or f.left > soon
        )

    # ------------------------------------------------------------------------------------------ the tick

    def _after(self, tick: Tick) -> None:
        now = time.monotonic()
        self._tick_s = tick.seconds
        for frame, seconds in tick.shares.items():
            if flight := self._flights.get(frame):
                flight.load.seconds += seconds
        for frame, (done, total) in tick.steps.items():
            flight = self._flights[frame]
            flight.left = total - done
            flight.seconds += tick.seconds
            flight.made += 1 / total
        self._learn(tick)
        self._note_parked(tick, now)
        self._show(tick, now)
        for frame, result in tick.done.items():
            self._leave(frame, result)
        self._post([])

    def _leave(self, frame: UUID, result: Pixels | RenderFailed) -> None:
        flight = self._flights.pop(frame)
        load = flight.load
        self._hands.reached("rendered")
        self._hands.checkpoints.forget([frame])
        measured_s = flight.made * self._measured_s(flight.frame.spec)
        if not isinstance(result, RenderFailed) and (
            wrong := too_fast(flight.seconds, measured_s=measured_s)
        ):
            result = RenderFailed(wrong)
        if (blame := self._judge(frame, result)) is Blame.FRAME:
            self._hands.shelf.put(load.pack, self._model, [flight.frame], [result], gpu_ms=load.gpu_ms)
        else:
            self._hands.shelf.note_time(load.pack.id, load.gpu_ms)
            self._back(load.pack, [frame], f"the {blame} is to blame: {result}")
        self._done_with(load, [frame])

    def _judge(self, frame: UUID, result: Pixels | RenderFailed) -> Blame:
        if not isinstance(result, RenderFailed):
            self._hands.trust.good(self._model.name)
            return Blame.FRAME
        if isinstance(result, OutOfMemory):
            return Blame.FRAME
        return self._hands.trust.bad(self._model.name, [frame], str(result))

    def _done_with(self, load: Load, frames: Iterable[UUID]) -> None:
        load.left.difference_update(frames)
        if not load.left and self._loads.pop(load.pack.id, None) is not None:
            self._hands.leases.drop(load.pack.id)

    def _learn(self, tick: Tick) -> None:
        """Note how many frames of a shape a tick takes. A tick with an urgent frame in it takes fewer."""
        urgent = any(f.priority >= MOST_URGENT for f in self._flights.values())
        if urgent != self._were_urgent:
            self._were_urgent = urgent
            self._caps.clear()
        if not tick.steps:
            return
        some = self._flights[next(iter(tick.steps))]
        parked = any(self._flights[f].shape == some.shape for f in self._engine.parked if f in self._flights)
        alike = sum(f.shape == some.shape for f in self._flights.values())
        if parked:
            self._caps[some.shape] = len(tick.steps)
        elif alike == len(self._flights):
            self._caps[some.shape] = len(tick.steps) + self._engine.room(some.frame.spec)

    def _note_parked(self, tick: Tick, now: float) -> None:
        """Note which frames wait for more urgent ones; not those that wait for their turn."""
        least = min((self._flights[f].priority for f in tick.steps), default=-1)
        parked = set(self._engine.parked)
        for frame, flight in self._flights.items():
            if frame not in parked or flight.priority >= least:
                flight.parked_at = None
            elif flight.parked_at is None:
                flight.parked_at = now

    def _show(self, tick: Tick, now: float) -> None:
        """Tell of progress: to the leases, to who waits, and to who watches."""
        if now >= self._told_at + TELL_EVERY_S:
            self._told_at = now
            for pack_id in [*self._loads, *([self._claims.pending.id] if self._claims.pending else [])]:
                self._hands.leases.progress(pack_id)
        steps = ((self._flights[f], done, total) for f, (done, total) in tick.steps.items())
        self._hands.progress.steps((x.load.pack.id, x.frame, done, total) for x, done, total in steps)
        watched = self._hands.progress.watched
        if watched and now >= self._shown_at + PREVIEW_EVERY_S:
            self._shown_at = now
            for frame, flight in self._flights.items():
                pixels = self._engine.preview(frame) if flight.frame.job_id in watched else None
                if pixels is not None:
                    self._hands.progress.preview(flight.load.pack.id, flight.frame, pixels)

    # ------------------------------------------------------------------------------------------ news

    def _news(self) -> None:
        """Take in what came since the last tick: packs, cancellations, priorities, the end of the shift."""
        if arrivals := self._claims.arrivals():
            self._take_in(arrivals)
        if self._heard != self._hands.leases.heard:
            self._heard = self._hands.leases.heard
            self._hear()
        now = time.monotonic()
        if self._hands.stop.quitting:
            self._give_back(list(self._flights), "the worker stops", once=self._save(self._flights))
        elif self._hands.stop.draining:
            self._hand_over(now)
        elif now >= self._saved_at + settings().checkpoint_s and not self._hands.checkpoints.busy:
            self._saved_at = now
            self._save(f for f, flight in self._flights.items() if flight.left != 1)
        held_up = [
            f
            for f, flight in self._flights.items()
            if flight.parked_at is not None and now >= flight.parked_at + settings().parked_s
        ]
        if held_up:
            self._give_back(held_up, "more urgent frames hold them up", once=self._save(held_up))

    def _hear(self) -> None:
        """Drop what was lost or cancelled, and follow jobs whose priority changed."""
        leases = self._hands.leases
        if leases.drain.is_set() and not self._hands.stop.draining:
            self._hands.stop.tell()
        for load in list(self._loads.values()):
            if leases.is_lost(load.pack.id):
                log.warning("pack %d is somebody else's by now", load.pack.id)
                lost = list(load.left)
                self._forget(lost)
            elif gone := load.left & leases.cancelled(load.pack.id):
                self._hands.checkpoints.forget(gone)
                self._give_back(list(gone), "cancelled")
        for frame, priority in leases.priorities().items():
            flight = self._flights.get(frame)
            if flight is not None and flight.priority != priority and not flight.load.pack.aged:
                flight.priority = priority
                self._engine.add(frame, flight.ask, priority=priority)

    # ------------------------------------------------------------------------------------------ out

    def _hand_over(self, now: float) -> None:
        """Save and give back what another worker can go on with; what could not be saved may end within the grace."""
        if now < self._handed_over_at + HAND_OVER_EVERY_S:
            return
        self._handed_over_at = now
        states = {f: self._engine.save(f) for f in self._flights}
        saved = self._hands.checkpoints.save({f: state for f, state in states.items() if state is not None})
        safe = saved.result() | {f for f, state in states.items() if state is None}  # those made no step yet
        if safe:
            self._give_back(list(safe), "the worker drains; they go on elsewhere")

    def _save(self, frames: Iterable[UUID]) -> Future[frozenset[UUID]]:
        """Save the states of frames that have one, in the background."""
        states = {f: state for f in frames if (state := self._engine.save(f)) is not None}
        return self._hands.checkpoints.save(states)

    def _forget(self, frames: Collection[UUID]) -> None:
        """Let go of frames: they ended, or are somebody else's."""
        self._engine.drop(frames)
        self._hands.checkpoints.forget(frames, ended=False)
        for frame in frames:
            self._done_with(self._flights.pop(frame).load, [frame])

    def _give_back(self, frames: Sequence[UUID], why: str, *, once: Future[Any] | None = None) -> None:
        """Queue frames again; once: when this is over."""
        loads = {self._flights[f].load.pack.id: self._flights[f].load for f in frames}
        for load in loads.values():
            self._hands.shelf.note_time(load.pack.id, load.gpu_ms)
            self._back(load.pack, [f for f in frames if f in load.left], why, once=once)
        self._forget(frames)

    def _release(self, pack: ClaimedPack, frames: Sequence[UUID], why: str) -> None:
        """Queue the frames of a pack again that did not come to the device."""
        self._back(pack, frames, why)
        self._hands.leases.drop(pack.id)

    def _back(
        self, pack: ClaimedPack, frames: Sequence[UUID], why: str, *, once: Future[Any] | None = None
    ) -> None:
        """Queue frames again, off the device's thread: the database may be away."""
        log.info("giving back %d frames of pack %d: %s", len(frames), pack.id, why)
        load = self._loads.get(pack.id)
        took = None if load is None else {pack.id: load.gpu_ms}

        def work() -> None:
            if once is not None:
                once.result()
            book(
                lambda db: queue.release(db, [pack.id], frames=list(frames), gpu_ms=took),
                give_up=self._hands.stop.quit,
            )

        self._going_back = [f for f in self._going_back if not f.done()]
        self._going_back.append(self._hands.clerk.submit(work))

    def _lose(self, error: Exception) -> None:
        """The engine is lost: its frames fail together, and are blamed only if one was alone on it.

        If it is the model's fault or the device's, none is.
        """
        blame = self._hands.trust.engine_failed(self._model.name, list(self._flights), error)
        for load in list(self._loads.values()):
            frames = list(load.left)
            self._hands.shelf.note_time(load.pack.id, load.gpu_ms)
            if blame is Blame.FRAME:
                self._fail(load, frames, f"{type(error).__name__}: {error}")
            else:
                self._back(load.pack, frames, f"the {blame} is to blame: {error}")
            self._done_with(load, frames)
        self._flights.clear()

    def _fail(self, load: Load, frames: Sequence[UUID], reason: str) -> None:
        pack, took = load.pack.id, {load.pack.id: load.gpu_ms}
        log.warning("%d frames of pack %d failed: %s", len(frames), pack, reason)
        book(
            lambda db: queue.fail(db, pack, reason, frames=frames, gpu_ms=took),
            give_up=self._hands.stop.quit,
        )
