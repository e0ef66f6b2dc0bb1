"""One frame in flight: all that is needed to go on from its next step."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import torch

from workers.engine import Ask
from workers.engine.samplers import copied, takes_generator


@dataclass(slots=True, kw_only=True, eq=False)
class Record:
    """A frame between two steps. `step` leaves it as it is; `commit` moves it on.

    What other inputs bring has its place here: `first` for images that begin later, `extra` for channels of an
    inpainting UNet, `after` for a mask, `conditions` for whatever else goes into the forward by rows, and
    `following` for a second pass.
    """

    frame: UUID
    ask: Ask
    sampler: Any
    latents: torch.Tensor  # (1, …), what the sampler steps on
    conditions: Mapping[str, torch.Tensor]  # each (rows, …): unconditional first, then conditional
    rows: int  # 2 with a negative prompt, otherwise 1
    guidance: float
    generator: torch.Generator
    shape: Hashable  # frames of equal shape can share a forward
    height: int  # of the image this pass makes, in pixels
    width: int
    first: int = 0  # where in the sampler's timesteps it began
    extra: torch.Tensor | None = None  # (1, channels, height, width), after the scaled latents
    after: Callable[[torch.Tensor, int], torch.Tensor] | None = None  # (new latents, their index) → latents
    following: Callable[["Record"], "Record"] | None = None  # makes the next pass when this one has ended
    stage: int = 0  # which pass this is
    steps_before: int = 0  # of earlier passes
    steps_later: int = 0  # of passes to come

    priority: int = 0
    arrival: int = 0  # rises
    waiting_since: float = 0.0  # when it was last picked, or came
    strict: bool = False
    index: int = 0  # of the next step in the sampler's timesteps
    guess: torch.Tensor | None = None  # the last step's idea of the image
    owed_s: float = 0.0  # device time that no tick has told of yet
    ran_out_alone: int = 0
    times: list[float] = field(default_factory=list)  # the sampler's timesteps as numbers
    pristine: Any = None  # the sampler before its first step

    def __post_init__(self) -> None:
        self.index = self.first
        self.pristine = self.sampler
        self.times = self.sampler.timesteps.tolist()
        if hasattr(self.sampler, "set_begin_index"):
            self.sampler.set_begin_index(self.first)

    @property
    def steps(self) -> tuple[int, int]:
        """Steps done, steps in all; a sampler of two stages counts each."""
        before, all_here = self.steps_before, len(self.times) - self.first
        return before + self.index - self.first, before + all_here + self.steps_later

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def told(self) -> float:
        """The device time owed, which is none from now on."""
        owed_s, self.owed_s = self.owed_s, 0.0
        return owed_s

    @property
    def ended(self) -> bool:
        return self.index >= len(self.times)

    def scaled(self) -> torch.Tensor:
        """The latents as the denoiser takes them."""
        scaled = self.latents
        if hasattr(self.sampler, "scale_model_input"):  # flow matching has none
            scaled = self.sampler.scale_model_input(scaled, self._timestep)
        return scaled if self.extra is None else torch.cat([scaled, self.extra], dim=1)

    @property
    def _timestep(self) -> torch.Tensor:
        timestep: torch.Tensor = self.sampler.timesteps[self.index]
        return timestep

    def step(self, predicted: torch.Tensor) -> "Stepped":
        """One step of this frame's own sampler; nothing here changes until commit()."""
        sampler, generator, more = copied(self.sampler), self.generator, {}
        if takes_generator(sampler.__class__):
            generator = generator.clone_state()
            more["generator"] = generator
        latents, *rest = sampler.step(predicted, self._timestep, self.latents, return_dict=False, **more)
        if latents.dtype != self.latents.dtype:
            latents = latents.to(self.latents.dtype)
        if self.after is not None:
            latents = self.after(latents, self.index + 1)
        return Stepped(self, sampler, generator, latents, rest[0] if rest else _last_output(sampler))


@dataclass(slots=True)
class Stepped:
    """What a step made of a frame, to be taken once every frame of the tick has one."""

    record: Record
    sampler: Any
    generator: torch.Generator
    latents: torch.Tensor
    guess: torch.Tensor | None

    def commit(self) -> None:
        record = self.record
        record.sampler, record.generator, record.latents = self.sampler, self.generator, self.latents
        record.guess = self.guess
        record.index += 1


def _last_output(sampler: Any) -> torch.Tensor | None:
    """Multistep samplers keep what they took the image to be."""
    outputs = getattr(sampler, "model_outputs", None)
    return outputs[-1] if outputs else None
