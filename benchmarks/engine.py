"""What going step by step brings: the engines alone, on one thread, in CPU time of the process.

A random UNet of 1 M parameters on latents of 8 by 8 and of 16 by 16, the same pipeline for all: one stock call a
frame; packs of frames that share the key of a stock call (16 at most); the same where guidance is free in a
call ("rowwise", which only some families can); and the step loop (32 rows at most). Every frame has a prompt of its
own. Mixed frames take 4 to 30 steps, guidance of 0 to 12 in tenths and one of four samplers. Arrivals are played in
virtual time, which the CPU time that each call and each tick really took moves on: Poisson at 0.8 of what the
step loop did of the same frames at once, against rowwise packs, the stronger ones.
"""

import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, groupby
from pathlib import Path
from typing import Any
from uuid import UUID

from benchmarks import harness
from benchmarks.harness import PROMPTS, Target, say
from farm.catalog import BUILTIN, Model, read
from farm.spec import Format, Spec, call_key
from workers.engine import Ask, Pixels

SAMPLERS = ("dpm++2m", "euler", "euler-a", "ddim")
PACK = 16  # frames of a call; the step loop takes as many rows
TARGETS = [
    *(
        Target(f"mixed_{side}_step_of_{other}", at_least=least)
        for side, least in (("8x8", 2.5), ("16x16", 1.5))
        for other in ("one_at_a_time", "packed")
    ),
    Target("arrivals_8x8_p95_of_rowwise", at_most=0.5),
    Target("equal_8x8_step_of_packed", at_least=0.9),
    Target("equal_8x8_packed_of_one_at_a_time", at_least=2.5),
    Target("reference_forwards", at_most=30),
    Target("parity_latents_relative", at_most=1e-5),
    Target("parity_levels", at_most=1),
]
# steps, guidance, tick of arrival, priority, negative prompt: the reference workload of ENGINE.md
REFERENCE = (
    (30, 7.5, 0, 0, "blurry"),
    (12, 5.0, 0, 0, ""),
    (4, 1.0, 1, 0, ""),
    (25, 9.0, 3, 0, "low quality"),
    (8, 3.0, 5, 0, ""),
    (20, 7.5, 6, 5, "text"),
    (4, 0.0, 9, 5, ""),
    (16, 12.0, 11, 0, "blurry"),
)


Way = Callable[[Sequence[Ask]], None]


@dataclass(frozen=True)
class Size:
    """Frames of each measurement. One call a frame is slower, and its rate needs fewer."""

    rounds: int
    mixed: int
    alone: int
    equal: int
    arrivals: int


QUICK = Size(rounds=1, mixed=32, alone=4, equal=16, arrivals=24)
FULL = Size(rounds=3, mixed=200, alone=40, equal=32, arrivals=400)


class Engines:
    """The same pipeline behind both engines."""

    def __init__(self, folder: Path, side: int) -> None:
        from tests.tiny import tiny_sd
        from workers.engine.loading import load
        from workers.engine.pipe import PipeEngine
        from workers.engine.step.families import family
        from workers.engine.step.loop import StepLoop

        entry = read(BUILTIN)["starter"].model_dump()
        packed = {
            "name": "random-1m",
            "source": f"dir:{tiny_sd(folder / str(side), block_out_channels=(32, 64))}",
            "pack": {"frames": PACK, "pixels": PACK * side * side, "rows": 2 * PACK},
            "side": {"min": side, "max": side, "multiple": 8, "default": side},
        }
        stock = {**entry, **packed, "engine": "pipe", "packs_by": "call", "free": ()}
        self.model = Model(**stock)
        self.rowwise_model = Model(**{**stock, "free": ("guidance",)})
        self.side = side
        pipe = load(self.model, device="cpu")
        self.pipe = PipeEngine(self.model, pipe, device="cpu")
        self.rowwise_pipe = PipeEngine(self.rowwise_model, pipe, device="cpu")
        stepped = Model(**{**stock, "engine": "step", "packs_by": "shape"})
        self.steps = StepLoop(family(pipe, stepped, device="cpu"), ageing_s=60)

    def ask(self, k: int, **changes: Any) -> Ask:
        spec = Spec(
            self.model.name,
            f"{PROMPTS[k % len(PROMPTS)]}, {k}",
            "",
            self.side,
            self.side,
            20,
            4.0,
            "dpm++2m",
            Format.PNG,
        )
        return Ask(replace(spec, **changes), k)

    def mixed(self, frames: int) -> list[Ask]:
        """Frames whose settings are nearly all different."""
        draw = random.Random(4)
        return [
            self.ask(
                k,
                steps=draw.randint(4, 30),
                guidance=draw.randint(0, 120) / 10,
                sampler=draw.choice(SAMPLERS),
            )
            for k in range(frames)
        ]

    # ------------------------------------------------------------------------------------ four ways to render

    def one_at_a_time(self, asks: Sequence[Ask]) -> None:
        for ask in asks:
            self.call([ask])

    def packed(self, asks: Sequence[Ask]) -> None:
        for pack in _packs(asks, self.model):
            self.call(pack)

    def rowwise(self, asks: Sequence[Ask]) -> None:
        for pack in _packs(asks, self.rowwise_model):
            self.call(pack, self.rowwise_pipe)

    def stepped(self, asks: Sequence[Ask]) -> None:
        for k, ask in enumerate(asks):
            self.steps.add(UUID(int=k), ask, priority=5)
        while self.steps.frames:
            self.tick()

    def call(self, asks: Sequence[Ask], engine: Any = None) -> list[Pixels]:
        return [_good(r) for r in (engine or self.pipe).render(asks, on_step=lambda done, total: None)]

    def tick(self) -> dict[UUID, Pixels]:
        return {frame: _good(result) for frame, result in self.steps.tick().done.items()}


