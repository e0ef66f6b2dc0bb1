"""`python -m workers.verify MODEL …`: load a model, render a frame of each of its sizes, and note what that took.

What is noted is the first cap of workers on a device of this name, and what makes room for a model in a pool.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

from sqlalchemy.dialects.postgresql import insert

from farm.catalog import Model, catalog
from farm.db import transaction
from farm.errors import FarmError, Misconfigured, OutOfMemory, RenderFailed
from farm.settings import settings
from farm.spec import Format, Spec
from farm.tables import Measurement
from workers.engine import Ask, Engine, Pixels, StepEngine

PROMPT = "a red circle on a blue background"


@dataclass(frozen=True)
class Found:
    """One frame of a size on a device, and two."""

    model: str
    revision: str
    precision: str
    device: str
    width: int
    height: int
    steps: int
    load_s: float
    seconds: float
    resident_bytes: int
    peak_bytes: int
    peak_two_bytes: int | None


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    os.environ["CUDA_VISIBLE_DEVICES"] = options.gpu or ""  # before torch is imported below
    from workers import gpu

    gpu.limit_threads()
    name = ""
    try:
        if options.gpu and gpu.device() != "cuda":
            raise Misconfigured(f"there is no GPU {options.gpu} that torch can use on this machine")
        for name in options.models:
            if name not in catalog():
                raise Misconfigured(f"no model {name!r} in the catalog; there are {', '.join(catalog())}")
            found = verify(catalog()[name], sizes=options.sizes, steps=options.steps)
            noted = note(found)
            _say(found, noted=noted, as_json=options.json)
    except FarmError as e:
        sys.stderr.write(f"workers.verify: {name}: {e}\n" if name else f"workers.verify: {e}\n")
        return 1
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workers.verify", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--gpu", help="the GPU to use, as 0; the CPU if left out")
    parser.add_argument("--sizes", type=_sizes, help="as 1024x1024,1216x832; the model's own if left out")
    parser.add_argument("--steps", type=int, help="the model's own if left out")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def _sizes(text: str) -> list[tuple[int, int]]:
    if not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are sizes with commas, as 1024x1024,1216x832")
    return [(int(w), int(h)) for w, h in (size.split("x") for size in text.split(","))]


def verify(
    model: Model, *, sizes: Sequence[tuple[int, int]] | None = None, steps: int | None = None
) -> list[Found]:
    """Load a model on this process's device and render it; one Found a size.

    Raises Misconfigured if it does not load or a size is not allowed, RenderFailed if an image is not one.
    """
    from workers import gpu
    from workers.engines import load

    device = gpu.describe()
    if wrong := gpu.probe():
        raise RenderFailed(f"{device.name}: {wrong}")
    specs = [_spec(model, width, height, steps) for width, height in sizes or sizes_of(model)]
    started = time.monotonic()
    engine = load(model, device=device.kind)
    load_s, resident = time.monotonic() - started, gpu.held_bytes()
    _render(engine, specs[0], 1)  # the first one warms up: kernels are chosen, and compiled
    return [
        Found(
            model=model.name,
            revision=model.revision,
            precision=model.precision,
            device=device.name,
            width=spec.width,
            height=spec.height,
            steps=spec.steps,
            load_s=load_s,
            resident_bytes=resident,
            **_measure(engine, spec, resident),
        )
        for spec in specs
    ]


def sizes_of(model: Model) -> list[tuple[int, int]]:
    """The sizes a model was trained on, or the one it takes if none is asked for; the largest first."""
    side = model.side.default
    sizes = [(s.width, s.height) for s in model.sizes] or [(side, side)]
    return sorted(sizes, key=lambda size: -size[0] * size[1])


def _spec(model: Model, width: int, height: int, steps: int | None) -> Spec:
    if not (model.side.allows(width) and model.side.allows(height)):
        side = model.side
        raise Misconfigured(
            f"{width}x{height}: {model.name} takes multiples of {side.multiple} from {side.min} to {side.max}"
        )
    steps = model.steps.default if steps is None else steps
    if not model.steps.min <= steps <= model.steps.max:
        raise Misconfigured(f"{steps} steps: {model.name} takes {model.steps.min} to {model.steps.max}")
    return Spec(
        model.name, PROMPT, "", width, height, steps, model.guidance.default, model.sampler, Format.PNG
    )


def _measure(engine: Engine | StepEngine, spec: Spec, resident: int) -> dict[str, Any]:
    seconds, peak = _peak(lambda: _render(engine, spec, 1))
    try:
        two = max(_peak(lambda: _render(engine, spec, 2))[1], resident)
    except OutOfMemory:
        two = None
    return {"seconds": seconds, "peak_bytes": max(peak, resident), "peak_two_bytes": two}


def _peak(work: Callable[[], object]) -> tuple[float, int]:
    from workers import gpu

    gpu.forget_peak()
    started = time.monotonic()
    work()
    return time.monotonic() - started, gpu.peak_bytes()


def _render(engine: Engine | StepEngine, spec: Spec, frames: int) -> None:
    """Render frames together. Raises RenderFailed for the first that is not an image."""
    asks = [Ask(spec, seed) for seed in range(frames)]
    results: Sequence[Pixels | RenderFailed]
    if hasattr(engine, "render"):
        results = engine.render(asks, on_step=lambda done, total: None)
    else:
        results = _by_steps(engine, asks)
    for result in results:
        if isinstance(result, RenderFailed):
            raise result


def _by_steps(engine: StepEngine, asks: Sequence[Ask]) -> list[Pixels | RenderFailed]:
    done: list[Pixels | RenderFailed] = []
    for ask in asks:
        engine.add(uuid4(), ask, priority=5)
    while engine.frames:
        done += engine.tick().done.values()
    return done


def note(found: Sequence[Found]) -> bool:
    """Keep what was found in the job database. Returns whether there is one.

    Raises DatabaseAway.
    """
    if not settings().database_url.get_secret_value():
        return False
    with transaction() as db:
        for one in found:
            key = [column.name for column in Measurement.__table__.primary_key]
            statement = insert(Measurement).values(**asdict(one))
            facts = {name: statement.excluded[name] for name in asdict(one) if name not in key}
            facts["measured_at"] = statement.excluded["measured_at"]
            db.execute(statement.on_conflict_do_update(index_elements=key, set_=facts))
    return True


def _say(found: Sequence[Found], *, noted: bool, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"noted": noted, "sizes": [asdict(f) for f in found]}) + "\n")
        return
    for f in found:
        sys.stdout.write(
            f"{f.model} on {f.device}: {f.width}x{f.height}, {f.steps} steps: {f.seconds:.2f} s,"
            f" {f.peak_bytes / 2**30:.2f} GiB at its peak, {f.resident_bytes / 2**30:.2f} of it loaded"
            f" (in {f.load_s:.1f} s)\n"
        )
    if not noted:
        sys.stdout.write("not kept: FARM_DATABASE_URL names no job database\n")


if __name__ == "__main__":
    sys.exit(main())
