"""What an engine is. Two kinds, and the catalog says which one serves a model:

Engine renders frames that share a call key from start to end ("pipe"); StepEngine has frames of any settings in
flight and does one denoiser forward a tick ("step"). Importing this costs no torch: the process that
chooses the GPUs must not load it.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, assert_never
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from farm.catalog import Model
from farm.errors import Misconfigured, RenderFailed
from farm.spec import Spec

os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")  # read when diffusers is imported

Pixels = NDArray[np.uint8]  # RGB, shape (height, width, 3)
OnStep = Callable[[int, int], None]  # steps done, steps in all


class Cancelled(Exception):
    """Nobody wants the rest of this pack: raise it in on_step to stop."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a frame's input files hold, decoded; nothing for a frame that has only text."""

    image: Pixels | None = None
    mask: NDArray[np.uint8] | None = None  # (height, width), 255 where to paint
    controls: tuple[Pixels, ...] = ()  # one a control net, in the spec's order
    loras: tuple[Path, ...] = ()  # one a LoRA, in the spec's order


NO_INPUTS = Inputs()


@dataclass(frozen=True, slots=True)
class Ask:
    """One frame to render."""

    spec: Spec
    seed: int
    inputs: Inputs = NO_INPUTS


class Engine(Protocol):
    """A checkpoint, loaded on a device."""

    def render(self, asks: Sequence[Ask], *, on_step: OnStep) -> list[Pixels | RenderFailed]:
        """Render asks that share a call key, one result an ask, in order.

        A frame that went wrong alone (NaN, all black) is a RenderFailed in its place; the others are good.
        on_step is called after each denoising step; what it raises stops the pack and comes out here.

        Raises OutOfMemory if a smaller pack may fit; RenderFailed if the whole pack went wrong. After
        either, and after Cancelled, the engine can go on. Anything else means the device is lost.
        """
        ...


@dataclass(frozen=True, slots=True)
class Tick:
    """What one forward did."""

    shape_key: str  # "" when nothing was in flight
    rows: int  # of the forward, padding not counted
    steps: Mapping[UUID, tuple[int, int]]  # of the frames that took part: steps done, steps in all
    done: Mapping[UUID, Pixels | RenderFailed]  # frames that left
    seconds: float  # device time, what it decoded included
    shares: Mapping[UUID, float]  # each frame's seconds; together they are `seconds`


class StepEngine(Protocol):
    """A checkpoint, loaded on a device, with frames in flight that move on by a step each tick.

    One thread calls it.
    """

    @property
    def frames(self) -> Collection[UUID]:
        """The frames in flight: added, and neither done nor dropped."""
        ...

    @property
    def parked(self) -> Collection[UUID]:
        """Of the frames in flight those that the last tick did not pick."""
        ...

    def add(self, frame: UUID, ask: Ask, *, priority: int, saved: bytes | None = None) -> None:
        """Take a frame in; the next tick may pick it. A frame in flight only takes the new priority.

        Resumes where `saved` was made; a saved state that does not fit (other model, other spec, damaged) is
        ignored, and the frame starts at its first step.

        Raises RenderFailed if the frame's own inputs break, OutOfMemory if they do not fit: nothing is in
        flight then. Anything else means that the device or the model is lost.
        """
        ...

    def drop(self, frames: Collection[UUID]) -> None:
        """Forget these frames; those not in flight are ignored. Their neighbours are not changed."""
        ...

    def room(self, spec: Spec) -> int:
        """How many more frames like this the next tick would take, if they were all as urgent as those in flight."""
        ...

    def tick(self) -> Tick:
        """One forward for the frames picked by priority, arrival and ageing; those that end are decoded.

        Memory that ran out is handled here: the cap of that shape is halved and the tick repeated. A frame that
        ran out alone, twice, is done with OutOfMemory. Any exception means that the device or the model
        is lost, and every frame in flight with it.
        """
        ...

    def save(self, frame: UUID) -> bytes | None:
        """A frame's state as safetensors, for add(saved=…) of any worker with this model.

        None if it is not in flight, or cannot be saved: that costs time alone.
        """
        ...

    def preview(self, frame: UUID) -> Pixels | None:
        """A small picture of what a frame looks like now, one pixel a latent; None before its first step."""
        ...


def open_engine(model: Model, *, device: str) -> Engine:
    """Load the checkpoint of a model whose engine is "pipe" onto a device: "cpu" or "cuda".

    Raises Misconfigured naming where the checkpoint was looked for.
    """
    match model.engine:
        case "pipe":
            from workers.engine.pipe import PipeEngine

            return PipeEngine.open(model, device=device)
        case "step":
            raise Misconfigured("this model goes step by step: open_step_engine() opens it", model=model.name)
        case _:
            assert_never(model.engine)


def open_step_engine(model: Model, *, device: str) -> StepEngine:
    """Load the checkpoint of a model whose engine is "step" onto a device: "cpu" or "cuda".

    Raises Misconfigured naming where the checkpoint was looked for, or the pipelines that can go step by step.
    """
    from workers.engine.step.loop import StepLoop

    return StepLoop.open(model, device=device)
