"""Stable Diffusion XL: base, Turbo, and LCM with its embedded guidance."""

from collections.abc import Mapping
from typing import Any

import torch

from farm.catalog import Model
from farm.spec import Spec
from workers.engine.step.families.sd import StableDiffusion
from workers.engine.step.text import Encoded


class StableDiffusionXL(StableDiffusion):
    """A UNet; two CLIPs side by side, the pooled text and the size as embeddings of their own."""

    def __init__(self, pipe: Any, model: Model, *, device: str) -> None:
        super().__init__(pipe, model, device=device)
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.get("force_upcast"):
            pipe.vae.to(torch.float32)  # it overflows in float16; the stock pipeline casts for every image

    def conditions(self, spec: Spec, height: int, width: int) -> dict[str, torch.Tensor]:
        conditions = super().conditions(spec, height, width)
        conditions["time_ids"] = self._time_ids(height, width).repeat(self.rows(spec), 1)
        return conditions

    def _time_ids(self, height: int, width: int) -> torch.Tensor:
        encoder = self.pipe.text_encoder_2
        ids: torch.Tensor = self.pipe._get_add_time_ids(
            (height, width),
            (0, 0),
            (height, width),
            dtype=self.dtype,
            text_encoder_projection_dim=encoder.config.projection_dim,
        )
        return ids.to(self.device)

    def negative(self, spec: Spec, positive: Encoded) -> Encoded:
        if not spec.negative_prompt and self.pipe.config.get("force_zeros_for_empty_prompt"):
            return {name: torch.zeros_like(t) for name, t in positive.items()}
        return super().negative(spec, positive)

    def encode(self, text: str) -> Encoded:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            text, device=self.device, do_classifier_free_guidance=False
        )
        return {"text": embeds, "pooled": pooled}

    def added(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        return {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return super().unscaled(latents)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(latents.device, latents.dtype) for v in (mean, std))
        unscaled: torch.Tensor = latents * std / config.scaling_factor + mean
        return unscaled
