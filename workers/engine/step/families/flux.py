"""FLUX.1 dev and schnell: guidance is embedded, so every frame is one row."""

from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from farm.spec import Spec
from workers.engine.step.families.family import Family, Rows
from workers.engine.step.families.shift import dynamic_shift
from workers.engine.step.loras import CONDITION
from workers.engine.step.text import Encoded


class Flux(Family):
    """A transformer over latents packed two by two; T5 as the sequence, CLIP pooled."""

    init_scaled = False
    refused = frozenset({"control", "clip_skip", "prompt_weights", "long_prompt"})

    @property
    def denoiser(self) -> Any:
        return self.pipe.transformer

    @property
    def two_rows(self) -> bool:
        return False

    @property
    def channels(self) -> int:
        return int(self.denoiser.config.in_channels) // 4

    @property
    def text_tokens(self) -> int:
        """Every row has as many: dev was trained with 512, schnell with 256."""
        return 512 if self.denoiser.config.guidance_embeds else 256

    def _patches(self, pixels: int) -> int:
        return pixels // (2 * int(self.pipe.vae_scale_factor))

    def schedule(self, spec: Spec, height: int, width: int) -> dict[str, Any]:
        config = self._sampler_config
        tokens = self._patches(height) * self._patches(width)
        sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / spec.steps, spec.steps)
        return {"sigmas": sigmas, "mu": dynamic_shift(config, tokens, max_shift=1.15)}

    def noise(self, generator: torch.Generator, height: int, width: int) -> torch.Tensor:
        high, wide = 2 * self._patches(height), 2 * self._patches(width)
        shape = (1, self.channels, high, wide)
        noise = randn_tensor(shape, generator=generator, device=torch.device(self.device), dtype=self.dtype)
        packed: torch.Tensor = self.pipe._pack_latents(noise, 1, self.channels, high, wide)
        return packed

    def conditions(self, spec: Spec, height: int, width: int) -> dict[str, torch.Tensor]:
        conditions = super().conditions(spec, height, width)
        if self.denoiser.config.guidance_embeds:
            conditions["guidance"] = torch.full([1], spec.guidance, device=self.device, dtype=torch.float32)
        return conditions

    def encode(self, text: str) -> Encoded:
        embeds, pooled, _ = self.pipe.encode_prompt(
            text, None, device=self.device, max_sequence_length=self.text_tokens
        )
        return {"text": embeds, "pooled": pooled}

    def denoise(self, rows: Rows) -> torch.Tensor:
        text = rows.conditions["text"]
        height, width = rows.shape[:2]  # type: ignore[index]
        image_ids = self.pipe._prepare_latent_image_ids(
            1, self._patches(height), self._patches(width), text.device, text.dtype
        )
        with self.loras.in_forward(rows.conditions.get(CONDITION)):
            predicted: torch.Tensor = self.pipe.transformer(
                hidden_states=rows.sample,
                timestep=rows.times.to(rows.sample.dtype) / 1000,
                guidance=rows.conditions.get("guidance"),
                pooled_projections=rows.conditions["pooled"],
                encoder_hidden_states=text,
                txt_ids=torch.zeros(text.shape[1], 3, device=text.device, dtype=text.dtype),
                img_ids=image_ids,
                return_dict=False,
            )[0]
        return predicted

    def spatial(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        unpacked: torch.Tensor = self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor)
        return unpacked

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        shift: float = self.pipe.vae.config.shift_factor
        return super().unscaled(latents) + shift
