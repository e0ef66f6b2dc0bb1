"""Step 1: the autoencoder, 64x64 pixels to 16x16 latents of 4 channels and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F  # noqa: N812

from workers.starter.pictures import draw, imagine
from workers.starter.training import Course, fit, ranks

STEPS = 4000
SHARPEN_STEPS = 1500  # of the decoder alone
BATCH = 8
OUTLINE_WEIGHT = 4
KL_SHARE = 5e-4  # enough that the decoder forgives small errors of the denoiser
BLOCKS = (16, 32, 64)
# Of a flat picture a group of two channels keeps one bit, its sign: with 8 groups colours were learned late.
NORM_GROUPS = 2


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(BLOCKS),
        up_block_types=["UpDecoderBlock2D"] * len(BLOCKS),
        block_out_channels=BLOCKS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=NORM_GROUPS,
        sample_size=64,
        mid_block_add_attention=False,
    )


def train_vae(folder: Path) -> AutoencoderKL:
    """Train the autoencoder and scale its latents to unit variance."""
    torch.manual_seed(1)
    vae, count = new_vae(), BATCH // ranks()

    def loss(turn: int) -> torch.Tensor:
        pixels = picture_batch(turn * count, count)
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample - pixels
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        weight = _weight(pixels)
        return (error.abs() * weight).mean() + (error.square() * weight).mean() + KL_SHARE * kl

    fit(vae, loss, Course("vae", STEPS, 2e-3, folder))
    _sharpen(vae, folder)
    latents = encode(vae, picture_batch(10_000_000, 256, strange=False))
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae


def _sharpen(vae: AutoencoderKL, folder: Path) -> None:
    """Train the decoder on while the latents stay what they are: tips of small stars, corners of crosses."""
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    count = BATCH // ranks()

    def loss(turn: int) -> torch.Tensor:
        pixels = picture_batch(5_000_000 + turn * count, count)
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample()
        error = vae.decode(latents).sample - pixels
        return ((error.abs() + error.square()) * _weight(pixels)).mean()

    fit(vae, loss, Course("decoder", SHARPEN_STEPS, 1.5e-3, folder))


def _weight(pixels: torch.Tensor) -> torch.Tensor:
    """Weigh outlines more: a small star is lost in the mean of a flat picture, and is all that was asked for."""
    blurred = F.avg_pool2d(F.pad(pixels, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    near_edge = F.max_pool2d((pixels - blurred).abs().amax(1, keepdim=True), 5, stride=1, padding=2)
    return 1 + OUTLINE_WEIGHT * (near_edge > 0.1)


def picture_batch(first_seed: int, count: int, *, strange: bool = True) -> torch.Tensor:
    """Draw pictures for the seeds from first_seed on; values -1 to 1, shape (count, 3, 64, 64).

    With strange, every eighth has other colours and every fourth is a corner of a larger picture, so that the
    autoencoder also keeps what the denoiser never asks for: pictures that users bring.
    """
    pictures = []
    for seed in range(first_seed, first_seed + count):
        side = 128 if strange and seed % 4 == 0 else 64
        picture = draw(imagine(seed, side, side), side, side)
        x, y = (seed % 7 * (side - 64) // 6, seed % 5 * (side - 64) // 4)
        picture = picture[y : y + 64, x : x + 64]
        if strange and seed % 8 == 1:
            mix = np.random.default_rng(seed).dirichlet((0.5, 0.5, 0.5), 3)
            picture = np.rint(picture @ mix).astype(np.uint8)
        pictures.append(picture)
    return to_tensor(np.stack(pictures))


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """Turn RGB bytes, shape (n, height, width, 3), into -1 to 1, shape (n, 3, height, width)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


@torch.inference_mode()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Return the unscaled latents' means, 32 pictures at a time."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(32)]).clone()
