"""Who shares the next forward: by priority and arrival, within a cap of rows, and in turns between shapes."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from farm.catalog import Model
from farm.spec import PRIORITIES, Priority

URGENT = PRIORITIES[Priority.URGENT]
BUCKETS = (2, 4, 6, 8, 12, 16, 24, 32)  # row counts that are compiled or proved bit-equal
STRICT_ROWS = 8  # of every forward of frames that ask for the same bits whatever their neighbours
GROW_AFTER = 100  # full ticks in a row before two more rows are tried


class Waiting(Protocol):
    """What the choice reads of a frame."""

    shape: Hashable
    rows: int
    priority: int
    arrival: int
    waiting_since: float
    strict: bool

    @property
    def pixels(self) -> int: ...


Frame = TypeVar("Frame", bound=Waiting)


def bucket(rows: int) -> int:
    """The smallest bucket that takes these rows; beyond the last, multiples of it."""
    last = BUCKETS[-1]
    return next((b for b in BUCKETS if b >= rows), -(-rows // last) * last)


@dataclass(slots=True)
class _Learned:
    rows: int
    full_ticks: int = 0  # in a row since the last change


class Caps:
    """How many rows of a shape go through at once: by the catalog, by memory, by the knee.

    The catalog's pack limit says what fits into memory; where it ran out, less was learned. The knee is the work
    of a tick, in pixels × rows, at which a device is nearly as fast as it gets: more would only make an urgent
    frame wait.
    """

    def __init__(self, model: Model) -> None:
        self._pack = model.pack
        self._rows_a_frame = model.guided_rows
        self._learned: dict[int, _Learned] = {}  # by the pixels of an image

    def rows(self, pixels: int, rows: int, *, urgent: bool, strict: bool) -> int:
        """Rows of the next forward of frames with so many pixels; at least the rows of one frame."""
        cap = self._catalog(pixels)
        if learned := self._learned.get(pixels):
            cap = min(cap, learned.rows)
        if strict:
            cap = min(cap, self.strict_rows(pixels))
        elif urgent and self._pack.knee is not None:
            cap = min(cap, self._pack.knee // pixels)
        return max(cap, rows)

    def strict_rows(self, pixels: int) -> int:
        """The one row count of strict frames of a size: the same on every worker, whatever it learned."""
        limit = min(STRICT_ROWS, self._catalog(pixels))
        return max((b for b in BUCKETS if b <= limit), default=BUCKETS[0])

    def ran_out(self, pixels: int, *, rows: int) -> None:
        """Halve the cap: this many rows ran out of memory."""
        self._learned[pixels] = _Learned(max(1, min(rows, self._catalog(pixels)) // 2))

    def fitted(self, pixels: int, *, rows: int) -> None:
        """Count a tick that fitted; after GROW_AFTER full ones try two rows more."""
        learned = self._learned.get(pixels)
        if learned is None or rows < learned.rows - 1:
            return
        learned.full_ticks += 1
        if learned.full_ticks >= GROW_AFTER:
            learned.rows, learned.full_ticks = learned.rows + 2, 0
        if learned.rows >= self._catalog(pixels):
            del self._learned[pixels]

    def _catalog(self, pixels: int) -> int:
        return min(self._pack.rows, max(1, self._pack.pixels // pixels) * self._rows_a_frame)


@dataclass
class Picker:
    """Chooses the frames of each tick."""

    caps: Caps
    ageing_s: float
    _served: dict[Hashable, int] = field(default_factory=dict)  # shape → pixels × rows it was given
    _aged_last: bool = False

    def pick(self, frames: Sequence[Frame], now: float) -> list[Frame]:
        """The frames of the next forward, all of one shape, the most urgent first.

        Shapes of the highest class present take turns by the work they were served. A frame that was not picked
        for the ageing time comes first, whatever its class, but not in two ticks in a row.
        """
        if not frames:
            return []
        aged = set() if self._aged_last else {id(f) for f in frames if now - f.waiting_since >= self.ageing_s}
        order = sorted(frames, key=lambda f: (id(f) not in aged, -f.priority, f.arrival))
        self._aged_last = bool(aged)
        head = order[0] if aged else self._turn([f for f in order if f.priority == order[0].priority], frames)
        return self.fill(head, order)

    def fill(self, head: Frame, order: Sequence[Frame]) -> list[Frame]:
        """Head and those of its shape that fit beside it, in this order."""
        urgent = any(f.priority >= URGENT for f in order)
        cap = self.caps.rows(head.pixels, head.rows, urgent=urgent, strict=head.strict)
        picked, rows = [head], head.rows
        for frame in order:
            if frame is not head and frame.shape == head.shape and rows + frame.rows <= cap:
                picked.append(frame)
                rows += frame.rows
        return picked

    def charge(self, picked: Sequence[Waiting], now: float) -> None:
        """Note that these had their forward."""
        shape = picked[0].shape
        self._served[shape] = self._served.get(shape, 0) + sum(f.rows * f.pixels for f in picked)
        for frame in picked:
            frame.waiting_since = now

    def _turn(self, top: Sequence[Frame], frames: Sequence[Frame]) -> Frame:
        """The first frame of the shape that was served least; a shape that comes starts at the lowest."""
        present = {f.shape for f in frames}
        known = [served for shape, served in self._served.items() if shape in present]
        least = min(known, default=0)
        self._served = {shape: self._served.get(shape, least) for shape in present}
        return min(top, key=lambda f: self._served[f.shape])
