"""What makes a loaded pipeline faster, as its catalog entry says. Pixels stay within the parity tolerance.

Measured with the starter (3.7 M parameters, latents of 16 × 16, 20 guided steps, one thread of an EPYC, CPU time an
image, 2026): a pack of 16 took 316 ms stock, 303 with channels_last, 309 with kept text, 303 with both; one frame
alone 458, 488, 446, 459. What remains are convolutions at the core's peak (110 of 118 GFLOP/s).
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from farm.catalog import Model
from farm.errors import Misconfigured

CONVOLUTIONS = ("unet", "vae", "movq")  # what channels_last is for: a transformer has no images inside
FP8_CAPABILITY = (8, 9)  # Ada and Hopper on
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def speed_up(pipe: Any, model: Model, *, device: str) -> None:
    """Change a pipeline that lies on its device already.

    Raises Misconfigured naming what this device, this checkpoint or this installation cannot do.
    """
    speed, denoiser = model.speed, denoiser_of(pipe)
    if speed.channels_last:
        for name in CONVOLUTIONS:
            if getattr(pipe, name, None) is not None:
                getattr(pipe, name).to(memory_format=torch.channels_last)
    if speed.fused_qkv:
        _fuse(denoiser, model)
    elif device == "cpu":
        keep_text(denoiser)
    if device == "cuda":
        if speed.fp8:
            to_fp8(denoiser, model)
        if speed.compile:
            compile_blocks(denoiser, model)
    if speed.attention != "auto":
        _attend_by(denoiser, BACKENDS[speed.attention])


def denoiser_of(pipe: Any) -> Any:
    """The part that runs at every step: the UNet, or the transformer."""
    return getattr(pipe, "unet", None) or pipe.transformer


# ------------------------------------------------------------------------------------------------ text


def keep_text(denoiser: Any) -> None:
    """Let cross attention keep the keys and values of a text from step to step: they do not change.

    They are found by the tensor itself, which stock pipelines make once a call; whoever makes a new one each step
    gains and loses nothing. A LoRA's share is computed beside it, each time. On a GPU the memory is worth more.
    """
    for name, part in denoiser.named_modules():
        if name.endswith("attn2"):
            for linear in (part.to_k, part.to_v):
                if type(linear) is torch.nn.Linear:
                    linear.forward = _kept(linear.forward)  # type: ignore[assignment]


def _kept(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    of: Callable[[], torch.Tensor | None] = lambda: None  # noqa: E731 - a weak reference that leads nowhere
    result = torch.empty(0)

    @wraps(forward)
    def kept(text: torch.Tensor) -> torch.Tensor:
        nonlocal of, result
        if of() is not text:
            of, result = weakref.ref(text), forward(text)
        return result

    return kept


# ------------------------------------------------------------------------------------------------ GPU


def _fuse(denoiser: Any, model: Model) -> None:
    if model.loras:
        raise Misconfigured(
            "speed.fused_qkv has no place for LoRAs", model=model.name, setting="speed.fused_qkv"
        )
    try:
        denoiser.fuse_qkv_projections()
    except (AttributeError, ValueError) as e:  # ValueError: added key and value projections
        raise Misconfigured(
            f"{type(denoiser).__name__} cannot fuse its projections: {e}",
            model=model.name,
            setting="speed.fused_qkv",
        ) from e


def compile_blocks(denoiser: Any, model: Model) -> None:
    """Compile the blocks that repeat, for any number of rows from 2 on: seconds instead of minutes."""
    if not getattr(denoiser, "_repeated_blocks", None):
        raise Misconfigured(
            f"diffusers names no repeated blocks of {type(denoiser).__name__}",
            model=model.name,
            setting="speed.compile",
        )
    denoiser.compile_repeated_blocks(fullgraph=True, dynamic=True)


def to_fp8(denoiser: Any, model: Model) -> None:
    """Let the large matrices multiply in 8 bits, scaled by row. Within FP8_LEVELS of the same model without."""
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise Misconfigured(
            f"{torch.cuda.get_device_name()} has no FP8", model=model.name, setting="speed.fp8"
        )
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as e:
        raise Misconfigured(
            "FP8 wants torchao: pip install 'image-farm[fp8]'", model=model.name, setting="speed.fp8"
        ) from e
    quantize_(denoiser, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=fits_fp8)


def fits_fp8(part: torch.nn.Module, name: str) -> bool:
    """Whether a layer is worth it: large, in multiples of 16, and neither the first nor the last."""
    if not isinstance(part, torch.nn.Linear) or name.startswith(("time_", "proj_out", "norm_out", "x_embed")):
        return False
    wide, narrow = max(part.weight.shape), min(part.weight.shape)
    return narrow >= 512 and wide % 16 == 0 and narrow % 16 == 0


FP8_LEVELS = 40  # of 255, between FP8 and not, at the worst pixel; to be narrowed on a GPU


def _attend_by(denoiser: Any, backend: SDPBackend) -> None:
    """Prefer one kernel; where it does not fit (masks, odd heads), the others stand in."""
    order = list(dict.fromkeys([backend, *BACKENDS.values()]))
    forward = denoiser.forward

    @wraps(forward)
    def under(*args: Any, **kwargs: Any) -> Any:
        preferred: AbstractContextManager[None] = sdpa_kernel(order, set_priority=True)
        with preferred:
            return forward(*args, **kwargs)

    denoiser.forward = under
