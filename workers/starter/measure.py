"""Measure the shipped weights: `python -m workers.starter.measure` prints the figures of MODEL_CARD.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from transformers import CLIPModel, CLIPTokenizer

from workers.starter import clip_path, path
from workers.starter.pictures import COLOURS, PLACES, SHAPES, SIZES, Picture, Scene, Thing, spot
from workers.starter.reading import Seen, read
from workers.starter.train_clip import captioned_batch
from workers.starter.train_vae import picture_batch

Check = Callable[[Seen, Scene], bool]
CHECKS: dict[str, Check] = {
    "background": lambda seen, scene: seen.background == scene.background,
    "colour": lambda seen, scene: bool(seen.things) and seen.things[0].colour == scene.things[0].colour,
    "shape": lambda seen, scene: bool(seen.things) and seen.things[0].shape == scene.things[0].shape,
    "place": lambda seen, scene: bool(seen.things) and seen.things[0].place == scene.things[0].place,
}
SAMPLERS = (DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, UniPCMultistepScheduler)


def load_pipeline() -> Any:
    """Load the shipped model the way any other is loaded."""
    pipe = StableDiffusionPipeline.from_pretrained(path(), use_safetensors=True, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe: Any, prompts: list[str], seeds: list[int], **options: object) -> list[Picture]:
    """Render prompts, each with its own seed, 24 at a time; 20 steps and guidance 4 unless told."""
    given = {"num_inference_steps": 20, "guidance_scale": 4.0, "output_type": "np"} | options
    pictures: list[Picture] = []
    for first in range(0, len(prompts), 24):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[first : first + 24]]
        images = pipe(prompts[first : first + 24], generator=generators, **given).images
        pictures += list(np.rint(images * 255).astype(np.uint8))
    return pictures


def one_thing(
    shape: str, colour: str, background: str, *, place: str = "centre", size: str = "medium"
) -> Scene:
    """Make the scene of a single shape just where its words put it."""
    x, y = spot(place, SIZES[size], 64, 64)
    return Scene(background, (Thing(shape, colour, x, y, SIZES[size], size, place),))


def asked_scenes(count: int) -> list[Scene]:
    """Make up scenes in which each colour, background, shape and place comes up equally often, within one."""
    lot, scenes = Random(7), []
    pairs = [(one, other) for one in COLOURS for other in COLOURS if one != other]
    for turn in range(count):
        colour, background = pairs[turn * 9 % len(pairs)]
        shape, place = list(SHAPES)[(turn + turn // 56) % len(SHAPES)], PLACES[turn % len(PLACES)]
        scenes.append(one_thing(shape, colour, background, place=place, size=lot.choice(list(SIZES))))
    return scenes


def words_for(scene: Scene) -> str:
    """Put a scene of one thing in words, leaving nothing out."""
    thing = scene.things[0]
    return (
        f"a {thing.size} {thing.colour} {thing.shape} in the {thing.place} on a {scene.background} background"
    )


def shares(pictures: list[Picture], scenes: list[Scene]) -> dict[str, float]:
    """Return, for each check and for each word it can be about, the share of pictures that show it."""
    found: dict[str, list[bool]] = {}
    for picture, scene in zip(pictures, scenes, strict=True):
        seen = read(picture)
        for name, check in CHECKS.items():
            word = scene.background if name == "background" else getattr(scene.things[0], name)
            for key in (name, f"{name} {word}"):
                found.setdefault(key, []).append(check(seen, scene))
    return {key: sum(right) / len(right) for key, right in sorted(found.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=504, help="pictures for the table; others take a fifth")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = load_pipeline()
    scenes = asked_scenes(options.count)
    _tell("20 steps", _show(pipe, scenes), words=True)
    fewer = asked_scenes(options.count // 5)
    for steps in (8, 12):
        _tell(f"{steps} steps", _show(pipe, fewer, num_inference_steps=steps))
    for sampler in SAMPLERS:
        other = StableDiffusionPipeline(
            **{**pipe.components, "scheduler": sampler.from_config(pipe.scheduler.config)},
            requires_safety_checker=False,
        )
        other.set_progress_bar_config(disable=True)
        _tell(sampler.__name__, _show(other, fewer))
    for width, height in ((96, 96), (128, 128), (96, 64)):
        _tell(f"{width}x{height}", _show(pipe, fewer, width=width, height=height))
    _say(f"autoencoder: mean error {_vae_error(pipe.vae):.4f} of 1")
    _say(f"CLIP: {_clip_finds():.3f} of captions found among 100")
    for batch in (1, 8):
        _say(f"{batch} image(s), 20 steps, one thread: {_seconds(pipe, batch):.2f} s")


def _show(pipe: Any, scenes: list[Scene], **options: object) -> dict[str, float]:
    prompts = [words_for(scene) for scene in scenes]
    return shares(paint(pipe, prompts, list(range(len(scenes))), **options), scenes)


def _tell(title: str, shown: dict[str, float], *, words: bool = False) -> None:
    _say(f"{title}: " + ", ".join(f"{name} {shown[name]:.3f}" for name in CHECKS))
    for key, value in shown.items():
        if words and " " in key:
            _say(f"  {key}: {value:.3f}")


@torch.inference_mode()
def _vae_error(vae: Any) -> float:
    pixels = picture_batch(20_000_000, 64, strange=False)
    back = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    return float((back.clamp(-1, 1) - pixels).abs().mean()) / 2


@torch.inference_mode()
def _clip_finds() -> float:
    clip = CLIPModel.from_pretrained(clip_path(), use_safetensors=True, local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(clip_path(), local_files_only=True)
    right = 0
    for first in range(20_000_000, 20_000_500, 100):
        pixels, captions = captioned_batch(first, 100)
        words = tokenizer(captions, padding=True, return_tensors="pt")
        found = clip(pixel_values=pixels, **words).logits_per_image.argmax(1)
        right += int((found == torch.arange(100)).sum())
    return right / 500


def _seconds(pipe: Any, batch: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    took = []
    for _ in range(3):
        began = time.monotonic()
        paint(pipe, ["a red circle on a blue background"] * batch, list(range(batch)))
        took.append(time.monotonic() - began)
    torch.set_num_threads(before)
    return min(took)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
