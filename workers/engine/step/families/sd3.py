"""Stable Diffusion 3 and 3.5."""

from typing import Any

import torch

from farm.spec import Spec
from workers.engine.step.families.family import Family, Rows
from workers.engine.step.families.shift import dynamic_shift
from workers.engine.step.loras import CONDITION
from workers.engine.step.record import Record
from workers.engine.step.text import Encoded

TEXT_TOKENS = 256  # of T5; every row has as many: without a mask ragged ones would change their neighbours


class StableDiffusion3(Family):
    """A transformer; two CLIPs and T5 in one sequence, and the pooled text."""

    init_scaled = False
    refused = frozenset({"control", "clip_skip", "prompt_weights", "long_prompt"})

    @property
    def denoiser(self) -> Any:
        return self.pipe.transformer

    def schedule(self, spec: Spec, height: int, width: int) -> dict[str, Any]:
        if not self._sampler_config.get("use_dynamic_shifting"):
            return {}
        patch = self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size
        return {
            "mu": dynamic_shift(self._sampler_config, (height // patch) * (width // patch), max_shift=1.16)
        }

    def encode(self, text: str) -> Encoded:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            text,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_TOKENS,
        )
        return {"text": embeds, "pooled": pooled}

    def denoise(self, rows: Rows) -> torch.Tensor:
        with self.loras.in_forward(rows.conditions.get(CONDITION)):
            predicted: torch.Tensor = self.pipe.transformer(
                hidden_states=rows.sample,
                timestep=rows.times,
                encoder_hidden_states=rows.conditions["text"],
                pooled_projections=rows.conditions["pooled"],
                return_dict=False,
            )[0]
        return predicted

    def decode(self, record: Record) -> torch.Tensor:
        if record.ask.inputs.mask is None:
            return super().decode(record)
        # diffusers 0.42.1's inpainting pipeline leaves the shift out, and so frames come out the same everywhere
        return self.picture(
            record.latents - self.pipe.vae.config.shift_factor * self.pipe.vae.config.scaling_factor
        )

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        shift: float = self.pipe.vae.config.shift_factor
        return super().unscaled(latents) + shift
