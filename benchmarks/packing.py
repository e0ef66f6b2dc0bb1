"""What packing brings: the farm against one plain Celery task an image, on the same pipeline, a thread each.

The farm gets 200 requests of one image each, from four accounts, all queued at once, of equal shape and settings:
with the starter model (latents of 16 by 16), and with a random UNet of 1 M parameters on latents of 8 by 8,
where one forward is small, as it is on a GPU. The farm's time runs from the first claim to the last settle,
Celery's from the first task's start to the last one's end. A bare loop, one image a call, proves the baseline:
Celery has to reach 0.9 of it.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from uuid import UUID

from benchmarks import harness
from benchmarks.harness import Target, say
from benchmarks.plain.loop import bare, calls_of, one_at_a_time
from benchmarks.plain.tasks import plain_celery
from farm import pricing
from farm.accounts import Caller
from farm.catalog import BUILTIN, catalog
from farm.db import transaction
from farm.settings import settings

RANDOM = "random-1m"
TARGETS = [
    Target("starter_farm_of_celery", at_least=1.5),
    Target("random_1m_farm_of_celery", at_least=2.5),
    Target("starter_celery_of_bare_loop", at_least=0.9),
    Target("random_1m_celery_of_bare_loop", at_least=0.9),
]
WARM_UP = 16  # images
ENTRY = """
[models.random-1m]
title = "random weights"
family = "sd"
engine = "pipe"
packs_by = "call"
free = ["guidance"]
source = "dir:{checkpoint}"
revision = "random"
licence = "none"
dtype = "float32"
side = {{ min = 64, max = 64, multiple = 8, default = 64 }}
steps = {{ min = 1, max = 100, default = 20 }}
guidance = {{ min = 0.0, max = 30.0, default = 4.0 }}
sampler = "dpm++2m"
pack = {{ frames = 16, pixels = 131072 }}
pool = "random-1m"
price = {{ method = "image", rate = "0.001", currency = "USD" }}
"""


@dataclass(frozen=True)
class Size:
    """Images measured a round. The baselines' rates need fewer, and stay close in time to the farm's."""

    rounds: int
    farm: int
    celery: int
    bare: int


QUICK = {"starter": Size(2, 16, 4, 4), RANDOM: Size(2, 64, 10, 10)}
FULL = {"starter": Size(3, 200, 60, 60), RANDOM: Size(5, 200, 60, 60)}


@dataclass
class Measured:
    """One entry a round."""

    farm_images_per_s: list[float] = field(default_factory=list)
    celery_images_per_s: list[float] = field(default_factory=list)
    bare_images_per_s: list[float] = field(default_factory=list)

    def add(self, farm: float, celery: float, bare: float) -> str:
        """Note a round's images a second. Returns them as text."""
        self.farm_images_per_s.append(farm)
        self.celery_images_per_s.append(celery)
        self.bare_images_per_s.append(bare)
        return f"{farm:.2f} images/s, Celery {celery:.2f}, bare loop {bare:.2f}"

    def figures(self, prefix: str) -> dict[str, float]:
        celery = self.celery_images_per_s
        figures = {
            "farm_of_celery": harness.ratio(self.farm_images_per_s, celery),
            "celery_of_bare_loop": harness.ratio(celery, self.bare_images_per_s),
            **{name: median(values) for name, values in vars(self).items()},
        }
        return {f"{prefix}_{name}": value for name, value in figures.items()}


def main() -> int:
    options = harness.options(__doc__)
    sizes = QUICK if options.quick else FULL
    figures: dict[str, float] = {}
    with harness.services() as folder:
        _add_random(folder)
        owners = harness.callers(4)
        for model, size in sizes.items():
            measured = _compare(model, owners, folder, size)
            figures |= measured.figures(model.replace("-", "_"))
    return harness.report("packing", figures, TARGETS)


def _add_random(folder: Path) -> None:
    """Save the random model's checkpoint, and add it to the catalog beside the starter."""
    from tests.tiny import tiny_sd

    checkpoint = tiny_sd(folder / RANDOM, block_out_channels=(32, 64))
    path = folder / "catalog.toml"
    path.write_text((settings().catalog or BUILTIN).read_text() + ENTRY.format(checkpoint=checkpoint))
    os.environ["FARM_CATALOG"] = str(path)
    harness.forget()
    with transaction() as db:
        pricing.sync(db, catalog())


def _compare(model: str, owners: Sequence[Caller], folder: Path, size: Size) -> Measured:
    measured = Measured()
    with (
        plain_celery(model, folder) as celery,  # loads while the others do
        bare(model, log=folder / "bare.log") as loop,
        harness.farm(folder, model),
    ):
        calls = one_at_a_time(calls_of(_farm(model, owners, WARM_UP)))  # what the farm made, for the others
        celery.seconds(calls[:2])
        loop.seconds(calls[:2])
        say(f"{model}: warm")
        for _ in range(size.rounds):
            farm_s = harness.worker_seconds(_farm(model, owners, size.farm))
            celery_s = celery.seconds(list(islice(cycle(calls), size.celery)))
            bare_s = loop.seconds(list(islice(cycle(calls), size.bare)))
            say(f"{model}: {measured.add(size.farm / farm_s, size.celery / celery_s, size.bare / bare_s)}")
    return measured


def _farm(model: str, owners: Sequence[Caller], images: int) -> list[UUID]:
    accepted = harness.submit(harness.requests(owners, {"model": model}, frames=images, a_job=1))
    harness.finish(accepted)
    return accepted


if __name__ == "__main__":
    sys.exit(main())
