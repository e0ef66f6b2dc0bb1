"""What packing brings: the farm against one plain Celery task an image, on the same pipeline, one thread each.

200 requests of one image each from four accounts, all queued at once, of equal shape and settings: with the
starter model (latents of 16 by 16), and with a random UNet of 1 M parameters on latents of 8 by 8, where one
row leaves a CPU idle as a large model's row at 512 by 512 leaves a GPU. The farm's time runs from the first claim to the
last settle, Celery's from the first task's start to the last one's end. A bare loop, one image a call,
proves the baseline: Celery has to reach 0.9 of it.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks import harness
from benchmarks.bare import Bare, Call, bare, calls_of, one_at_a_time
from benchmarks.harness import Target, say
from benchmarks.plain_celery import Plain, plain_celery
from farm.accounts import Caller
from farm.catalog import catalog

RANDOM = "random-1m"
TARGETS = [
    Target("starter_farm_of_celery", at_least=1.5),
    Target("random_1m_farm_of_celery", at_least=2.5),
    Target("starter_celery_of_bare_loop", at_least=0.9),
    Target("random_1m_celery_of_bare_loop", at_least=0.9),
]
WARM_UP = 16  # images


@dataclass(frozen=True)
class Size:
    """How much is measured a round: images of the farm, and of each baseline, which takes longer for one."""

    rounds: int
    farm: int
    celery: int
    bare: int


@dataclass
class Measured:
    """One entry a round."""

    farm_images_per_s: list[float] = field(default_factory=list)
    celery_images_per_s: list[float] = field(default_factory=list)
    bare_images_per_s: list[float] = field(default_factory=list)

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
    with harness.services() as folder:
        _add_random(folder)
        owners = harness.callers(4)
        quick = {"starter": Size(1, 24, 8, 4), RANDOM: Size(1, 96, 24, 8)}
        full = {"starter": Size(3, 200, 200, 40), RANDOM: Size(3, 200, 200, 40)}
        figures: dict[str, float] = {}
        for model, size in (quick if options.quick else full).items():
            figures |= _compare(model, owners, folder, size).figures(model.replace("-", "_"))
    return harness.report("packing", figures, TARGETS)


def _add_random(folder: Path) -> None:
    """Save the random model's checkpoint, and add it to the catalog beside the starter."""
    from tests.tiny import tiny_sd

    checkpoint = tiny_sd(folder / RANDOM, block_out_channels=(32, 64))
    known = catalog()
    entry = known["starter"].model_dump(mode="json", exclude={"name"})
    entry |= {"title": "random", "source": f"dir:{checkpoint}", "pool": RANDOM}
    path = folder / "catalog.json"
    ...
