"""What the farm costs: one worker of a whole farm against a bare loop of stock pipe() calls, the same packs.

The farm's time runs from the first claim to the last settle: it encodes, stores with fsync, books and bills
each image, with Postgres, Redis, Celery and the sweep on the same machine. The loops drop
their images. The bare loop is stock; the tuned one keeps freed memory as the farm's worker does, so that it shows
what the farm itself costs.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from uuid import UUID

from sqlalchemy import text

from benchmarks import harness
from benchmarks.harness import Target, say
from benchmarks.plain.loop import Call, bare, calls_of
from farm.accounts import Caller
from farm.db import transaction

MODEL = {"model": "starter"}
WARM_UP = 16  # frames
TARGETS = [Target("farm_of_bare_loop", at_least=0.95)]


@dataclass
class Measured:
    """One entry a round."""

    farm_images_per_s: list[float] = field(default_factory=list)
    bare_images_per_s: list[float] = field(default_factory=list)
    tuned_images_per_s: list[float] = field(default_factory=list)
    idle_ms_per_pack: list[float] = field(default_factory=list)  # when the worker was in no call

    def figures(self) -> dict[str, float]:
        return {
            "farm_of_bare_loop": harness.ratio(self.farm_images_per_s, self.bare_images_per_s),
            "farm_of_tuned_loop": harness.ratio(self.farm_images_per_s, self.tuned_images_per_s),
            **{name: median(values) for name, values in vars(self).items()},
        }


def main() -> int:
    options = harness.options(__doc__)
    rounds, frames = (2, 16) if options.quick else (5, 80)
    measured = Measured()
    with (
        harness.services() as folder,
        harness.farm(folder, "starter"),
        bare("starter", log=folder / "bare.log") as stock,
        bare("starter", log=folder / "tuned.log", keep_memory=True) as tuned,
    ):
        owners = harness.callers(4)
        warm_up = calls_of(_render(owners, WARM_UP))[:1]
        stock.seconds(warm_up)
        tuned.seconds(warm_up)
        say("warm")
        for k in range(rounds):
            calls = _measure_farm(owners, frames, measured)
            measured.bare_images_per_s.append(frames / stock.seconds(calls))
            measured.tuned_images_per_s.append(frames / tuned.seconds(calls))
            now = {name: round(values[-1], 3) for name, values in vars(measured).items()}
            say(f"round {k + 1} of {rounds}: {now}")
    return harness.report("overhead", measured.figures(), TARGETS)


def _render(owners: Sequence[Caller], frames: int) -> list[UUID]:
    """Jobs of ten frames: packs of eight hold parts of several."""
    accepted = harness.submit(harness.requests(owners, MODEL, frames=frames, a_job=10))
    harness.finish(accepted)
    return accepted


def _measure_farm(owners: Sequence[Caller], frames: int, measured: Measured) -> list[Call]:
    """Returns the packs as calls for the loops."""
    accepted = _render(owners, frames)
    calls, farm_s = calls_of(accepted), harness.worker_seconds(accepted)
    measured.farm_images_per_s.append(frames / farm_s)
    measured.idle_ms_per_pack.append(1000 * (farm_s - _render_s(accepted)) / len(calls))
    return calls


def _render_s(accepted: Sequence[UUID]) -> float:
    """How long the worker was inside the engine for these jobs."""
    query = "SELECT sum(gpu_ms) FROM packs WHERE id IN (SELECT pack_id FROM usage WHERE job_id = ANY(:jobs))"
    with transaction() as db:
        return float(db.scalar(text(query), {"jobs": list(accepted)}) or 0) / 1000


if __name__ == "__main__":
    sys.exit(main())
