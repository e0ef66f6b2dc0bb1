"""`python -m benchmarks.watched …`: `python -m workers …` that writes down the ticks of its step engines.

WATCHED names the file: a JSON list a line, when a tick began and ended (seconds since 1970, as the database
counts), and the priority of each frame that took part.
"""

import json
import os
import sys
import time
from typing import Any
from uuid import UUID

from farm.catalog import Model
from workers import engines
from workers.__main__ import main
from workers.engine import Ask, Tick, open_step_engine


class Watched:
    """A step engine, with somebody who looks at his watch."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._priorities: dict[UUID, int] = {}
        self._file = open(os.environ["WATCHED"], "a", buffering=1)  # noqa: SIM115 - as long as the process

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def add(self, frame: UUID, ask: Ask, *, priority: int, saved: bytes | None = None) -> None:
        self._priorities[frame] = priority
        self._engine.add(frame, ask, priority=priority, saved=saved)

    def tick(self) -> Tick:
        began = time.time()
        tick: Tick = self._engine.tick()
        took_part = {frame.hex: self._priorities[frame] for frame in tick.steps}
        self._file.write(json.dumps([began, time.time(), took_part]) + "\n")
        return tick


def opened(model: Model, *, device: str) -> Any:
    return Watched(open_step_engine(model, device=device))


if __name__ == "__main__":
    engines.open_step_engine = opened
    sys.exit(main())
