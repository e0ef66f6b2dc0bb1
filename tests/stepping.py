"""A step engine that draws noise: pixels don't matter, but the same spec and seed always give the same."""

import json
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from uuid import UUID

import numpy as np
import pytest

from farm.catalog import Model
from farm.errors import RenderFailed
from farm.spec import Spec, shape_key
from tests.chaos.engine import BAD, picture
from workers import engines
from workers.engine import Ask, Pixels, Tick

BREAKS = "the engine breaks down with this"


@dataclass
class Noted:
    """What a tick did: when it began, and which frames took part with how many steps done before."""

    began: float  # seconds since 1970, as the database counts
    frames: dict[UUID, int]


@dataclass
class _Flying:
    ask: Ask
    priority: int
    arrival: int
    done: int = 0


@dataclass
class FakeSteps:
    """Takes the most urgent frames of one shape, so many a tick."""

    model: Model
    cap: int = 4
    tick_s: float = 0.02
    on_tick: Callable[[int], None] = lambda _: None  # before each, with its number
    ticks: list[Noted] = field(default_factory=list)
    resumed: dict[UUID, int] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.flying: dict[UUID, _Flying] = {}
        self._arrivals = 0
        self.parked: Collection[UUID] = ()
        self.thread: int | None = None

    @property
    def frames(self) -> Collection[UUID]:
        return self.flying.keys()

    def add(self, frame: UUID, ask: Ask, *, priority: int, saved: bytes | None = None) -> None:
        self._same_thread()
        if frame in self.flying:
            self.flying[frame].priority = priority
            return
        if ask.spec.prompt == BAD:
            raise RenderFailed(BAD)
        self._arrivals += 1
        flying = self.flying[frame] = _Flying(ask, priority, self._arrivals)
        if saved is not None:
            state = json.loads(saved)
            if state["seed"] == ask.seed:
                flying.done = self.resumed[frame] = state["done"]

    def drop(self, frames: Collection[UUID]) -> None:
        self._same_thread()
        for frame in frames:
            self.flying.pop(frame, None)

    def room(self, spec: Spec) -> int:
        return max(0, self.cap - len(self.flying))

    def tick(self) -> Tick:
        self._same_thread()
        self.on_tick(len(self.ticks))
        order = sorted(self.flying, key=lambda f: (-self.flying[f].priority, self.flying[f].arrival))
        shapes = {f: shape_key(self.flying[f].ask.spec, self.model) for f in order}
        picked = [f for f in order if shapes[f] == shapes[order[0]]][: self.cap]
        self.ticks.append(Noted(time.time(), {f: self.flying[f].done for f in picked}))
        if any(self.flying[f].ask.spec.prompt == BREAKS for f in picked):
            raise RuntimeError(BREAKS)
        time.sleep(self.tick_s)
        self.parked = [f for f in order if f not in picked]
        steps, ended = {}, {}
        for frame in picked:
            flying = self.flying[frame]
            flying.done += 1
            steps[frame] = (flying.done, flying.ask.spec.steps)
            if flying.done == flying.ask.spec.steps:
                ended[frame] = picture(flying.ask.spec, flying.ask.seed)
                del self.flying[frame]
        self.seconds += self.tick_s
        share = self.tick_s / len(picked)
        return Tick(shapes[picked[0]], len(picked), steps, ended, self.tick_s, dict.fromkeys(picked, share))

    def save(self, frame: UUID) -> bytes | None:
        self._same_thread()
        flying = self.flying[frame]
        return json.dumps({"done": flying.done, "seed": flying.ask.seed}).encode() if flying.done else None

    def preview(self, frame: UUID) -> Pixels | None:
        flying = self.flying[frame]
        return np.full((8, 8, 3), 10 * flying.done, dtype=np.uint8) if flying.done else None

    def _same_thread(self) -> None:
        """One thread calls it."""
        self.thread = self.thread or threading.get_ident()
        assert self.thread == threading.get_ident()


class Device:
    """The fake engines of a test's workers, made where a worker would load a checkpoint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, cap: int = 4, tick_s: float = 0.02) -> None:
        self.cap, self.tick_s = cap, tick_s
        self.on_tick: Callable[[int], None] = lambda _: None
        self.engines: list[FakeSteps] = []
        monkeypatch.setattr(engines, "open_step_engine", self._open)

    def _open(self, model: Model, *, device: str) -> FakeSteps:
        made = FakeSteps(model, self.cap, self.tick_s, lambda n: self.on_tick(n))  # noqa: PLW0108
        self.engines.append(made)
        return made

    @property
    def ticks(self) -> list[Noted]:
        return [tick for engine in self.engines for tick in engine.ticks]
