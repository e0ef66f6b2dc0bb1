"""Step 4: the denoiser, on latents and captions of the steps before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from workers.starter.pictures import Scene, caption, draw, imagine
from workers.starter.train_vae import encode, to_tensor
from workers.starter.training import Course, first_rank_first, fit, ranks

STEPS = 6500
POLISH_STEPS = 3000  # for outlines, once words are understood
BATCH = 32  # of 64x64; fewer of larger pictures, so that each step costs about the same
OBJECT_WEIGHT = 3.0
PLAIN_SHARE = 0.6  # of the rows are picked among single things on plain backgrounds, the rest among all
HARD = {"star": 3, "ring": 2}  # come that many times as often among those
WITHOUT_CAPTION = 0.1  # what guidance steers away from
# (width, height): how many pictures, share of the steps
SHARES = {
    (64, 64): (16_000, 0.82),
    (96, 96): (2_000, 0.05),
    (128, 128): (1_200, 0.04),
    (96, 64): (1_000, 0.03),
    (64, 96): (1_000, 0.03),
    (128, 96): (500, 0.015),
    (96, 128): (500, 0.015),
}


@dataclass(frozen=True)
class Shelf:
    """Encoded pictures of one size and the scenes they show."""

    latents: torch.Tensor  # scaled to unit variance; count, 4, height / 4, width / 4
    scenes: list[Scene]

    def rows(self, count: int) -> list[int]:
        plain = [
            r
            for r, scene in enumerate(self.scenes)
            if len(scene.things) == 1 and scene.style == "plain"
            for _ in range(HARD.get(scene.things[0].shape, 1))
        ]
        lots = torch.rand(count, 2).tolist()
        return [
            plain[int(lot * len(plain))] if first < PLAIN_SHARE else int(lot * len(self.scenes))
            for first, lot in lots
        ]


def new_sampler() -> DPMSolverMultistepScheduler:
    """DPM++ 2M. At the last time 1 % of signal is left: with more, white and black backgrounds turn grey.

    Only settings that every sampler knows, so `from_config` carries them over to any other.
    """
    sampler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.022,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )
    sampler.register_to_config(clip_sample=False)  # DDIM's and DDPM's: latents go beyond 1
    return sampler


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        block_out_channels=[48, 128],
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers means the number of heads
    )


def train_unet(
    folder: Path, tokenizer: CLIPTokenizer, vae: AutoencoderKL, text: CLIPTextModel
) -> UNet2DConditionModel:
    """Train the denoiser; the text encoder stays as it is."""
    torch.manual_seed(4)
    unet, compass = new_unet(), nn.Linear(128, 2)
    with first_rank_first():
        shelves = _shelves(folder / "latents.pt", vae)
    alphas = new_sampler().alphas_cumprod
    middle: list[torch.Tensor] = [torch.empty(0)]
    hook = unet.mid_block.register_forward_hook(lambda _block, _given, out: middle.__setitem__(0, out))

    def loss(turn: int, times: Callable[[int], torch.Tensor]) -> torch.Tensor:
        latents, captions = _pick(shelves, turn)
        words = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        at = (times(len(latents)) * len(alphas)).long().clamp(max=len(alphas) - 1)
        noise = torch.randn_like(latents)
        signal, disorder = (a.sqrt()[at, None, None, None] for a in (alphas, 1 - alphas))
        with torch.no_grad():
            hidden = text(words).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            seen = unet(signal * latents + disorder * noise, at, hidden).sample
        error = (seen.float() - (signal * noise - disorder * latents)).square()
        return (error * _weight(latents)).mean() + 0.1 * _lost(compass(middle[0].float().movedim(1, -1)))

    both = nn.ModuleDict({"unet": unet, "compass": compass})
    fit(both, lambda turn: loss(turn, _late), Course("unet", STEPS, 1.8e-3, folder))
    fit(both, lambda turn: loss(turn, _middle), Course("polish", POLISH_STEPS, 1.2e-3, folder))
    hook.remove()
    return unet


def _lost(position: torch.Tensor) -> torch.Tensor:
    """Compare what the middle block tells of each position, shape (rows, height, width, 2), with the truth.

    A denoiser that knows its left from its right learns the words for places sooner.
    """
    down, across = (torch.linspace(-1, 1, side) for side in position.shape[1:3])
    return (position - torch.stack(torch.meshgrid(down, across, indexing="ij"), -1)).square().mean()


def _late(count: int) -> torch.Tensor:
    """Draw times from 0 to 1, late ones oftener: words decide only while the noise hides the picture."""
    return _from(torch.where(torch.rand(count) < 0.6, 0.45, 0.0), 1.0)


def _middle(count: int) -> torch.Tensor:
    """Draw times, those oftener at which outlines are decided."""
    often = torch.rand(count) < 0.7
    return _from(torch.where(often, 0.3, 0.0), torch.where(often, 0.85, 1.0))


def _from(earliest: torch.Tensor, latest: torch.Tensor | float) -> torch.Tensor:
    return earliest + torch.rand(len(earliest)) * (latest - earliest)


def _weight(latents: torch.Tensor) -> torch.Tensor:
    """Weigh what differs from the top left corner: else the background is all that is learned for long."""
    differs = (latents - latents[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.7
    weight = 1 + (OBJECT_WEIGHT - 1) * differs
    return weight / weight.mean()


def _pick(shelves: list[Shelf], turn: int) -> tuple[torch.Tensor, list[str]]:
    shares = torch.tensor([share for _, share in SHARES.values()])
    shelf = shelves[int(torch.multinomial(shares, 1))]
    count = round(BATCH / ranks() * 256 / shelf.latents[0, 0].numel())
    rows = shelf.rows(count)
    captions = [caption(shelf.scenes[row], turn * BATCH + place) for place, row in enumerate(rows)]
    kept = (torch.rand(count) >= WITHOUT_CAPTION).tolist()
    return shelf.latents[rows], [words if keep else "" for words, keep in zip(captions, kept, strict=True)]


def _shelves(file: Path, vae: AutoencoderKL) -> list[Shelf]:
    kept: dict[str, torch.Tensor] = torch.load(file, weights_only=True) if file.exists() else {}
    shelves = []
    for place, ((width, height), (count, _)) in enumerate(SHARES.items()):
        seeds = range(30_000_000 + place * 1_000_000, 30_000_000 + place * 1_000_000 + count)
        scenes = [imagine(seed, width, height) for seed in seeds]
        name = f"{width}x{height}"
        if name not in kept:
            pictures = np.stack([draw(scene, width, height) for scene in scenes])
            kept[name] = encode(vae, to_tensor(pictures)) * vae.config.scaling_factor
            torch.save(kept, file)
        shelves.append(Shelf(kept[name], scenes))
    return shelves
