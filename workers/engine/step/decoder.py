"""The end of a frame in the step engine: its latents become an image, one frame at a time.

Memory peaks in the decoder, which gains nothing from a batch. Beside means: on a CUDA stream of its own, while the next
forward runs; the image leaves with the tick of that forward.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from farm.errors import RenderFailed
from workers.engine import Pixels
from workers.engine.faults import judge
from workers.engine.step.families.family import Family
from workers.engine.step.pick import URGENT
from workers.engine.step.record import Record

T = TypeVar("T")


class Tried(Protocol):
    """Does one frame's work, again if memory ran out, and returns what came of it or why it failed."""

    def __call__(self, make: Callable[[], T]) -> T | RenderFailed: ...


@dataclass(frozen=True, slots=True)
class Begun:
    """A frame that the other stream has in hand."""

    record: Record
    image: torch.Tensor | RenderFailed  # written to until the stream is waited for


class Decoder:
    """The frames that ended and are in flight still."""

    def __init__(self, family: Family, *, beside: bool, tried: Tried, seconds: Callable[[], float]) -> None:
        """seconds: now, with what was asked of the device done."""
        self._family = family
        self._tried = tried
        self._seconds = seconds
        self._waiting: list[Record] = []
        self._begun: list[Begun] = []
        self.beside = beside
        # without a stream it is only later: for tests
        self._stream = torch.cuda.Stream() if beside else None  # type: ignore[no-untyped-call]

    def add(self, record: Record) -> None:
        self._waiting.append(record)

    def drop(self, records: Collection[Record]) -> None:
        self._waiting = [r for r in self._waiting if r not in records]
        self._begun = [b for b in self._begun if b.record not in records]

    def turn(self, *, urgent: bool, alone: bool) -> list[tuple[Record, Pixels | RenderFailed, float]]:
        """The images that are there after a tick, and the seconds that each took the device for itself.

        urgent: an urgent frame is in flight, so one other is decoded. alone: no forward follows to be beside.
        """
        done = self._finished()
        for record in self._next(urgent=urgent):
            if self.beside:
                self._begin(record)
            else:
                done.append(self._at_once(record))
        return done + self._finished() if alone else done

    def _next(self, *, urgent: bool) -> list[Record]:
        turn = sorted(self._waiting, key=lambda r: (-r.priority, r.arrival))
        others = [r for r in turn if r.priority < URGENT]
        taken = [r for r in turn if not (urgent and r in others[1:])]
        self._waiting = [r for r in turn if r not in taken]
        return taken

    def _at_once(self, record: Record) -> tuple[Record, Pixels | RenderFailed, float]:
        started = self._seconds()
        result = self._tried(lambda: judge(self._family.decode(record)))
        return record, result, self._seconds() - started

    def _begin(self, record: Record) -> None:
        if self._stream is None:
            self._begun.append(Begun(record, self._tried(lambda: self._family.decode(record))))
            return
        self._stream.wait_stream(torch.cuda.current_stream())  # the latents are written by then
        with torch.cuda.stream(self._stream):
            image = self._tried(lambda: self._family.decode(record))
        self._begun.append(Begun(record, image))

    def _finished(self) -> list[tuple[Record, Pixels | RenderFailed, float]]:
        """What the other stream had in hand, once it has done that."""
        begun, self._begun = self._begun, []
        if begun and self._stream is not None:
            self._stream.synchronize()
        return [(b.record, self._judged(b.image), 0.0) for b in begun]

    def _judged(self, image: torch.Tensor | RenderFailed) -> Pixels | RenderFailed:
        return image if isinstance(image, RenderFailed) else self._tried(lambda: judge(image))
