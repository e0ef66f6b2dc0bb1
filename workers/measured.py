"""What verify measured on a device like this one, and what follows from it: first caps, memory needs, a least time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import select

from farm.catalog import Model
from farm.db import transaction
from farm.spec import Spec
from farm.tables import Measurement
from workers.engines import USABLE


@dataclass(frozen=True, slots=True)
class Size:
    """One frame of a size, and two."""

    width: int
    height: int
    steps: int
    seconds: float
    resident_bytes: int
    peak_bytes: int
    peak_two_bytes: int | None

    def frames_in(self, memory_bytes: int) -> int:
        """How many of these fit; each more takes what the second took beside the first."""
        each = (self.peak_two_bytes or 0) - self.peak_bytes
        room = USABLE * memory_bytes - self.peak_bytes
        if self.peak_two_bytes is None or room < 0:
            return 1
        return 1 + int(room / each) if each > 0 else 1_000_000


@dataclass(frozen=True)
class Measured:
    """A model's sizes, as they were measured."""

    sizes: Sequence[Size] = ()

    @property
    def need_bytes(self) -> int:
        """What it takes at its peak with one frame."""
        return max((s.peak_bytes for s in self.sizes), default=0)

    def seconds(self, spec: Spec) -> float:
        """How long one frame like this takes at least; 0 if its size was not measured, or it has inputs."""
        if spec.inputs or spec.loras:
            return 0.0
        for size in self.sizes:
            if (size.width, size.height) == (spec.width, spec.height):
                return size.seconds / size.steps * min(spec.steps, size.steps)
        return 0.0

    def capped(self, model: Model, *, memory_bytes: int) -> Model:
        """The model with a pack limit that fits this memory: the catalog's, or less."""
        fits = [(s.frames_in(memory_bytes), s.width * s.height) for s in self.sizes]
        if not fits:
            return model
        one = max(pixels for _, pixels in fits)  # a frame of any size is tried
        pixels = max(one, min(frames * pixels for frames, pixels in fits))
        frames = max(frames for frames, _ in fits)
        limit = model.pack.model_copy(
            update={
                "pixels": min(model.pack.pixels, pixels),
                "frames": min(model.pack.frames, frames),
            }
        )
        return model.model_copy(update={"pack": limit})


def recall(models: Iterable[Model], *, device: str) -> dict[str, Measured]:
    """Read what was measured of these models, as they are now, on a device of this name.

    Raises DatabaseAway.
    """
    found: dict[str, Measured] = {}
    with transaction() as db:
        for model in models:
            rows = db.scalars(
                select(Measurement).where(
                    Measurement.model == model.name,
                    Measurement.revision == model.revision,
                    Measurement.precision == model.precision,
                    Measurement.device == device,
                )
            )
            sizes = [
                Size(r.width, r.height, r.steps, r.seconds, r.resident_bytes, r.peak_bytes, r.peak_two_bytes)
                for r in rows
            ]
            if sizes:
                found[model.name] = Measured(sizes)
    return found
