"""Run to completion: one stock diffusers pipe() call for frames that share a call key.

What may differ from row to row: prompts, seeds, and guidance where the catalog says so. Works for any
pipeline that takes prompts and generators; one that tells no steps makes progress a pack at a time.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Self

import torch

from farm.catalog import Model
from farm.errors import Misconfigured, RenderFailed
from farm.spec import call_key
from workers.engine import Ask, OnStep, Pixels
from workers.engine.faults import failure, is_lost, judge
from workers.engine.featured import Featured, is_featured
from workers.engine.forwards import Forwards
from workers.engine.loading import load
from workers.engine.modes import Modes
from workers.engine.samplers import fresh_sampler
from workers.engine.speed import denoiser_of
from workers.engine.stages import open_stages
from workers.engine.whole import whole_text
from workers.gpu import release

# Read in diffusers 0.42.1: these say `guidance_scale > 1` and `guidance_scale * (text - uncond)`, no more.
ROWWISE = {
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "PixArtAlphaPipeline",
    "PixArtSigmaPipeline", "IFPipeline",
}  # fmt: skip
NEEDED = {"prompt", "generator", "output_type"}
SIGNED = {"Kandinsky3Pipeline", "IFPipeline"}  # whose "pt" is in −1 … 1
TEXT_LENGTH = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300, "Flux2Pipeline": 512}  # tokens
BINNED = (32, 64, 128, 256)  # sample sizes of PixArt whose trained sizes diffusers knows


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
        self._vae = getattr(pipe, "vae", None)  # IF has none, Kandinsky's has another name
        self._vae_dtype = self._vae.dtype if self._vae else None
        self._stages = open_stages(model, device=device)
        self._forwards = Forwards(denoiser_of(pipe))
        self.featured = Featured(Modes(pipe, model, device=device), guidance=self._guidance, text=self._text)
        self._check()

    @classmethod
    def open(cls, model: Model, *, device: str) -> Self:
        return cls(model, load(model, device=device), device=device)

    def _check(self) -> None:
        name, pipeline = self.model.name, self.model.pipeline
        if missing := NEEDED - self._takes:
            raise Misconfigured(f"{pipeline} takes no {', '.join(sorted(missing))}", model=name)
        unet = getattr(self.pipe, "unet", None)
        embedded = (
            unet and unet.config.get("time_cond_proj_dim") is not None
        )  # distilled: one value for all rows
        if "guidance" in self.model.free and (embedded or pipeline not in ROWWISE):
            raise Misconfigured(
                f"{pipeline} takes one guidance for all rows here", model=name, setting="free"
            )

    def render(self, asks: Sequence[Ask], *, on_step: OnStep) -> list[Pixels | RenderFailed]:
        if len({call_key(ask.spec, self.model) for ask in asks}) > 1:
            raise ValueError("frames of one call must share a call key")
        if not asks:
            return []
        tick = _Tick(on_step, [asks[0].spec.steps, *(stage.entry.steps for stage in self._stages)])
        try:
            with torch.inference_mode():
                self.featured.adapters.use(asks[0].spec.loras, asks[0].inputs.loras)
                if is_featured(asks[0].spec):
                    return self._render_featured(asks, tick)
                self._forwards.start()
                images = self._images(self._arguments(asks), tick)
                if wrong := self._forwards.too_few(asks[0].spec.steps):
                    return [RenderFailed(wrong, frames=[index]) for index in range(len(asks))]
                return [judge(image, frames=[index]) for index, image in enumerate(images)]
        except Exception as e:
            if tick.stopped or is_lost(e):
                raise
            failed = failure(e, frames=list(range(len(asks))))
        # Out of the except block: the exception's traceback held every tensor of the call.
        self._recover()
        raise failed

    def _render_featured(self, asks: Sequence[Ask], tick: "_Tick") -> list[Pixels | RenderFailed]:
        parts, bad = self.featured.parts(asks)
        tick.expect(self.featured.steps(asks, parts))
        done = self.featured.render(asks, parts, tick)
        for index, failed in bad:  # in the order of the asks
            done.insert(index, failed)
        tick.end()
        return done

    def _images(self, arguments: dict[str, Any], tick: "_Tick") -> torch.Tensor:
        """Call the pipeline, and what follows it; (rows, 3, height, width) in 0 … 1."""
        images: torch.Tensor = self.pipe(**arguments, **tick.hook(self.pipe)).images
        for stage in self._stages:
            images = stage.images(images, arguments, arguments["generator"], tick.hook(stage.pipe))
        tick.end()
        return (images / 2 + 0.5).clamp(0, 1) if self.model.pipeline in SIGNED else images

    def _arguments(self, asks: Sequence[Ask]) -> dict[str, Any]:
        spec = asks[0].spec
        self.pipe.scheduler = fresh_sampler(spec.sampler, self._sampler_config, steps=spec.steps)
        arguments = {
            "height": spec.height // self.model.stage_factor,
            "width": spec.width // self.model.stage_factor,
            "num_inference_steps": spec.steps,
            "guidance_scale": self._guidance(asks),
            "generator": [torch.Generator("cpu").manual_seed(ask.seed) for ask in asks],
            "output_type": "pt",
            "callback_on_step_end_tensor_inputs": [],
            "clean_caption": False,  # pixels would depend on which libraries are installed
            "use_resolution_binning": self._is_binned(),
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
        if self._stages:  # which take the text as it is encoded here
            text, negative = self.pipe.encode_prompt(
                prompts, negative_prompt=negatives, device=self.device, clean_caption=False
            )
            return {"prompt_embeds": text, "negative_prompt_embeds": negative}
        if self.model.pipeline == "Kandinsky3Pipeline":
            return whole_text(self.pipe, prompts, negatives, device=self.device)
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
        if self.model.pipeline in TEXT_LENGTH:
            return TEXT_LENGTH[self.model.pipeline]
        transformer = getattr(self.pipe, "transformer", None)
        return 512 if transformer and transformer.config.get("guidance_embeds") else 256

    def _is_binned(self) -> bool:
        transformer = getattr(self.pipe, "transformer", None)
        return transformer is not None and transformer.config.get("sample_size") in BINNED

    def _recover(self) -> None:
        # SDXL's VAE is in float32 while a float16 checkpoint decodes, and stays so if that fails
        if self._vae and self._vae.dtype != self._vae_dtype:
            self._vae.to(dtype=self._vae_dtype)
        release()


class _Tick:
    """Hands on the steps of a pipeline and its stages, and knows whether an exception was the listener's."""

    def __init__(self, on_step: OnStep, steps: Sequence[int]) -> None:
        self.stopped = False
        self._on_step = on_step
        self._steps = list(steps)  # of each stage; two-stage samplers (heun) take more than were asked for
        self._stage = -1
        self._done = 0

    def expect(self, steps: Sequence[int]) -> None:
        """Say anew how many steps each stage has: nothing has started."""
        self._steps = list(steps)

    def hook(self, pipe: Any) -> dict[str, Any]:
        """The arguments by which the next stage tells its steps; none if it has no way to."""
        self._stage += 1
        takes = inspect.signature(pipe.__call__).parameters

        def tell(step: int) -> None:
            self._steps[self._stage] = getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)
            self._tell(sum(self._steps[: self._stage]) + step + 1)

        def on_step_end(_pipe: Any, step: int, _time: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            tell(step)
            return {}

        if "callback_on_step_end" in takes:
            return {"callback_on_step_end": on_step_end}
        if "callback" in takes:
            return {"callback": lambda step, _time, _latents: tell(step), "callback_steps": 1}
        return {}

    def end(self) -> None:
        """Tell the last step, if the pipeline did not."""
        if self._done < sum(self._steps):
            self._tell(sum(self._steps))

    def _tell(self, done: int) -> None:
        self._done = done
        try:
            self._on_step(done, sum(self._steps))
        except BaseException:
            self.stopped = True
            raise
