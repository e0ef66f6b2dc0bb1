"""What a GPU makes of an SDXL of random weights, built from its config: 1024², 20 steps, guidance, bfloat16.

Measured are the UNet alone with 16 rows, in TFLOP/s; a bare loop of stock pipe() calls; and the full stack that a
worker has around it: the engine, judged images, PNG files made beside the device. Eager first, then with the
repeated blocks compiled, which changes the same UNet. Needs torch, transformers, accelerate, diffusers and the
farm's own pydantic; no Postgres, Redis or store.

--quick without a GPU runs the same code on a tiny model: that shows that it works, and no speed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from statistics import median
from typing import Any
from uuid import uuid4

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from farm.catalog import BUILTIN, Model, read
from farm.errors import RenderFailed
from farm.spec import Format, Spec
from tests.tiny import _clip_tokenizer
from workers.engine import Ask, Pixels
from workers.engine.pipe import PipeEngine
from workers.engine.samplers import fresh_sampler
from workers.engine.speed import compile_blocks, speed_up
from workers.engine.step import families
from workers.engine.step.loop import StepLoop

TARGETS = {  # of an H200
    "compiled_images_per_s": 1.35,
    "eager_images_per_s": 1.15,
    "eager_stack_of_bare_loop": 0.97,
    "compiled_stack_of_bare_loop": 0.97,
    "unet_16_rows_tflops": 395.0,
}
ROWS = 16
PROMPTS = ("a red circle", "a blue square on a white background", "x", "a green triangle to the left")
SAMPLER = "euler"
ENCODERS = 4  # threads
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@dataclass(frozen=True)
class Scale:
    """How large the model is and how much is measured."""

    side: int
    steps: int
    images: int  # a round
    pack: int
    rounds: int
    forwards: int
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    text_2: Mapping[str, Any]


SDXL = Scale(
    side=1024,
    steps=20,
    images=16,
    pack=8,
    rounds=3,
    forwards=10,
    unet={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
    text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    text_2={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
)
FEW = {"images": 8, "rounds": 1, "forwards": 4}
TINY = Scale(
    side=64,
    steps=4,
    images=4,
    pack=2,
    rounds=1,
    forwards=2,
    unet={
        "sample_size": 8,
        "block_out_channels": (16, 32, 32),
        "transformer_layers_per_block": (1, 1, 1),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
        "norm_num_groups": 8,
    },
    vae={
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 64,
    },
    text={"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4},
    text_2={
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 32,
    },
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer images; a tiny model where there is no GPU"
    )
    parser.add_argument("--fp8", action="store_true", help="with the UNet's large matrices in FP8 (torchao)")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.quick:
        say("there is no GPU here: nothing is measured. --quick runs the same code on a tiny model")
        return report({}, targets=TARGETS, ok=False, note="no GPU")
    if not on_gpu:
        torch.set_num_threads(1)
        figures = Bench(TINY, device="cpu", dtype="float32", fp8=False).run()
        return report(
            figures, targets={}, ok=True, note="a tiny model on a CPU: it works, and shows no speed"
        )
    scale = Scale(**{**vars(SDXL), **FEW}) if options.quick else SDXL
    figures = Bench(scale, device="cuda", dtype="bfloat16", fp8=options.fp8).run()
    missed = [name for name, least in TARGETS.items() if not figures[name] >= least]
    return report(figures, targets=TARGETS, ok=not missed, note=torch.cuda.get_device_name())


class Bench:
    """One model on one device."""

    def __init__(self, scale: Scale, *, device: str, dtype: str, fp8: bool) -> None:
        self.scale = scale
        self.device = device
        torch.backends.cuda.matmul.allow_tf32 = True
        started = time.monotonic()
        self.pipe = build(scale, device=device, dtype=getattr(torch, dtype))
        self.sampler_config = self.pipe.scheduler.config
        side = {"min": 8, "max": scale.side, "multiple": 8, "default": scale.side}
        facts = read(BUILTIN)["sdxl"].model_dump() | {
            "name": "random-sdxl",
            "source": "dir:nowhere",
            "dtype": dtype,
            "side": side,
            "sizes": (),
            "speed": {"fp8": fp8},
            "pack": {"frames": scale.pack, "pixels": scale.pack * scale.side**2, "rows": 2 * scale.pack},
        }
        self.model = Model.model_validate(facts)
        self.by_steps = Model.model_validate({**facts, "engine": "step", "packs_by": "shape", "free": ()})
        speed_up(self.pipe, self.model, device=device)
        say(f"built in {time.monotonic() - started:.1f} s")

    def run(self) -> dict[str, float]:
        """Measure everything, eager and then compiled."""
        figures = self._all("eager")
        if self.device == "cuda":
            compile_blocks(self.pipe.unet, self.model)
            compiled = {"speed": {**self.model.speed.model_dump(), "compile": True}}
            self.model = Model.model_validate({**self.model.model_dump(), **compiled})
            self.by_steps = Model.model_validate({**self.by_steps.model_dump(), **compiled})
            figures |= self._all("compiled")
            figures["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
        figures["unet_16_rows_tflops"] = max(v for n, v in figures.items() if n.endswith("unet_tflops"))
        return figures

    def _all(self, how: str) -> dict[str, float]:
        unet = self._unet_tflops()
        say(f"{how}: UNet with {ROWS} rows at {unet:.4g} TFLOP/s")
        pipe = PipeEngine(self.model, self.pipe, device=self.device)
        steps, beside = self._step_loop(decode_beside=False), self._step_loop(decode_beside=True)
        ways: dict[str, Callable[[Sequence[Ask]], object]] = {
            "bare_loop": self._bare,
            "packs": lambda asks: self._packs(pipe, asks),
            "steps": lambda asks: self._by_steps(steps, asks),
            "steps_decoding_beside": lambda asks: self._by_steps(beside, asks),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for name, way in ways.items():
            self._rate(way, self.scale.pack)  # warm
            say(f"{how}: {name} is warm")
        for _ in range(self.scale.rounds):
            for name, way in ways.items():  # in turns: what else the machine does hits all of them
                rates[name].append(self._rate(way, self.scale.images))
        best = max((name for name in ways if name != "bare_loop"), key=lambda name: median(rates[name]))
        figures = {f"{how}_{name}_images_per_s": median(r) for name, r in rates.items()}
        ratio = median(a / b for a, b in zip(rates[best], rates["bare_loop"], strict=True))
        say(f"{how}: " + ", ".join(f"{n} {v:.4g}" for n, v in figures.items()))
        return figures | {
            f"{how}_unet_tflops": unet,
            f"{how}_images_per_s": median(rates[best]),
            f"{how}_stack_of_bare_loop": ratio,
        }

    def _step_loop(self, *, decode_beside: bool) -> StepLoop:
        speed = {**self.by_steps.speed.model_dump(), "decode_beside": decode_beside}
        model = Model.model_validate({**self.by_steps.model_dump(), "speed": speed})
        return StepLoop(families.family(self.pipe, model, device=self.device), ageing_s=60.0)

    # ------------------------------------------------------------------------------------------ ways

    def _rate(self, way: Callable[[Sequence[Ask]], object], images: int) -> float:
        side = self.scale.side
        spec = Spec(self.model.name, "", "", side, side, self.scale.steps, 5.0, SAMPLER, Format.PNG)
        asks = [
            Ask(Spec(**{**_fields(spec), "prompt": PROMPTS[k % len(PROMPTS)]}), seed=k) for k in range(images)
        ]
        self._wait()
        started = time.perf_counter()
        way(asks)
        self._wait()
        return images / (time.perf_counter() - started)

    def _bare(self, asks: Sequence[Ask]) -> None:
        """Stock calls, pack after pack; the images are dropped."""
        for k in range(0, len(asks), self.scale.pack):
            part = asks[k : k + self.scale.pack]
            spec = part[0].spec
            self.pipe.scheduler = fresh_sampler(SAMPLER, self.sampler_config, steps=spec.steps)
            with torch.inference_mode():
                self.pipe(
                    prompt=[a.spec.prompt for a in part],
                    negative_prompt=[""] * len(part),
                    generator=[torch.Generator("cpu").manual_seed(a.seed) for a in part],
                    width=spec.width,
                    height=spec.height,
                    num_inference_steps=spec.steps,
                    guidance_scale=spec.guidance,
                    output_type="pil",
                )

    def _packs(self, engine: PipeEngine, asks: Sequence[Ask]) -> None:
        """Run to completion, and files beside the device."""
        with ThreadPoolExecutor(ENCODERS) as encoders:
            for k in range(0, len(asks), self.scale.pack):
                made = engine.render(asks[k : k + self.scale.pack], on_step=lambda done, total: None)
                for image in made:
                    encoders.submit(png, image)

    def _by_steps(self, engine: StepLoop, asks: Sequence[Ask]) -> None:
        """Step by step: as many in flight as fit, the next as soon as there is room."""
        waiting = list(asks)
        with ThreadPoolExecutor(ENCODERS) as encoders:
            while waiting or engine.frames:
                for _ in range(min(len(waiting), engine.room(asks[0].spec))):
                    engine.add(uuid4(), waiting.pop(0), priority=5)
                for image in engine.tick().done.values():
                    encoders.submit(png, image)

    # ------------------------------------------------------------------------------------------ the UNet

    def _unet_tflops(self) -> float:
        """Forwards of ROWS rows by themselves: what their sums come to, over the time they took."""
        one = self._flops(self._rows(1))
        rows = self._rows(ROWS)
        times = []
        with torch.inference_mode():
            for k in range(self.scale.forwards + 2):
                self._wait()
                started = time.perf_counter()
                self.pipe.unet(**rows)
                self._wait()
                times.append((time.perf_counter() - started) if k >= 2 else float("inf"))
        return ROWS * one / median(times[2:]) / 1e12

    def _flops(self, rows: Mapping[str, Any]) -> float:
        if not hasattr(self, "_counted"):
            with torch.inference_mode(), FlopCounterMode(display=False) as counter:
                self.pipe.unet(**rows)
            self._counted = float(counter.get_total_flops())
            say(f"one row of the UNet is {self._counted / 1e12:.4g} TFLOP")
        return self._counted

    def _rows(self, rows: int) -> dict[str, Any]:
        unet, latent = self.pipe.unet, self.scale.side // 8
        make: dict[str, Any] = {"device": self.device, "dtype": unet.dtype}
        pooled = self.scale.text_2["projection_dim"]
        return {
            "sample": torch.randn(rows, 4, latent, latent, **make),
            "timestep": torch.full((rows,), 500, device=self.device),
            "encoder_hidden_states": torch.randn(rows, 77, unet.config.cross_attention_dim, **make),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(rows, pooled, **make),
                "time_ids": torch.full((rows, 6), float(self.scale.side), **make),
            },
            "return_dict": False,
        }

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def build(scale: Scale, *, device: str, dtype: torch.dtype) -> Any:
    """An SDXL pipeline of random weights, made on the device."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            unet = UNet2DConditionModel(
                in_channels=4,
                out_channels=4,
                layers_per_block=2,
                use_linear_projection=True,
                addition_embed_type="text_time",
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                **scale.unet,
            )
            vae = AutoencoderKL(
                latent_channels=4,
                scaling_factor=0.13025,
                force_upcast=False,  # in bfloat16 it stays in range
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                **scale.vae,
            )
            text = CLIPTextModel(_text(scale.text))
            text_2 = CLIPTextModelWithProjection(_text(scale.text_2))
    finally:
        torch.set_default_dtype(torch.float32)
    pipe = StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        text_encoder_2=text_2.eval(),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(**NOISE),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).to(device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_slicing()
    return pipe


def _text(changes: Mapping[str, Any]) -> CLIPTextConfig:
    tokens = {"vocab_size": 49408, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    return CLIPTextConfig(**{**tokens, **changes})


def _fields(spec: Spec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in type(spec).__slots__}


def png(image: Pixels | RenderFailed) -> int:
    """Encode as the farm's worker does; returns the bytes."""
    if isinstance(image, RenderFailed):
        raise image
    out = BytesIO()
    Image.fromarray(image).save(out, format="PNG", compress_type=3)
    return len(out.getvalue())


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def report(figures: Mapping[str, float], *, targets: Mapping[str, float], ok: bool, note: str) -> int:
    """Print the figures, and as the last line one JSON object; returns 0 if it is ok."""
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    for name, value in rounded.items():
        print(f"{name:>40}  {value:g}{'' if value >= targets.get(name, 0) else '   MISSED'}")
    told = {name: {"at_least": least} for name, least in targets.items()}
    last = {"name": "gpu", "ok": ok, "note": note, "figures": rounded, "targets": told}
    print(json.dumps(last), flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
