"""The step engine: each tick is one denoiser forward for frames of any settings, picked anew.

Nothing of a frame changes before its forward and its sampler's step have returned, so a tick that ran out of
memory is simply done again with fewer rows.
"""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from itertools import count
from typing import Self, TypeVar
from uuid import UUID

import torch

from farm.catalog import Model
from farm.errors import OutOfMemory, RenderFailed
from farm.settings import settings
from farm.spec import Spec, shape_key
from workers.engine import Ask, Pixels, Tick
from workers.engine.faults import failure, is_lost, is_out_of_memory
from workers.engine.loading import load
from workers.engine.step import families, saved
from workers.engine.step.batch import Batch
from workers.engine.step.decoder import Decoder
from workers.engine.step.families.family import Family
from workers.engine.step.pick import URGENT, Caps, Picker, bucket
from workers.engine.step.preview import Previews
from workers.engine.step.record import Record, Stepped
from workers.gpu import release

log = logging.getLogger(__name__)

T = TypeVar("T")
TRIES_ALONE = 2  # a frame that runs out of memory by itself so often fails


class StepLoop:
    """One checkpoint, and the frames in flight on it."""

    def __init__(
        self,
        family: Family,
        *,
        ageing_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.family = family
        self.model = family.model
        self.device = family.device
        self.padded = family.device == "cuda" and family.model.speed.compile  # to row buckets
        self._flight: dict[UUID, Record] = {}
        self._parked: list[UUID] = []
        self._done: dict[UUID, Pixels | RenderFailed] = {}  # of this tick
        self._caps = Caps(self.model)
        self._picker = Picker(self._caps, ageing_s)
        self._previews = Previews(family)
        self.decoder = Decoder(
            family,
            beside=family.device == "cuda" and family.model.speed.decode_beside,
            tried=self._tried,
            seconds=self._seconds,
        )
        self._batch: Batch | None = None
        self._arrivals = count()
        self._clock = clock

    @classmethod
    def open(cls, model: Model, *, device: str) -> Self:
        families.check(model)
        pipe = load(model, device=device)
        return cls(families.family(pipe, model, device=device), ageing_s=settings().ageing_s)

    # ------------------------------------------------------------------------------------------ in and out

    @property
    def frames(self) -> Collection[UUID]:
        return self._flight.keys()

    @property
    def parked(self) -> Collection[UUID]:
        return [frame for frame in self._parked if frame in self._flight]

    def add(self, frame: UUID, ask: Ask, *, priority: int, saved: bytes | None = None) -> None:
        if frame in self._flight:
            self._flight[frame].priority = priority
            return
        started = self._seconds()
        record = self._begun(frame, ask, saved)
        record.priority, record.arrival = priority, next(self._arrivals)
        record.waiting_since = self._clock()
        record.owed_s = self._seconds() - started
        self._flight[frame] = record
        if record.ended:
            self.decoder.add(record)

    @torch.inference_mode()
    def _begun(self, frame: UUID, ask: Ask, state: bytes | None) -> Record:
        record = self._tried(lambda: self.family.begin(frame, ask))
        if isinstance(record, RenderFailed):
            raise record
        return record if state is None else self._resumed(record, state)

    def _resumed(self, record: Record, state: bytes) -> Record:
        """A frame where it was saved, or at its first step if that does not fit."""
        later, make = record, record.following
        if make is not None and saved.stage(state) > record.stage:  # its image so far is in the state
            record.index, first = len(record.times), record.index
            made = self._tried(lambda: make(record))
            record.index = first
            later = record if isinstance(made, RenderFailed) or made.after is not None else made
        if saved.restore(later, state, self.model):
            return later
        log.info("the saved state of frame %s does not fit: it starts over", record.frame)
        return record

    def _tried(self, make: Callable[[], T]) -> T | RenderFailed:
        """What one frame's work comes to, or why it failed; without memory it is tried twice.

        Raises what says that the device is lost.
        """
        failed = RenderFailed()
        for _ in range(TRIES_ALONE):
            try:
                return make()
            except RenderFailed as e:
                return e
            except Exception as e:
                if is_lost(e):
                    raise
                failed = failure(e)
            if not isinstance(failed, OutOfMemory):
                break
            self._release()
        return failed

    def _release(self) -> None:
        """Give back what memory is not needed for the frames themselves."""
        self._batch = None
        self.family.text.clear()
        release()

    def drop(self, frames: Collection[UUID]) -> None:
        gone = [record for frame in frames if (record := self._flight.pop(frame, None))]
        if gone:
            self.decoder.drop(gone)
        if not self._flight:
            self._batch = None

    def room(self, spec: Spec) -> int:
        rows = self.family.rows(spec)
        height, width = self.family.size(spec)
        urgent = any(r.priority >= URGENT for r in self._flight.values())
        live = [r for r in self._flight.values() if not r.ended]
        taken = sum(r.rows / self._caps.rows(r.pixels, r.rows, urgent=urgent, strict=r.strict) for r in live)
        strict = spec.reproducible == "strict"
        cap = self._caps.rows(height * width, rows, urgent=urgent, strict=strict)
        return max(0, int((1 - taken) * cap / rows + 1e-9))

    def save(self, frame: UUID) -> bytes | None:
        record = self._flight.get(frame)
        state = None if record is None else self._tried(lambda: saved.dump(record, self.model))
        return None if isinstance(state, RenderFailed) else state

    @torch.inference_mode()
    def preview(self, frame: UUID) -> Pixels | None:
        record = self._flight.get(frame)
        if record is None or not record.steps[0]:
            return None
        try:
            return self._previews.of(record)
        except Exception as e:
            if not is_out_of_memory(e):
                raise
        release()
        return None

    # ------------------------------------------------------------------------------------------ the tick

    @torch.inference_mode()
    def tick(self) -> Tick:
        self._done = {}
        started = self._seconds()
        picked = self._advance()
        forward_s = self._seconds() - started
        rows = sum(r.rows for r in picked)
        shares = {r.frame: forward_s * r.rows / rows + r.told() for r in picked}
        steps = {r.frame: r.steps for r in picked}
        name = shape_key(picked[0].ask.spec, self.model) if picked else ""
        self._pass_on(picked)
        self._leave(shares)
        return Tick(name, rows, steps, self._done, sum(shares.values()), shares)

    def _advance(self) -> list[Record]:
        """Bring the picked frames a step on; with fewer of them again when memory runs out."""
        live = [r for r in self._flight.values() if not r.ended]
        picked = self._picker.pick(live, self._clock())
        while picked:
            try:
                stepped = self._stepped(picked)
            except Exception as e:
                if not is_out_of_memory(e):
                    raise
                no_memory = failure(e)
            else:
                break
            picked = self._fewer(picked, no_memory)
        if not picked:
            return []
        for one in stepped:
            one.commit()
        self._caps.fitted(picked[0].pixels, rows=sum(r.rows for r in picked))
        picked = [one.record for one in stepped]  # without those that failed
        if picked:
            self._picker.charge(picked, self._clock())
        chosen = {r.frame for r in picked}
        self._parked = [r.frame for r in live if r.frame not in chosen]
        return picked

    def _stepped(self, picked: Sequence[Record]) -> list[Stepped]:
        """A forward, and each frame's own step; a frame that breaks is done with its failure."""
        stepped = []
        for record, predicted in self._predicted(picked):
            try:
                stepped.append(record.step(predicted))
            except Exception as e:
                if is_lost(e) or is_out_of_memory(e):
                    raise
                self._end(record, failure(e))
        return stepped

    def _predicted(self, picked: Sequence[Record]) -> list[tuple[Record, torch.Tensor]]:
        try:
            return self._forward(picked)
        except Exception as e:
            if is_lost(e) or is_out_of_memory(e) or len(picked) == 1:
                raise
            broken = e
        return self._each_alone(picked, broken)

    def _each_alone(self, picked: Sequence[Record], broken: Exception) -> list[tuple[Record, torch.Tensor]]:
        """Find whose inputs broke a forward. Raises what broke it if every frame does."""
        good, failed = [], []
        for record in picked:
            try:
                good += self._forward([record])
            except Exception as e:
                if is_lost(e) or is_out_of_memory(e):
                    raise
                failed.append((record, failure(e)))
        if not good:
            raise broken
        for record, why in failed:
            self._end(record, why)
        return good

    def _forward(self, picked: Sequence[Record]) -> list[tuple[Record, torch.Tensor]]:
        if self._batch is None or not self._batch.is_of(picked):
            self._batch = None  # its memory first
            self._batch = Batch(picked, padded=self._padded_rows(picked), device=self.device)
        batch = self._batch
        predicted = batch.guided(self.family.denoise(batch.inputs()))
        return list(zip(picked, predicted, strict=True))

    def _padded_rows(self, picked: Sequence[Record]) -> int:
        if picked[0].strict:
            return self._caps.strict_rows(picked[0].pixels)
        return bucket(sum(r.rows for r in picked)) if self.padded else 0

    def _fewer(self, picked: Sequence[Record], no_memory: RenderFailed) -> list[Record]:
        """Halve the cap, and name the frames of the next try: none, once a frame ran out by itself too often."""
        self.family.loras.keep([record.ask for record in self._flight.values()])
        self._release()
        picked = [r for r in picked if r.frame in self._flight]
        rows = sum(r.rows for r in picked)
        if len(picked) > 1:
            self._caps.ran_out(picked[0].pixels, rows=rows)
            log.warning("out of memory with %d rows of %s: trying fewer", rows, picked[0].shape)
            return self._picker.fill(picked[0], picked)
        for record in picked:
            record.ran_out_alone += 1
            if record.ran_out_alone >= TRIES_ALONE:
                self._end(record, no_memory)
                return []
        return picked

    # ------------------------------------------------------------------------------------------ the end of a frame

    def _pass_on(self, picked: Sequence[Record]) -> None:
        """Give frames that ended their next pass, or their turn at the decoder."""
        for record in picked:
            if not record.ended:
                continue
            if record.following is None:
                self.decoder.add(record)
            else:
                self._follow(record)

    def _follow(self, record: Record) -> None:
        assert record.following is not None
        make, started = record.following, self._seconds()
        following = self._tried(lambda: make(record))
        if isinstance(following, RenderFailed):
            self._end(record, following)
            return
        following.priority, following.arrival = record.priority, record.arrival
        following.waiting_since = self._clock()
        following.owed_s = self._seconds() - started
        self._flight[record.frame] = following

    def _leave(self, shares: dict[UUID, float]) -> None:
        """Decode frames that ended, and add what that took to their shares.

        While an urgent frame runs one other a tick has to do: it would wait for them.
        """
        urgent = any(r.priority >= URGENT for r in self._flight.values())
        alone = all(r.ended for r in self._flight.values())
        for record, result, seconds in self.decoder.turn(urgent=urgent, alone=alone):
            self._end(record, result)
            shares[record.frame] = shares.get(record.frame, 0.0) + seconds

    def _end(self, record: Record, result: Pixels | RenderFailed) -> None:
        self.drop([record.frame])
        self._done[record.frame] = result

    def _seconds(self) -> float:
        """Now, with all that was asked of the device done; what is decoded beside it aside."""
        if self.device == "cuda":
            torch.cuda.current_stream().synchronize()
        return time.perf_counter()
