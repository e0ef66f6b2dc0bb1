"""`python -m tests.stepnode …`: `python -m workers …` with a step engine that draws noise."""

import sys

from farm.catalog import Model
from tests.stepping import FakeSteps
from workers import engines, gpu
from workers.__main__ import main


def opened(model: Model, *, device: str) -> FakeSteps:
    return FakeSteps(model, tick_s=0.02)


if __name__ == "__main__":
    engines.open_step_engine = opened
    gpu.limit_threads = lambda: None
    gpu.device = lambda: "cpu"
    gpu.describe = lambda: gpu.Device("cpu", "fake", 0)
    sys.exit(main())
