"""Frames that start from images, step by step: they begin at a later step, and share forwards with all others.

The images are prepared by the stock pipelines' own functions, one frame at a time, in the order in which those draw
from the frame's generator: so a frame equals the stock pipeline's.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from workers.engine import Ask
from workers.engine.modes import MASK, Modes, kind_of
from workers.engine.samplers import copied

After = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Start:
    """Where a frame's denoising begins."""

    latents: torch.Tensor
    first: int  # in the sampler's timesteps
    after: After | None = None  # what a mask does to each step's latents
    extra: torch.Tensor | None = None  # channels of an inpainting UNet: mask and masked image


def first_of(ask: Ask, sampler: Any) -> int:
    """Where in the sampler's timesteps the steps begin that run."""
    (run, *_) = ask.spec.passes
    return (run.schedule - run.steps) * int(getattr(sampler, "order", 1))


def start(
    modes: Modes, ask: Ask, sampler: Any, generator: torch.Generator, *, channels: int, dtype: torch.dtype
) -> Start:
    """Encode a frame's image and add the noise of its first step; sampler: the frame's own, prepared."""
    first, kind = first_of(ask, sampler), kind_of(ask)
    if hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(first)
    pipe = modes.pipeline(kind)
    pipe.scheduler = sampler
    vae_dtype = pipe.vae.dtype
    try:
        given = {
            "batch_size": 1,
            "num_images_per_prompt": 1,
            "num_channels_latents": channels,
            "height": ask.spec.height,
            "width": ask.spec.width,
            "timestep": sampler.timesteps[first : first + 1],
            "dtype": dtype,
            "device": torch.device(modes.device),
            "generator": generator,
        }
        return (_masked if kind == MASK else _plain)(pipe, ask, first, given)
    finally:  # SDXL's leaves it in float16, where it overflows
        if pipe.vae.dtype != vae_dtype:
            pipe.vae.to(vae_dtype)


def _called(function: Any, **values: Any) -> Any:
    """Call with those of the values it takes: the families' functions differ in that."""
    takes = inspect.signature(function).parameters
    return function(**{name: value for name, value in values.items() if name in takes})


def _plain(pipe: Any, ask: Ask, first: int, given: dict[str, Any]) -> Start:
    assert ask.inputs.image is not None
    made = _called(
        pipe.prepare_latents,
        image=pipe.image_processor.preprocess(Image.fromarray(ask.inputs.image)),
        **given,
    )
    return Start(made[0] if isinstance(made, tuple) else made, first)


def _masked(pipe: Any, ask: Ask, first: int, given: dict[str, Any]) -> Start:
    assert ask.inputs.image is not None
    assert ask.inputs.mask is not None
    height, width = ask.spec.height, ask.spec.width
    image = pipe.image_processor.preprocess(Image.fromarray(ask.inputs.image), height=height, width=width)
    image = image.to(torch.float32)
    channels = given["num_channels_latents"]
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    blended = denoiser.config.in_channels in (channels, 4 * channels)  # FLUX's are packed two by two
    made = _called(
        pipe.prepare_latents,
        image=image,
        is_strength_max=first == 0,
        add_noise=True,
        return_noise=True,
        return_image_latents=blended,
        **given,
    )
    shape = pipe.mask_processor.preprocess(Image.fromarray(ask.inputs.mask), height=height, width=width)
    mask, masked = _called(
        pipe.prepare_mask_latents,
        mask=shape,
        masked_image=image * (shape < 0.5),
        do_classifier_free_guidance=False,
        **given,
    )
    if not blended:
        return Start(made[0], first, extra=torch.cat([mask, masked], dim=1))
    latents, noise, kept = made[:3]
    return Start(latents, first, after=_keeping(pipe.scheduler, kept, noise, mask))


def _keeping(sampler: Any, image: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor) -> After:
    """After each step put back what the mask keeps, as noisy as the next step takes it."""
    pristine, count = copied(sampler), len(sampler.timesteps)

    def after(latents: torch.Tensor, index: int) -> torch.Tensor:
        kept = image
        if index < count:
            twin = copied(pristine)
            twin._step_index = index
            time = pristine.timesteps[index : index + 1]
            if hasattr(twin, "scale_noise"):
                kept = twin.scale_noise(image, time, noise)
            else:
                kept = twin.add_noise(image, noise, time)
        return (1 - mask) * kept + mask * latents

    return after
