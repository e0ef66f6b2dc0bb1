"""A small picture of latents: one pixel each, by the linear map that comes nearest to the decoder."""

import numpy as np
import torch

from workers.engine import Pixels
from workers.engine.step.families.family import Family
from workers.engine.step.record import Record

PATCHES = 12  # along each side of the random latents the map is fitted to
PATCH = 2  # latents along each side of a patch


class Previews:
    """Previews of one family; the map is fitted to its own decoder, once, when the first is asked for."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._map: torch.Tensor | None = None  # (channels + 1, 3)

    def of(self, record: Record) -> Pixels:
        """What a frame looks like now, (latent height, latent width, 3)."""
        latents = record.latents if record.guess is None else record.guess
        spatial = self._family.spatial(latents, record.height, record.width)[0].float()
        if record.guess is None:  # with its noise, whose size depends on the sampler
            spatial = spatial / spatial.std().clamp(min=1)
        if self._map is None:
            self._map = self._fitted(len(spatial)).to(spatial.device)
        colours = spatial.flatten(1).T @ self._map[:-1] + self._map[-1]
        pixels: Pixels = (colours.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        return np.ascontiguousarray(pixels.reshape(*spatial.shape[1:], 3))

    def _fitted(self, channels: int) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(0)
        patches = torch.randn(1, channels, PATCHES, PATCHES, generator=generator)
        latents = patches.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
        picture = self._family.picture(latents.to(self._family.device)).float().cpu()
        scale = picture.shape[-1] // PATCHES
        colours = torch.nn.functional.avg_pool2d(picture, scale).flatten(1).T
        known = torch.cat([patches[0].flatten(1).T, torch.ones(PATCHES**2, 1)], dim=1)
        fitted: torch.Tensor = torch.linalg.lstsq(known, colours).solution
        return fitted
