"""A token in, a burst of packs out: claim, render, and hand on to the shelf, until there is no work.

While one pack is on the device the one before is encoded, stored and settled; the next is claimed at the
running one's last step, beside its decoding, and not sooner: the device does not wait, and an urgent frame
still gets the very next pack.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from farm import queue, tokens
from farm.catalog import Model, PackLimit
from farm.errors import FarmError, Misconfigured, OutOfMemory, RenderFailed
from farm.ids import public
from farm.queue import ClaimedFrame, ClaimedPack
from farm.settings import settings
from farm.storage import open_store
from workers.books import book
from workers.encode import engine_of
from workers.engine import Ask, Cancelled, Engine, Pixels, open_engine
from workers.gpu import Capacity, release
from workers.leases import Leases
from workers.progress import Progress
from workers.shelf import Shelf

log = logging.getLogger(__name__)

PACKS_IN_HAND = 3  # on the shelf at once: more means that the store or the database cannot follow
BROKEN_S = 60.0  # a model whose checkpoint would not load is not claimed for this long


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


class Worker:
    """One process on one device: its engines, its leases and its shelf."""

    def __init__(self, name: str, *, pool: str, models: Sequence[Model], device: str) -> None:
        self.name = name
        self.pool = pool
        self._models = {m.name: m for m in models}
        self._device = device
        self._engines: dict[str, Engine] = {}
        self._broken: dict[str, float] = {}  # model → monotonic time it may be tried again
        self._capacity = Capacity()
        self._draining = threading.Event()
        self._quit = threading.Event()
        self._aged_last = False
        self.device_lost = False
        self._leases = Leases(name)
        self._progress = Progress()
        self._claims = ThreadPoolExecutor(1, thread_name_prefix="claim")
        self._shelf = Shelf(
            open_store(settings().storage_url.get_secret_value()),
            self._leases,
            reached=lambda point: reached(point),  # noqa: PLW0108 - looked up when called
            quit_now=self._quit,
        )

    # ------------------------------------------------------------------------------------------ shutdown

    def drain(self) -> None:
        """Claim no more; what is in hand may be finished within the grace. The second time: give it back now."""
        if self._draining.is_set():
            self._quit.set()
            return
        self._draining.set()
        grace = threading.Timer(settings().grace_s, self._quit.set)
        grace.daemon = True
        grace.start()

    @property
    def draining(self) -> bool:
        return self._draining.is_set()

    # ------------------------------------------------------------------------------------------ the burst

    def burst(self, tell: Callable[[Report], None]) -> Report:
        """Claim pack after pack until there is no work, the time is up or the worker drains."""
        report, until = Report(self.pool), time.monotonic() + settings().burst_s
        pack = self._claim()
        while pack is not None:
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

    def _why_over(self, until: float) -> str:
        if self.device_lost:
            return "device lost"
        if self._draining.is_set():
            return "drained"
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
        if self._leases.drain.is_set() and not self._draining.is_set():
            self.drain()
        if self._draining.is_set():
            return None
        now = time.monotonic()
        limits = {n: m.pack for n, m in self._models.items() if self._broken.get(n, 0) <= now}
        pack = book(lambda db: self._claim_in(db, limits), give_up=self._draining)
        if pack is None:
            return None
        self._aged_last = pack.aged
        self._leases.hold(pack.id)
        reached("claimed")
        if pack.full:
            tokens.wake([pack.model])  # there may be more than this worker can take
        return pack

    def _claim_in(self, db: Session, limits: dict[str, PackLimit]) -> ClaimedPack | None:
        # every other pack at most is an aged lane's: ageing bounds a wait, it does not undo the classes
        return queue.claim_pack(
            db,
            models=list(limits),
            worker=self.name,
            limits=limits,
            ageing=not self._aged_last,
            engines={name: engine_of(self._models[name]) for name in limits},
        )

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
            self._broken[pack.model] = time.monotonic() + BROKEN_S
            self._back(pack, rest, str(e))
        except RenderFailed as e:
            self._fail(pack, rest, str(e))
        except Exception as e:  # the engine has a fault, or the device: only alone is a frame blamed
            log.exception("pack %d failed", pack.id)
            self.device_lost = _is_device_error(e)
            self._engines.pop(pack.model, None)
            release()
            self._fail(pack, rest, f"{type(e).__name__}: {e}")
        finally:
            self._leases.drop(pack.id)

    def _render_in_parts(
        self, pack: ClaimedPack, rest: list[ClaimedFrame], last_step: Callable[[], None]
    ) -> None:
        """Render the pack at once, or in smaller parts where memory ran out before; takes from rest what is done."""
        model = self._models[pack.model]
        engine = self._engine(model, pack)
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
            self._shelf.put(pack, model, part, results, gpu_ms=gpu_ms)

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
            if self._quit.is_set() or self._leases.is_lost(pack.id) or gone >= {f.id for f in pack.frames}:
                raise Cancelled
            if done == total and last_step is not None:
                last_step()

        started = time.monotonic()
        results = engine.render([Ask(f.spec, f.seed) for f in part], on_step=on_step)
        return results, round(1000 * (time.monotonic() - started))

    def _engine(self, model: Model, pack: ClaimedPack | None = None) -> Engine:
        if model.name not in self._engines:
            if pack is not None:
                self._leases.progress(pack.id, next_within_s=settings().frame_limit_s)
            started = time.monotonic()
            self._engines[model.name] = open_engine(model, device=self._device)
            log.info("loaded %s in %.1f s", model.name, time.monotonic() - started)
        return self._engines[model.name]

    def warm_up(self) -> None:
        """Load the pool's first model before there is work; whatever is wrong with it shows when there is."""
        try:
            self._engine(next(iter(self._models.values())))
        except FarmError as e:
            log.warning("not loaded yet: %s", e)

    def _back(self, pack: ClaimedPack, frames: Sequence[ClaimedFrame], why: str) -> None:
        log.info("giving back %d frames of pack %d: %s", len(frames), pack.id, why)
        named = [f.id for f in frames]
        book(lambda db: queue.release(db, [pack.id], frames=named), give_up=self._quit)

    def _fail(self, pack: ClaimedPack, frames: Sequence[ClaimedFrame], reason: str) -> None:
        log.warning("%d frames of pack %d failed: %s", len(frames), pack.id, reason)
        named = [f.id for f in frames]
        book(lambda db: queue.fail(db, pack.id, reason, frames=named), give_up=self._quit)


def _is_device_error(error: Exception) -> bool:
    """Whether the CUDA context is lost with this: every later call would fail, on whatever frame."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
