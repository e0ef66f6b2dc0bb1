"""A device that draws noise: pixels don't matter here, but the same spec and seed always give the same."""

import os
import time
from collections.abc import Callable, Sequence
from signal import SIGKILL
from uuid import UUID

import numpy as np

from farm.catalog import Model
from farm.errors import RenderFailed
from farm.spec import Spec
from workers import engines, gpu
from workers.engine import Ask, OnStep, Pixels, Tick

BAD = "the engine gives no picture of this"
POISON = "the engine takes its process down with this"


def picture(spec: Spec, seed: int) -> Pixels:
    """What a spec and a seed look like."""
    words = [*spec.prompt.encode(), spec.steps, seed & 0xFFFFFFFF, seed >> 32]
    noise = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
    return noise.integers(0, 256, (spec.height, spec.width, 3), dtype=np.uint8)


class FakeEngine:
    """Takes the given time a step, whatever it draws."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    def render(self, asks: Sequence[Ask], *, on_step: OnStep) -> list[Pixels | RenderFailed]:
        steps = asks[0].spec.steps
        for step in range(steps):
            time.sleep(self._step_s)
            on_step(step + 1, steps)
        if any(a.spec.prompt == POISON for a in asks):
            os.kill(os.getpid(), SIGKILL)
        return [RenderFailed(BAD) if a.spec.prompt == BAD else picture(a.spec, a.seed) for a in asks]


def install(step_s: float, *, resumed: Callable[[], None] = lambda: None) -> None:
    """Put the fakes where this process would load torch. resumed: called when a frame goes on from a saved state."""
    from tests.stepping import FakeSteps

    class Resuming(FakeSteps):
        def add(self, frame: UUID, ask: Ask, *, priority: int, saved: bytes | None = None) -> None:
            super().add(frame, ask, priority=priority, saved=saved)
            if self.resumed.pop(frame, 0):
                resumed()

        def tick(self) -> Tick:
            if any(flying.ask.spec.prompt == POISON for flying in self.flying.values()):
                os.kill(os.getpid(), SIGKILL)
            return super().tick()

    def opened(model: Model, *, device: str) -> FakeEngine:
        return FakeEngine(step_s)

    def opened_steps(model: Model, *, device: str) -> FakeSteps:
        return Resuming(model, cap=16, tick_s=step_s)

    engines.open_engine, engines.open_step_engine = opened, opened_steps
    gpu.limit_threads = lambda: None
    gpu.device = lambda: "cpu"
    gpu.describe = lambda: gpu.Device("cpu", "fake", 0)
