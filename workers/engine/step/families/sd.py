"""Stable Diffusion 1.5 and 2.1, with epsilon or v-prediction."""

from collections.abc import Mapping
from typing import Any

import torch

from farm.spec import Spec
from workers.engine.step import control
from workers.engine.step.families.family import Family, Rows, guidance_embedding
from workers.engine.step.loras import CONDITION
from workers.engine.step.text import Encoded


class StableDiffusion(Family):
    """A UNet; text is 77 tokens of CLIP, or as many chunks of that as asked for."""

    refused = frozenset()

    @property
    def denoiser(self) -> Any:
        return self.pipe.unet

    @property
    def two_rows(self) -> bool:
        return self.pipe.unet.config.time_cond_proj_dim is None

    def conditions(self, spec: Spec, height: int, width: int) -> dict[str, torch.Tensor]:
        conditions = super().conditions(spec, height, width)
        if not self.two_rows:
            conditions["timestep_cond"] = guidance_embedding(
                self.pipe, spec.guidance, self.pipe.unet, dtype=self.dtype, device=self.device
            )
        return conditions

    def encode(self, text: str) -> Encoded:
        embeds, _ = self.pipe.encode_prompt(text, self.device, 1, False)
        return {"text": embeds}

    def denoise(self, rows: Rows) -> torch.Tensor:
        given = rows.conditions
        added = self.added(given)
        nets = control.residuals(self.modes, rows.sample, rows.times, given, added)
        with self.loras.in_forward(given.get(CONDITION)):
            predicted: torch.Tensor = self.pipe.unet(
                rows.sample,
                rows.times,
                encoder_hidden_states=given["text"],
                timestep_cond=given.get("timestep_cond"),
                added_cond_kwargs=added,
                return_dict=False,
                **nets,
            )[0]
        return predicted

    def added(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """What the UNet takes beside text and time."""
        return None
