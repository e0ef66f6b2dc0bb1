"""Run to completion: one stock diffusers pipe() call for frames that share a call key.

What may differ from row to row: prompts, seeds, and guidance where the catalog says so. Works for any
pipeline that takes prompts, generators and a step callback.
"""

import inspect
import os
import re
from collections.abc import Sequence
from typing import Any, Self

os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")  # read when diffusers is imported

import diffusers
import torch
import transformers

from farm.catalog import Model
from farm.errors import Misconfigured, OutOfMemory, RenderFailed
from farm.spec import call_key
from workers.engine import Ask, OnStep, Pixels, checkpoint
from workers.engine.samplers import fresh_sampler
from workers.gpu import release

# Read in diffusers 0.42.1: these say `guidance_scale > 1` and `guidance_scale * (text - uncond)`, no more.
ROWWISE = {"StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"}
NEEDED = {"prompt", "generator", "callback_on_step_end", "output_type"}
NO_MEMORY = re.compile(r"out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED|can't allocate memory")


class RowGuidance(float):
    """A guidance scale for each row, where a pipeline takes one float.

    The rows are multiplied in float32 and rounded once, which is what torch does with a Python float:
    so a row is bit-equal to the stock pipeline's.
    """

    rows: torch.Tensor

    def __new__(cls, scales: Sequence[float], *, device: str) -> Self:
        self = super().__new__(cls, scales[0])  # `> 1` is the same for all: the call key says guided or not
        self.rows = torch.tensor(scales, dtype=torch.float32, device=device).view(-1, 1, 1, 1)
        return self

    def __mul__(self, noise: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return (self.rows * noise).to(noise.dtype)


class PipeEngine:
    """One checkpoint behind its stock pipeline."""

    def __init__(self, model: Model, pipe: Any, *, device: str) -> None:
        self.model = model
        self.pipe = pipe
        self.device = device
        self._takes = set(inspect.signature(pipe.__call__).parameters)
        self._sampler_config = pipe.scheduler.config
        self._vae_dtype = pipe.vae.dtype
        self._check()

    @classmethod
    def open(cls, model: Model, *, device: str) -> Self:
        return cls(model, _load(model, device), device=device)

    def _check(self) -> None:
        name, pipeline = self.model.name, self.model.pipeline
        if missing := NEEDED - self._takes:
            raise Misconfigured(f"{pipeline} takes no {', '.join(sorted(missing))}", model=name)
        unet = getattr(self.pipe, "unet", None)
        embedded = unet and unet.config.time_cond_proj_dim is not None  # distilled: one value for all rows
        if "guidance" in self.model.free and (embedded or pipeline not in ROWWISE):
            raise Misconfigured(
                f"{pipeline} takes one guidance for all rows here", model=name, setting="free"
            )

    def render(self, asks: Sequence[Ask], *, on_step: OnStep) -> list[Pixels | RenderFailed]:
        if len({call_key(ask.spec, self.model) for ask in asks}) > 1:
            raise ValueError("frames of one call must share a call key")
        if not asks:
            return []
        tick = _Tick(on_step)
        try:
            with torch.inference_mode():
                images = self.pipe(**self._arguments(asks), callback_on_step_end=tick).images
                return [_judge(image, index) for index, image in enumerate(images)]
        except Exception as e:
            if tick.stopped or _is_lost(e):
                raise
            failure = _failure(e, frames=list(range(len(asks))))
        # Out of the except block: the exception's traceback held every tensor of the call.
        self._recover()
        raise failure

    def _arguments(self, asks: Sequence[Ask]) -> dict[str, Any]:
        spec = asks[0].spec
        self.pipe.scheduler = fresh_sampler(spec.sampler, self._sampler_config, steps=spec.steps)
        arguments = {
            "height": spec.height,
            "width": spec.width,
            "num_inference_steps": spec.steps,
            "guidance_scale": self._guidance(asks),
            "generator": [torch.Generator("cpu").manual_seed(ask.seed) for ask in asks],
            "output_type": "pt",
            "callback_on_step_end_tensor_inputs": [],
            **self._text(asks),
        }
        return {name: value for name, value in arguments.items() if name in self._takes}

    def _guidance(self, asks: Sequence[Ask]) -> float:
        if "guidance" in self.model.free and asks[0].spec.guided:
            return RowGuidance([ask.spec.guidance for ask in asks], device=self.device)
        return asks[0].spec.guidance

    def _text(self, asks: Sequence[Ask]) -> dict[str, Any]:
        prompts = [ask.spec.prompt for ask in asks]
        negatives = [ask.spec.negative_prompt for ask in asks]
        if not (self.model.negative_prompt and asks[0].spec.guided):
            return {"prompt": prompts, "max_sequence_length": self._text_length()}
        if self.pipe.config.get("force_zeros_for_empty_prompt"):
            return self._zeroed_text(prompts, negatives)
        return {"prompt": prompts, "negative_prompt": negatives, "max_sequence_length": self._text_length()}

    def _zeroed_text(self, prompts: list[str], negatives: list[str]) -> dict[str, Any]:
        """Encode for SDXL, whose missing negative prompt is zeros, but only when every row's is missing.

        Left to the pipeline, a frame without one would change with its neighbours.
        """
        text, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=True, negative_prompt=negatives
        )
        missing = [row for row, prompt in enumerate(negatives) if not prompt]
        negative[missing] = 0
        negative_pooled[missing] = 0
        return {
            "prompt_embeds": text,
            "negative_prompt_embeds": negative,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        }

    def _text_length(self) -> int:
        """Tokens of the long text encoder: FLUX.1 dev was trained with 512, schnell and SD3 with 256."""
        transformer = getattr(self.pipe, "transformer", None)
        return 512 if transformer and transformer.config.get("guidance_embeds") else 256

    def _recover(self) -> None:
        # SDXL's VAE is in float32 while a float16 checkpoint decodes, and stays so if that fails
        if self.pipe.vae.dtype != self._vae_dtype:
            self.pipe.vae.to(dtype=self._vae_dtype)
        release()


