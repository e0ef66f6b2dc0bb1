"""A token in, a burst of packs out: claim, render, and hand on to the shelf, until there is no work.

While one pack is on the device the one before is encoded, stored and settled; the next is claimed at the
running one's last step, beside its decoding, and not sooner: the device does not wait, and an urgent frame
still gets the very next pack. Models that go step by step take frames in between any two steps: see steps.py.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

from sqlalchemy import select

from farm import queue, tokens
from farm.catalog import Model, PackLimit
from farm.db import Db
from farm.errors import FarmError, Misconfigured, OutOfMemory, RenderFailed
from farm.ids import public
from farm.queue import ClaimedFrame, ClaimedPack
from farm.settings import settings
from farm.storage import open_store
from farm.tables import Worker as Row
from workers import gpu
from workers.ailing import note, remembered
from workers.books import book, book_directly
from workers.checkpoints import Checkpoints
from workers.claims import Claims, Turns
from workers.encode import engine_of
from workers.engine import Ask, Cancelled, Engine, Pixels, StepEngine
from workers.engines import Engines
from workers.gpu import Capacity
from workers.inputs import InputReader
from workers.leases import Leases
from workers.measured import Measured, recall
from workers.progress import Progress
from workers.shelf import Shelf
from workers.steps import Hands, Steps
from workers.stop import Stop
from workers.trust import Ailment, Blame, Trust, is_device_error, too_fast

log = logging.getLogger(__name__)

PACKS_IN_HAND = (
    6  # on the shelf at once, settled together: more means that the store or the database cannot follow
)
FRAMES_IN_HAND = 64  # of models that go step by step: these come one by one
TELL_EVERY_S = 1.0  # of packs that join others


def reached(point: str) -> None:
    """A place where a crash must do no harm; the chaos test replaces this to kill the process there."""


@dataclass(slots=True)
class Report:
    """What a burst did, for Flower."""

    pool: str
    images: int = 0
    packs: int = 0
    started: float = field(default_factory=time.monotonic)
    outcome: str = "rendering"
    jobs: list[str] = field(default_factory=list)

    def add(self, pack: ClaimedPack) -> None:
        self.packs += 1
        self.images += len(pack.frames)
        self.jobs = sorted({public("job", f.job_id) for f in pack.frames})

    def to_json(self) -> dict[str, object]:
        seconds = round(time.monotonic() - self.started, 1)
        return {
            "pool": self.pool,
            "images": self.images,
            "packs": self.packs,
            "seconds": seconds,
            "outcome": self.outcome,
            "jobs": ",".join(self.jobs[:8]),
        }


class _Paced:
    """Tells Flower of packs that join others, not of each by itself."""

    def __init__(self, report: Report, tell: Callable[[Report], None]) -> None:
        self._report = report
        self._tell = tell
        self._told = 0.0

    def add(self, pack: ClaimedPack) -> None:
        self._report.add(pack)
        if time.monotonic() >= self._told + TELL_EVERY_S:
            self._told = time.monotonic()
            self._tell(self._report)


class Worker:
    """One process on one device: its engines, its leases and its shelf."""

    def __init__(self, name: str, *, pool: str, models: Sequence[Model], device: str) -> None:
        self.name = name
        self.pool = pool
        self._models = {m.name: m for m in models}
        self._device = device
        self._engines = Engines(device, memory_bytes=gpu.memory_bytes())
        self._measured: dict[str, Measured] = {}
        self._trust = Trust(probe=gpu.probe, try_model=self._try_model, tell=self._tell_ailment)
        self._capacity = Capacity()
        self._stop = Stop()
        self._turns = Turns()
        self.device_lost = False
        self.outlived = False  # its drain was taken back
        self._leases = Leases(name)
        self._progress = Progress()
        self._claims = ThreadPoolExecutor(1, thread_name_prefix="claim")
        store = open_store(settings().storage_url.get_secret_value())
        self._inputs = InputReader(store, models, give_up=self._stop.quit)
        self._shelf = Shelf(
            store,
            self._leases,
            reached=lambda point: reached(point),  # noqa: PLW0108 - looked up when called
            drain=self._stop.drain,
            quit_now=self._stop.quit,
        )
        self._checkpoints = Checkpoints()
        self._clerk = ThreadPoolExecutor(1, thread_name_prefix="back")

    # ------------------------------------------------------------------------------------------ shutdown

    def drain(self) -> None:
        """Claim no more; what is in hand may be finished within the grace. The second time: give it back now."""
        self._stop.tell()

    @property
    def draining(self) -> bool:
        return self._stop.draining

    # ------------------------------------------------------------------------------------------ the burst

    def burst(self, tell: Callable[[Report], None]) -> Report:
        """Claim pack after pack until there is no work, the time is up or the worker drains."""
        report, until = Report(self.pool), time.monotonic() + settings().burst_s
        self._hear_admin()
        pack = self._claim()
        while pack is not None:
            if self._models[pack.model].engine == "step":
                pack = self._by_steps(pack, until, _Paced(report, tell))
            else:
                report.add(pack)
                tell(report)
                pack = self._turn(pack, until)
            if pack is None:  # what came while the last packs were being booked found this worker busy
                self._shelf.drain()
                pack = self._claim_next(until)
        report.outcome = self._why_over(until)
        if report.outcome == "time":
            tokens.wake(self._models)
        self._shelf.drain()
        tell(report)
        return report

    def _hear_admin(self) -> None:
        """Drain if an admin says so. Once that is taken back, this process has to be replaced: it gave all up."""
        state = book(
            lambda db: db.scalar(select(Row.state).where(Row.id == self.name)), give_up=self._stop.drain
        )
        if state == "draining":
            self._leases.drain.set()
        elif self._leases.drain.is_set():
            self.outlived = True

    def _why_over(self, until: float) -> str:
        if self.device_lost:
            return "device lost"
        if self._stop.draining:
            return "drained"
        if self._trust.sick:
            return "sick"
        return "time" if time.monotonic() >= until else "empty"

    def _turn(self, pack: ClaimedPack, until: float) -> ClaimedPack | None:
        """Render one pack; answers the next, claimed at this one's last step."""
        coming: list[Future[ClaimedPack | None]] = []

        def last_step() -> None:
            if not coming:
                coming.append(self._claims.submit(self._claim_next, until))

        self._render(pack, last_step)
        last_step()
        return coming[0].result()

    # ------------------------------------------------------------------------------------------ claiming

    def _claim_next(self, until: float) -> ClaimedPack | None:
        self._shelf.wait_for_room(PACKS_IN_HAND)
        return self._claim() if time.monotonic() < until and not self.device_lost else None

    def _claim(self) -> ClaimedPack | None:
        if not self._may_claim():
            return None
        limits = {n: m.pack for n, m in self._models.items() if self._trust.may(n)}
        if not limits:
            return None
        pack = book_directly(lambda db: self._claim_in(db, limits), give_up=self._stop.drain)
        if pack is None:
            return None
        self._turns.took(pack)
        self._leases.hold(pack.id)
        reached("claimed")
        if pack.full:
            tokens.wake([pack.model])  # there may be more than this worker can take
        self._inputs.asks(pack.frames)  # fetched and kept, beside the pack that is on the device
        return pack

    def _claim_in(self, db: Db, limits: dict[str, PackLimit]) -> ClaimedPack | None:
        # every other pack at most is an aged lane's: ageing bounds a wait, it does not undo the classes
        return queue.claim_pack(
            db,
            models=list(limits),
            worker=self.name,
            limits=limits,
            ageing=not self._turns.aged,
            engines={name: engine_of(self._models[name]) for name in limits},
            by_shape=[name for name in limits if self._models[name].packs_by == "shape"],
            warm=self._turns.preferred,
        )

    def _may_claim(self) -> bool:
        if self._leases.drain.is_set() and not self._stop.draining:
            self.drain()
        return not self._stop.draining

    # ------------------------------------------------------------------------------------------ rendering

    def _render(self, pack: ClaimedPack, last_step: Callable[[], None]) -> None:
        """Bring a pack's pixels to the shelf, or its frames back to the queue."""
        rest = list(pack.frames)
        try:
            self._render_in_parts(pack, rest, last_step)
        except Cancelled:
            self._back(pack, rest, "cancelled, lost, or the worker stops")
        except Misconfigured as e:
            log.error("model %s cannot be loaded: %s", pack.model, e)
            self._trust.cannot_load(pack.model, str(e))
            self._back(pack, rest, str(e))
        except OutOfMemory as e:
            self._fail(pack, rest, str(e))
        except RenderFailed as e:
            self._blame(pack, rest, str(e), self._trust.bad(pack.model, [f.id for f in rest], str(e)))
        except Exception as e:  # the engine has a fault, or the device: only alone is a frame blamed
            log.exception("pack %d failed", pack.id)
            self.device_lost = is_device_error(e)
            self._engines.drop(pack.model)
            blame = self._trust.engine_failed(pack.model, [f.id for f in rest], e)
            self._blame(pack, rest, f"{type(e).__name__}: {e}", blame)
        finally:
            self._leases.drop(pack.id)

    def _render_in_parts(
        self, pack: ClaimedPack, rest: list[ClaimedFrame], last_step: Callable[[], None]
    ) -> None:
        """Render the pack at once, or in smaller parts where memory ran out before; takes from rest what is done."""
        model = self._models[pack.model]
        self._before_loading(model, pack)
        engine = cast(Engine, self._engines.get(model))
        gpu_ms = 0
        while rest:
            size = min(len(rest), self._capacity.frames(rest[0].spec, model))
            part, is_last = rest[:size], size == len(rest)
            try:
                results, ms = self._render_part(pack, part, engine, last_step if is_last else None)
            except OutOfMemory:
                if size == 1:
                    raise
                self._capacity.ran_out(part[0].spec, model, frames=size)
                log.warning("out of memory with %d frames of %s, trying fewer", size, pack.call_key)
                continue
            self._capacity.fitted(part[0].spec, model, frames=size)
            del rest[:size]
            gpu_ms += ms
            reached("rendered")
            if (blame := self._judge(pack, part, results, ms)) is Blame.FRAME:
                self._shelf.put(pack, model, part, results, gpu_ms=gpu_ms)
            else:
                self._blame(pack, [*part, *rest], "no image came out well", blame)
                rest.clear()

    def _judge(
        self, pack: ClaimedPack, part: Sequence[ClaimedFrame], results: list[Pixels | RenderFailed], ms: int
    ) -> Blame:
        """Whose fault the failures among these results are; what came faster than it can is one."""
        measured = self._measured.get(pack.model, Measured())
        if wrong := too_fast(ms / 1000, measured_s=max(measured.seconds(f.spec) for f in part)):
            results[:] = [RenderFailed(wrong)] * len(results)
        if any(not isinstance(r, RenderFailed) for r in results):
            self._trust.good(pack.model)
            return Blame.FRAME
        return self._trust.bad(pack.model, [f.id for f in part], str(results[0]))

    def _render_part(
        self,
        pack: ClaimedPack,
        part: Sequence[ClaimedFrame],
        engine: Engine,
        last_step: Callable[[], None] | None,
    ) -> tuple[list[Pixels | RenderFailed], int]:
        def on_step(done: int, total: int) -> None:
            self._leases.progress(pack.id)
            self._progress.step(pack, done, total)
            gone = self._leases.cancelled(pack.id)
            if self._stop.quitting or self._leases.is_lost(pack.id) or gone >= {f.id for f in pack.frames}:
                raise Cancelled
            if done == total and last_step is not None:
                last_step()

        started = time.monotonic()
        asks = self._inputs.asks(part)
        good = [ask for ask in asks if isinstance(ask, Ask)]
        rendered = iter(engine.render(good, on_step=on_step) if good else [])
        results = [next(rendered) if isinstance(ask, Ask) else ask for ask in asks]
        return results, round(1000 * (time.monotonic() - started))

    # ------------------------------------------------------------------------------------------ step by step

    def _by_steps(
        self, pack: ClaimedPack, until: float, report: "_Paced", *, aside: bool = False
    ) -> ClaimedPack | None:
        """Render a pack and all that joins it. Answers a pack of another model, if its turn came meanwhile.

        aside: while frames of another engine wait; only what is more urgent than they joins.
        """
        model = self._models[pack.model]
        others = (
            [] if aside else [m for n, m in self._models.items() if n != model.name and self._is_sound(n)]
        )
        hands = Hands(
            self.name,
            self._leases,
            self._shelf,
            self._progress,
            self._checkpoints,
            self._stop,
            self._claims,
            self._clerk,
            lambda point: reached(point),  # noqa: PLW0108 - looked up when called
            self._trust,
        )
        claims = Claims(
            self.name,
            model,
            others=others,
            turns=Turns() if aside else self._turns,
            leases=self._leases,
            checkpoints=self._checkpoints,
            ask=self._inputs.ask,
            may=lambda: (
                time.monotonic() < until
                and self._may_claim()
                and self._trust.may(model.name)
                and not self._shelf.is_full(FRAMES_IN_HAND)
            ),
            reached=lambda point: reached(point),  # noqa: PLW0108 - looked up when called
            above=pack.priority - 1 if aside else -1,
        )
        steps = None
        try:
            self._before_loading(model, pack)
            with self._engines.using(model) as engine:
                steps = Steps(
                    model,
                    cast(StepEngine, engine),
                    claims,
                    hands,
                    aside=lambda p: self._aside(p, report),
                    tell=report.add,
                    measured_s=self._measured.get(model.name, Measured()).seconds,
                )
                return steps.run(pack)
        except Misconfigured as e:
            log.error("model %s cannot be loaded: %s", pack.model, e)
            self._trust.cannot_load(pack.model, str(e))
            self._back(pack, pack.frames, str(e))
        except Exception as e:  # the engine has a fault, or the device
            log.exception("step engine of %s failed", pack.model)
            self.device_lost = is_device_error(e)
            self._engines.drop(pack.model)
            if steps is None:
                blame = self._trust.engine_failed(pack.model, [f.id for f in pack.frames], e)
                self._blame(pack, pack.frames, f"{type(e).__name__}: {e}", blame)
        if steps is None:
            self._leases.drop(pack.id)
        return None

    def _aside(self, pack: ClaimedPack, report: "_Paced") -> None:
        """Render a more urgent pack of another model, while the frames in flight wait; not for too long."""
        until = time.monotonic() + settings().parked_s
        if self._models[pack.model].engine == "step":
            self._by_steps(pack, until, report, aside=True)
        else:
            report.add(pack)
            self._render(pack, lambda: None)

    def _is_sound(self, model: str) -> bool:
        return self._trust.may(model)

    def _before_loading(self, model: Model, pack: ClaimedPack) -> None:
        if model.name not in self._engines:
            self._leases.progress(pack.id, next_within_s=settings().frame_limit_s)

    def warm_up(self) -> None:
        """Recall what is known of this worker and its device, and load the pool's first model before there is work.

        Whatever is wrong with it shows when there is.
        """
        try:
            self._recall()
            first = next(iter(self._models.values()))
            if self._trust.may(first.name):
                self._engines.get(first)
        except FarmError as e:
            log.warning("not loaded yet: %s", e)

    def _recall(self) -> None:
        device = gpu.describe()
        self._measured = recall(self._models.values(), device=device.name)
        for name, measured in self._measured.items():
            self._models[name] = measured.capped(self._models[name], memory_bytes=device.memory_bytes)
        needs = {name: measured.need_bytes for name, measured in self._measured.items()}
        self._engines = Engines(self._device, memory_bytes=device.memory_bytes, needs=needs)
        self._trust.remember(remembered(self.name))

    # ------------------------------------------------------------------------------------------ trust

    def _blame(self, pack: ClaimedPack, frames: Sequence[ClaimedFrame], reason: str, blame: Blame) -> None:
        """Give frames back: as failed if it may be their fault, as they were if it is the model's or the device's."""
        if blame is Blame.FRAME:
            self._fail(pack, frames, reason)
        else:
            self._back(pack, frames, f"the {blame} is to blame: {reason}")

    def _try_model(self, name: str) -> str:
        """Say what is wrong with a plain image of a model; "" if it comes out well."""
        from workers.engine.plain import what_is_wrong

        try:
            return what_is_wrong(self._engines.get(self._models[name]), self._models[name])
        except Exception as e:  # the frames it is asked about still have to go back
            return f"{type(e).__name__}: {e}"

    def _tell_ailment(self, ailment: Ailment) -> None:
        try:
            note(self.name, ailment)
        except Exception as e:  # the database is away: this process knows, and that is what counts
            log.warning("not noted that %s is set aside: %s", ailment.model or "the device", e)

    def _back(self, pack: ClaimedPack, frames: Sequence[ClaimedFrame], why: str) -> None:
        log.info("giving back %d frames of pack %d: %s", len(frames), pack.id, why)
        named = [f.id for f in frames]
        book(lambda db: queue.release(db, [pack.id], frames=named), give_up=self._stop.quit)

    def _fail(self, pack: ClaimedPack, frames: Sequence[ClaimedFrame], reason: str) -> None:
        log.warning("%d frames of pack %d failed: %s", len(frames), pack.id, reason)
        named = [f.id for f in frames]
        book(lambda db: queue.fail(db, pack.id, reason, frames=named), give_up=self._stop.quit)
