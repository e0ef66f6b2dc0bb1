"""What an engine is: it renders frames that share a call key, one result a frame.

Importing this costs no torch: the process that chooses the GPUs must not load it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

import numpy as np
from numpy.typing import NDArray

from farm.catalog import Model
from farm.errors import RenderFailed
from farm.spec import Spec

Pixels = NDArray[np.uint8]  # RGB, shape (height, width, 3)
OnStep = Callable[[int, int], None]  # steps done, steps in all


class Cancelled(Exception):
    """Nobody wants the rest of this pack: raise it in on_step to stop."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One frame to render."""

    spec: Spec
    seed: int


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


def open_engine(model: Model, *, device: str) -> Engine:
    """Load a model's checkpoint onto a device: "cpu" or "cuda".

    Raises Misconfigured naming where the checkpoint was looked for.
    """
    match model.engine:
        case "pipe":
            from workers.engine.pipe import PipeEngine

            return PipeEngine.open(model, device=device)
        case _:
            assert_never(model.engine)
