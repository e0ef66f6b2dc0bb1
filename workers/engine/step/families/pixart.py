"""PixArt Alpha and Sigma."""

from typing import Any, ClassVar

import torch
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as alpha
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma

from farm.spec import Spec
from workers.engine.step.families.family import Family, Rows
from workers.engine.step.text import Encoded

Bins = dict[str, list[float]]


class PixArt(Family):
    """A transformer with T5 behind a mask; denoises at the trained size next to the one that was asked for."""

    text_tokens: ClassVar[int] = 120
    bins: ClassVar[dict[int, Bins]] = {  # by the transformer's sample_size
        32: alpha.ASPECT_RATIO_256_BIN,
        64: alpha.ASPECT_RATIO_512_BIN,
        128: alpha.ASPECT_RATIO_1024_BIN,
    }
    sized: ClassVar[bool] = True  # whether the largest of them is told its size

    @property
    def denoiser(self) -> Any:
        return self.pipe.transformer

    @property
    def _bins(self) -> Bins | None:
        return self.bins.get(self.denoiser.config.sample_size)

    def size(self, spec: Spec) -> tuple[int, int]:
        if self._bins is None:
            return spec.height, spec.width
        height, width = self.pipe.image_processor.classify_height_width_bin(
            spec.height, spec.width, ratios=self._bins
        )
        return height, width

    def conditions(self, spec: Spec, height: int, width: int) -> dict[str, torch.Tensor]:
        conditions = super().conditions(spec, height, width)
        if self.sized and self.denoiser.config.sample_size == 128:
            rows, facts = self.rows(spec), {"resolution": [height, width], "aspect_ratio": [height / width]}
            for name, fact in facts.items():
                row = torch.tensor([fact], dtype=self.dtype, device=self.device)
                conditions[name] = row.repeat(rows, 1)
        return conditions

    def encode(self, text: str) -> Encoded:
        # clean_caption would make pixels depend on which libraries are installed
        embeds, mask, _, _ = self.pipe.encode_prompt(
            text, False, device=self.device, clean_caption=False, max_sequence_length=self.text_tokens
        )
        return {"text": embeds, "mask": mask}

    def denoise(self, rows: Rows) -> torch.Tensor:
        conditions = rows.conditions
        predicted: torch.Tensor = self.pipe.transformer(
            rows.sample,
            encoder_hidden_states=conditions["text"],
            encoder_attention_mask=conditions["mask"],
            timestep=rows.times,
            added_cond_kwargs={name: conditions.get(name) for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        if predicted.shape[1] == 2 * self.channels:  # the other half is a learned variance
            predicted = predicted.chunk(2, dim=1)[0]
        return predicted

    def resized(self, image: torch.Tensor, spec: Spec) -> torch.Tensor:
        if self._bins is None:
            return image
        resized: torch.Tensor = self.pipe.image_processor.resize_and_crop_tensor(
            image, spec.width, spec.height
        )
        return resized


class PixArtSigma(PixArt):
    """Longer text, a size up to 2048, and no word about the size."""

    text_tokens = 300
    bins: ClassVar[dict[int, Bins]] = {**PixArt.bins, 256: sigma.ASPECT_RATIO_2048_BIN}
    sized = False