def _packs(asks: Sequence[Ask], model: Model) -> Iterator[list[Ask]]:
    def key(ask: Ask) -> str:
        return call_key(ask.spec, model)

    for _, group in groupby(sorted(asks, key=key), key=key):
        same = list(group)
        for first in range(0, len(same), PACK):
            yield same[first : first + PACK]


def _good(result: Any) -> Pixels:
    if isinstance(result, Exception):
        raise result
    pixels: Pixels = result
    return pixels


def main() -> int:
    from workers.gpu import keep_memory, limit_threads

    size = QUICK if harness.options(__doc__).quick else FULL
    limit_threads()
    keep_memory()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="farm-bench-") as folder:
        for name, side in (("8x8", 64), ("16x16", 128)):
            engines = Engines(Path(folder), side)
            warm = engines.mixed(4)
            for way in (engines.one_at_a_time, engines.rowwise, engines.stepped):
                way(warm)
            figures |= _at_once(engines, name, size)
            if side == 64:
                figures |= _equal(engines, name, size)
                figures |= _arrivals(engines, name, size, figures[f"mixed_{name}_step_images_per_s"])
                figures |= _reference(engines)
    return harness.report("engine", figures, TARGETS)


# ---------------------------------------------------------------------------------------------- all at once


def _at_once(engines: Engines, name: str, size: Size) -> dict[str, float]:
    asks = engines.mixed(size.mixed)
    few = asks[: size.alone]
    ways: dict[str, tuple[Way, Sequence[Ask]]] = {
        "one_at_a_time": (engines.one_at_a_time, few),
        "packed": (engines.packed, asks if size is FULL else few),
        "rowwise": (engines.rowwise, asks),
        "step": (engines.stepped, asks),
    }
    rates = _rates(f"{name} mixed", ways, size.rounds, of=asks)
    figures = _figures(f"mixed_{name}", rates)
    figures[f"mixed_{name}_step_of_rowwise"] = harness.ratio(rates["step"], rates["rowwise"])
    return figures


def _equal(engines: Engines, name: str, size: Size) -> dict[str, float]:
    asks = [engines.ask(k) for k in range(size.equal)]
    ways: dict[str, tuple[Way, Sequence[Ask]]] = {
        "one_at_a_time": (engines.one_at_a_time, asks[: size.alone]),
        "packed": (engines.packed, asks),
        "step": (engines.stepped, asks),
    }
    rates = _rates(f"{name} equal", ways, 2 * size.rounds, of=asks)
    figures = _figures(f"equal_{name}", rates)
    figures[f"equal_{name}_packed_of_one_at_a_time"] = harness.ratio(rates["packed"], rates["one_at_a_time"])
    return figures


def _rates(
    name: str, ways: Mapping[str, tuple[Way, Sequence[Ask]]], rounds: int, *, of: Sequence[Ask]
) -> dict[str, list[float]]:
    """Images a second of each way, one entry a round, as if each had rendered all of these."""
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, (render, asks) in ways.items():
            started = time.process_time()
            render(asks)
            seconds = time.process_time() - started
            rates[way].append(len(of) * _row_steps(asks) / _row_steps(of) / seconds)
        say(f"{name}: " + ", ".join(f"{way} {rate[-1]:.1f}" for way, rate in rates.items()) + " images/s")
    return rates


def _row_steps(asks: Sequence[Ask]) -> int:
    return sum(a.spec.steps * (2 if a.spec.guided else 1) for a in asks)