class _Tick:
    """Hands the pipeline's steps on, and knows whether an exception was the listener's."""

    def __init__(self, on_step: OnStep) -> None:
        self.on_step = on_step
        self.stopped = False

    def __call__(self, pipe: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        try:
            # two-stage samplers (heun) take more steps than were asked for
            self.on_step(step + 1, len(pipe.scheduler.timesteps))
        except BaseException:
            self.stopped = True
            raise
        return {}


def _load(model: Model, device: str) -> Any:
    folder = checkpoint.folder(model)
    pipeline = getattr(diffusers, model.pipeline, None)
    if pipeline is None:
        raise Misconfigured(f"diffusers {diffusers.__version__} has no {model.pipeline}", model=model.name)
    unwanted = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}
    for library in (diffusers, transformers):  # their warnings quote prompts, which are not for our logs
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    known = inspect.signature(pipeline.__init__).parameters
    try:
        pipe = pipeline.from_pretrained(
            folder,
            dtype=getattr(torch, model.dtype),
            use_safetensors=True,  # the default also unpickles
            local_files_only=True,
            **{name: value for name, value in unwanted.items() if name in known},
        )
    except (OSError, ValueError) as e:
        raise Misconfigured(f"the checkpoint in {folder} cannot be loaded: {e}", model=model.name) from e
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_slicing()  # memory peaks in the decoder, which gains nothing from a batch
    return pipe.to(device)


def _judge(image: torch.Tensor, index: int) -> Pixels | RenderFailed:
    """Turn one decoded image, (3, height, width) in 0 … 1, into the bytes that the stock 'pil' output has."""
    if not bool(image.isfinite().all()):
        return RenderFailed("the image is not a number", frames=[index])
    if not bool(image.any()):
        return RenderFailed("the image is all black", frames=[index])
    pixels: Pixels = (image.permute(1, 2, 0).float() * 255).round().to(torch.uint8).cpu().numpy()
    return pixels


def _failure(error: Exception, *, frames: list[int]) -> RenderFailed:
    if _is_out_of_memory(error):
        return OutOfMemory(str(error).partition("\n")[0], frames=frames)
    return RenderFailed(f"{type(error).__name__}: {error}", frames=frames)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def _is_lost(error: Exception) -> bool:
    """After a device error every later call fails too: the process has to end."""
    return isinstance(error, torch.AcceleratorError) and not _is_out_of_memory(error)
