"""The whole farm against Ray Serve's @serve.batch and against plain Celery with priorities, on the same pipeline.

A random UNet of 1 M parameters on latents of 8 by 8, one thread each, requests all at once from four accounts: of equal
settings, and mixed (30 settings). The farm goes step by step; Ray batches up to 64 requests (benchmarks/plain/
serve.py), Celery makes an image a task (benchmarks/plain/tasks.py). Urgent requests come at random times while mixed
ones are queued: from the request to the stored image, for Ray to the answer.

Ray comes with the extra [peers], or PEERS_PYTHON names an interpreter that has it; it runs in a network of its own
(unshare -rn), because it listens on all interfaces. Without it there are no figures of Ray.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from uuid import UUID

from sqlalchemy import text

from benchmarks import harness
from benchmarks.harness import ONE_THREAD, REPOSITORY, Target, quantile, ratio, say
from benchmarks.plain.loop import ANSWER, Call
from benchmarks.plain.tasks import Plain, plain_celery
from benchmarks.stepwise import MODEL, add_stepwise
from farm.accounts import Caller
from farm.db import transaction
from farm.submissions import Submission

OF_RAY = [
    Target("mixed_farm_of_ray", at_least=1.5),
    Target("equal_farm_of_ray", at_least=0.9),
    Target("urgent_p95_of_ray", at_most=1 / 20),
]
OF_CELERY = [
    Target("urgent_p95_of_celery", at_most=1.25),
    Target("mixed_farm_of_celery", at_least=2.0),
]
EQUAL = {"steps": 20, "guidance": 4.0, "sampler": "dpm++2m"}
SETTINGS = [
    {"steps": steps, "guidance": guidance, "sampler": "dpm++2m"}
    for steps in (4, 8, 12, 20, 25, 30)
    for guidance in (1.0, 3.0, 5.0, 7.5, 9.0)
]
SIDE = 64
NETWORK = "ip link set lo up && exec "  # in a namespace of its own


@dataclass(frozen=True)
class Size:
    rounds: int
    images: int  # of a round
    celery: int  # of these, for the one that does them one by one
    urgent_images: int  # bulk while urgent ones come


QUICK = Size(rounds=1, images=64, celery=12, urgent_images=64)
FULL = Size(rounds=3, images=200, celery=100, urgent_images=400)
URGENT_SHARE = 0.1  # of what Celery can do: the slowest must not be flooded with them


class Ray:
    """Ray Serve, seen from outside."""

    def __init__(self, child: "subprocess.Popen[str]", log: Path) -> None:
        self._child = child
        self._log = log

    def answer(
        self, calls: Sequence[Call], *, urgent: Call | None = None, every_s: float = 0
    ) -> Mapping[str, Any]:
        assert self._child.stdin is not None
        request = {
            "calls": [asdict(c) for c in calls],
            "urgent": urgent and asdict(urgent),
            "every_s": every_s,
        }
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        return dict(json.loads(self.line()))

    def line(self) -> str:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith(ANSWER):
                return line.removeprefix(ANSWER)
        raise RuntimeError(f"Ray ended: {self._log.read_text()[-2000:]}")


def main() -> int:
    options = harness.options(__doc__)
    size = QUICK if options.quick else FULL
    with harness.services() as folder:
        add_stepwise(folder)
        owners = harness.callers(4)
        figures: dict[str, float] = {}
        with ExitStack() as running:
            celery = running.enter_context(plain_celery(MODEL, folder, priorities=True))
            running.enter_context(harness.farm(folder, MODEL))
            harness.finish(_submit(owners, _mixed(16)))
            celery.seconds(_mixed(2))
            figures |= _against_celery(owners, celery, size)
        with ray_serve(folder) as ray, harness.farm(folder, MODEL):
            if ray is not None:
                harness.finish(_submit(owners, _mixed(16)))
                ray.answer(_mixed(4))
                figures |= _against_ray(owners, ray, size, figures["urgent_every_s"])
    targets = OF_CELERY + (OF_RAY if "mixed_farm_of_ray" in figures else [])
    if len(targets) == len(OF_CELERY):
        say("Ray is not here: install the extra [peers], or name an interpreter in PEERS_PYTHON")
    return harness.report("peers", figures, targets)


@contextmanager
def ray_serve(folder: Path) -> Iterator[Ray | None]:
    """Run Ray in a network of its own; None if it is not installed."""
    python = os.environ.get("PEERS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import ray.serve"], capture_output=True, check=False).returncode:
        yield None
        return
    home = folder / "ray"
    home.mkdir()
    home.chmod(0o700)
    script = f"{NETWORK}{python} -m benchmarks.plain.serve {MODEL}"
    with (folder / "ray.log").open("ab") as log:
        child = subprocess.Popen(
            ["unshare", "-rn", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=REPOSITORY,
            env={**os.environ, **ONE_THREAD, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(home)},
            text=True,
            start_new_session=True,
        )
    try:
        ray = Ray(child, folder / "ray.log")
        ray.line()
        yield ray
        assert child.stdin is not None
        child.stdin.close()
        child.wait(60)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, 9)
        child.wait()
        shutil.rmtree(home, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ the work


def _call(k: int, setting: Mapping[str, Any]) -> Call:
    return Call([harness.PROMPTS[k % len(harness.PROMPTS)]], [k], SIDE, SIDE, **setting)


def _equal(images: int) -> list[Call]:
    return [_call(k, EQUAL) for k in range(images)]


def _mixed(images: int) -> list[Call]:
    rng = random.Random(images)
    return [_call(k, rng.choice(SETTINGS)) for k in range(images)]


def _submit(owners: Sequence[Caller], calls: Sequence[Call], *, priority: int = 1) -> list[UUID]:
    """A job an image, as Ray and Celery get them."""
    made = []
    for k, call in enumerate(calls):
        spec = {"model": MODEL, "prompt": call.prompts[0], "seed": call.seeds[0], "steps": call.steps}
        spec |= {"guidance": call.guidance, "sampler": call.sampler}
        body = {"spec": spec, "priority": priority, "reuse": False}
        made.append((owners[k % len(owners)], Submission.model_validate(body)))
    return harness.submit(made)


def _farm_s(owners: Sequence[Caller], calls: Sequence[Call]) -> float:
    """From the first claim to the last settle."""
    accepted = _submit(owners, calls)
    harness.finish(accepted)
    return harness.worker_seconds(accepted)


def _farm_urgent_s(owners: Sequence[Caller], size: Size, every_s: float) -> list[float]:
    """Seconds from request to stored image of urgent requests while mixed ones are queued."""
    bulk = _submit(owners, _mixed(size.urgent_images))
    sent: dict[UUID, float] = {}

    def send(k: int) -> None:
        began = time.time()
        (job,) = _submit(owners[:1], [_call(k, EQUAL)], priority=9)
        sent[job] = began

    _meanwhile(send, lambda: not harness.how_many(bulk, "ended_at IS NULL"), every_s=every_s)
    harness.finish([*bulk, *sent])
    query = "SELECT job_id, extract(epoch FROM ended_at) AS done FROM frames WHERE job_id = ANY(:jobs)"
    with transaction() as db:
        return [float(r.done) - sent[r.job_id] for r in db.execute(text(query), {"jobs": list(sent)})]


def _celery_urgent_s(celery: Plain, images: int, every_s: float) -> list[float]:
    sent: dict[str, float] = {}
    celery.send(_mixed(images))

    def send(k: int) -> None:
        sent[f"u{k}"] = time.time()
        celery.send_urgent(_call(k, EQUAL), f"u{k}")

    _meanwhile(send, lambda: celery.left(images + len(sent)) <= 1, every_s=every_s)
    return [end - sent[name] for _, end, name in celery.times(images + len(sent)) if name]


def _meanwhile(send: Callable[[int], None], over: Callable[[], bool], *, every_s: float) -> None:
    """Send now and then, at random times, until it is over."""
    stop = threading.Event()
    rng = random.Random(7)

    def run() -> None:
        k = 0
        while not stop.wait(min(3 * every_s, rng.expovariate(1 / every_s))):
            send(k)
            k += 1

    sender = threading.Thread(target=run)
    sender.start()
    try:
        harness.until(over, limit_s=1800, every_s=0.1)
    finally:
        stop.set()
        sender.join()


# ------------------------------------------------------------------------------------------------ the figures


def _against_celery(owners: Sequence[Caller], celery: Plain, size: Size) -> dict[str, float]:
    farm, plain = [], []
    for _ in range(size.rounds):
        farm.append(size.images / _farm_s(owners, _mixed(size.images)))
        plain.append(size.celery / celery.seconds(_mixed(size.celery)))
        say(f"mixed: {farm[-1]:.2f} images/s, Celery {plain[-1]:.2f}")
    every_s = 1 / (URGENT_SHARE * median(plain))
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(size.rounds):  # a dozen urgent ones each: the p95 is that of all
        ours += _farm_urgent_s(owners, size, every_s)
        theirs += _celery_urgent_s(celery, size.urgent_images // 3, every_s)
        say(f"urgent p95: {quantile(ours, 0.95):.2f} s, Celery {quantile(theirs, 0.95):.2f} s")
    return {
        "urgent_p95_of_celery": quantile(ours, 0.95) / quantile(theirs, 0.95),
        "mixed_farm_of_celery": ratio(farm, plain),
        "urgent_every_s": every_s,
        "urgent_frames": len(ours),
        "mixed_farm_images_per_s": median(farm),
        "mixed_celery_images_per_s": median(plain),
        "urgent_farm_p50_s": median(ours),
        "urgent_farm_p95_s": quantile(ours, 0.95),
        "urgent_celery_p50_s": median(theirs),
        "urgent_celery_p95_s": quantile(theirs, 0.95),
    }


def _against_ray(owners: Sequence[Caller], ray: Ray, size: Size, every_s: float) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, calls in (("mixed", _mixed(size.images)), ("equal", _equal(size.images))):
        farm, theirs = [], []
        for _ in range(size.rounds):
            farm.append(size.images / _farm_s(owners, calls))
            theirs.append(size.images / ray.answer(calls)["seconds"])
            say(f"{name}: {farm[-1]:.2f} images/s, Ray {theirs[-1]:.2f}")
        figures |= {
            f"{name}_farm_of_ray": ratio(farm, theirs),
            f"{name}_ray_images_per_s": median(theirs),
            f"{name}_farm_beside_ray_images_per_s": median(farm),
        }
    ours = _farm_urgent_s(owners, size, every_s)
    urgent_s = ray.answer(_mixed(size.urgent_images), urgent=_call(0, EQUAL), every_s=every_s)["urgent_s"]
    say(f"urgent p95: {quantile(ours, 0.95):.2f} s, Ray {quantile(urgent_s, 0.95):.2f} s")
    return figures | {
        "urgent_p95_of_ray": quantile(ours, 0.95) / quantile(urgent_s, 0.95),
        "urgent_ray_p95_s": quantile(urgent_s, 0.95),
    }


if __name__ == "__main__":
    sys.exit(main())