def _figures(prefix: str, rates: Mapping[str, list[float]]) -> dict[str, float]:
    return {
        **{f"{prefix}_{way}_images_per_s": harness.quantile(rate, 0.5) for way, rate in rates.items()},
        f"{prefix}_step_of_one_at_a_time": harness.ratio(rates["step"], rates["one_at_a_time"]),
        f"{prefix}_step_of_packed": harness.ratio(rates["step"], rates["packed"]),
    }


# ---------------------------------------------------------------------------------------------- one after another


def _arrivals(engines: Engines, name: str, size: Size, images_per_s: float) -> dict[str, float]:
    draw = random.Random(8)
    asks, times, now = engines.mixed(size.arrivals), [], 0.0
    for _ in asks:
        now += draw.expovariate(0.8 * images_per_s)
        times.append(now)
    stepped = harness.quantile(_arrive_stepped(engines, asks, times), 0.95)
    packed = harness.quantile(_arrive_packed(engines, asks, times), 0.95)
    say(f"{name} arrivals: p95 {stepped:.3f} s step by step, {packed:.3f} s in rowwise packs")
    return {
        f"arrivals_{name}_step_p95_s": stepped,
        f"arrivals_{name}_rowwise_p95_s": packed,
        f"arrivals_{name}_p95_of_rowwise": stepped / packed,
    }


def _arrive_stepped(engines: Engines, asks: Sequence[Ask], times: Sequence[float]) -> list[float]:
    now, waits, coming = 0.0, [], 0
    while coming < len(asks) or engines.steps.frames:
        if not engines.steps.frames:
            now = max(now, times[coming])
        started = time.process_time()
        while coming < len(asks) and times[coming] <= now:
            engines.steps.add(UUID(int=coming), asks[coming], priority=5)
            coming += 1
        done = engines.tick()
        now += time.process_time() - started
        waits += [now - times[frame.int] for frame in done]
    return waits


def _arrive_packed(engines: Engines, asks: Sequence[Ask], times: Sequence[float]) -> list[float]:
    now, waits, left = 0.0, [], list(range(len(asks)))
    keys = [call_key(ask.spec, engines.rowwise_model) for ask in asks]
    while left:
        now = max(now, times[left[0]])
        # the oldest frame, and its kin that are here
        pack = [k for k in left if times[k] <= now and keys[k] == keys[left[0]]][:PACK]
        started = time.process_time()
        engines.call([asks[k] for k in pack], engines.rowwise_pipe)
        now += time.process_time() - started
        waits += [now - times[k] for k in pack]
        left = [k for k in left if k not in pack]
    return waits


# ---------------------------------------------------------------------------------------------- the same images


def _reference(engines: Engines) -> dict[str, float]:
    """Forwards of the reference workload, and how far its frames are from the same frames alone."""
    import numpy as np

    asks = [
        engines.ask(k, steps=steps, guidance=guidance, negative_prompt=negative, sampler=SAMPLERS[k % 4])
        for k, (steps, guidance, _, _, negative) in enumerate(REFERENCE)
    ]
    due = {k: (arrives, priority) for k, (_, _, arrives, priority, _) in enumerate(REFERENCE)}
    images: dict[int, Pixels] = {}
    latents: dict[int, Any] = {}
    with _decoded(engines) as seen, _forwards(engines) as forwards:
        for tick in count():
            for k, ask in enumerate(asks):
                if due[k][0] == tick:
                    engines.steps.add(UUID(int=k), ask, priority=due[k][1])
            for frame, image in engines.tick().items():
                images[frame.int], latents[frame.int] = image, seen.pop(0)
            if len(images) == len(asks):
                break
    relative, levels = 0.0, 0
    for k, ask in enumerate(asks):
        with _decoded(engines) as seen:
            [alone] = engines.call([ask])
        apart = (latents[k] - seen[0]).abs().max() / seen[0].abs().max()
        relative = max(relative, float(apart))
        levels = max(levels, int(np.abs(alone.astype(int) - images[k].astype(int)).max()))
    return {
        "reference_forwards": len(forwards),
        "reference_forwards_alone": sum(steps for steps, *_ in REFERENCE),
        "parity_latents_relative": relative,
        "parity_levels": levels,
    }


@contextmanager
def _decoded(engines: Engines) -> Iterator[list[Any]]:
    """What the decoder gets, one frame at a time."""
    seen: list[Any] = []
    decoder = engines.pipe.pipe.vae.decoder
    hook = decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    yield seen
    hook.remove()


@contextmanager
def _forwards(engines: Engines) -> Iterator[list[int]]:
    """The rows of each forward of the UNet."""
    rows: list[int] = []
    unet = engines.pipe.pipe.unet
    hook = unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    yield rows
    hook.remove()


if __name__ == "__main__":
    sys.exit(main())
