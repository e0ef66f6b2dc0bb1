"""What follows a pipeline's first image: DeepFloyd IF's super-resolution, from small pixels to large ones."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from farm.catalog import Model, Stage
from workers.engine import checkpoint
from workers.engine.loading import load_from
from workers.engine.samplers import fresh_sampler

TEXT = ("prompt_embeds", "negative_prompt_embeds")


@dataclass(frozen=True)
class LaterStage:
    """A stage's stock pipeline, which takes the text as the first stage has encoded it."""

    entry: Stage
    pipe: Any
    sampler_config: Mapping[str, Any]

    def images(
        self,
        images: torch.Tensor,
        text: Mapping[str, Any],
        generators: Sequence[Any],
        hook: Mapping[str, Any],
    ) -> torch.Tensor:
        """Make images, (rows, 3, height, width) in −1 … 1, as many times larger as the entry says."""
        entry = self.entry
        self.pipe.scheduler = fresh_sampler(entry.sampler, self.sampler_config, steps=entry.steps)
        larger: torch.Tensor = self.pipe(
            image=images,
            height=images.shape[-2] * entry.factor,
            width=images.shape[-1] * entry.factor,
            num_inference_steps=entry.steps,
            guidance_scale=entry.guidance,
            generator=list(generators),
            output_type="pt",
            **{name: text[name] for name in TEXT if name in text},
            **hook,
        ).images
        return larger


def open_stages(model: Model, *, device: str) -> list[LaterStage]:
    """Load what follows a model's first stage; nothing for most models.

    Raises Misconfigured and OutOfMemory as load() does.
    """
    opened = []
    for entry, place in zip(model.stages, checkpoint.stage_folders(model), strict=True):
        pipe = load_from(place, entry.pipeline, model, device=device, text_encoder=None)
        assert "image" in inspect.signature(pipe.__call__).parameters, entry.pipeline
        opened.append(LaterStage(entry, pipe, pipe.scheduler.config))
    return opened
