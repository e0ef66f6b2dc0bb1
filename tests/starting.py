"""Frames with inputs for tests, and the stock pipelines they must equal."""

import hashlib
import inspect
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image

from farm.catalog import Lora, Model
from farm.features import LoraUse
from tests.tiny import open_tiny, tiny_ask, tiny_model, tiny_sd3
from workers.engine import Ask, Inputs, Pixels
from workers.engine.pipe import PipeEngine
from workers.engine.samplers import fresh_sampler

SIZE = 32


def picture(seed: int, size: int = SIZE) -> Pixels:
    """Soft colours, different for every seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC))


def mask(seed: int, size: int = SIZE) -> Any:
    found = np.zeros((size, size), np.uint8)
    found[4 + seed : 20 + seed, 8:28] = 255
    return found


def started(model: Model, seed: int = 1, *, masked: bool = False, **changes: Any) -> Ask:
    """A frame that starts from an image, half of its steps."""
    facts: dict[str, Any] = {"image": f"sha256:{seed:064}", "strength": 0.5, "steps": 6, **changes}
    if masked:
        facts["mask"] = f"sha256:{seed + 100:064}"
    ask = tiny_ask(model, f"a red circle {seed}", seed=seed, **facts)
    return replace(ask, inputs=Inputs(image=picture(seed), mask=mask(seed) if masked else None))


def stock(pipe: Any, class_name: str, ask: Ask, **more: Any) -> Pixels:
    """What a stock pipeline of that class makes of a frame alone, in its own way."""
    kind = getattr(diffusers, class_name)
    known = inspect.signature(kind.__init__).parameters
    parts = {**pipe.components, "requires_safety_checker": False, **more.pop("parts", {})}
    if "force_zeros_for_empty_prompt" in pipe.config:
        parts["force_zeros_for_empty_prompt"] = pipe.config["force_zeros_for_empty_prompt"]
    made = kind(**{n: p for n, p in parts.items() if n in known})
    made.set_progress_bar_config(disable=True)
    spec = ask.spec
    made.scheduler = fresh_sampler(spec.sampler, pipe.scheduler.config, steps=spec.steps)
    arguments = {
        "prompt": spec.prompt,
        "negative_prompt": spec.negative_prompt or None,
        "num_inference_steps": spec.steps,
        "guidance_scale": spec.guidance,
        "height": spec.height,
        "width": spec.width,
        "strength": spec.strength,
        "generator": torch.Generator("cpu").manual_seed(ask.seed),
        **more,
    }
    if "negative_prompt" in arguments and class_name.startswith("Flux"):
        del arguments["negative_prompt"]
    if class_name.startswith("StableDiffusion3"):
        arguments["max_sequence_length"] = 256
    elif class_name.startswith("Flux"):
        arguments["max_sequence_length"] = 512
    if ask.inputs.image is not None and "image" not in more:
        arguments["image"] = Image.fromarray(ask.inputs.image)
    if ask.inputs.mask is not None:
        arguments["mask_image"] = Image.fromarray(ask.inputs.mask)
    takes = inspect.signature(made.__call__).parameters
    return np.asarray(made(**{n: v for n, v in arguments.items() if n in takes}).images[0])


def tiny_net(pipe: Any, folder: Path, seed: int) -> ControlNetModel:
    """A control net for a pipeline, saved: random where a new one would do nothing."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    for parameter in net.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    net.save_pretrained(folder, safe_serialization=True)
    return net.eval()


def tiny_lora(pipe: Any, folder: Path, name: str, seed: int) -> Lora:
    """A LoRA for a pipeline's denoiser, saved, and its catalog entry."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    torch.manual_seed(seed)
    denoiser.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]), adapter_name="made")
    state = get_peft_model_state_dict(denoiser, adapter_name="made")
    state = {key: torch.randn_like(value) * 0.5 for key, value in state.items()}
    denoiser.delete_adapters("made")
    denoiser.unload_lora() if hasattr(denoiser, "unload_lora") else None
    kind = "unet_lora_layers" if hasattr(pipe, "unet") else "transformer_lora_layers"
    type(pipe).save_lora_weights(folder, **{kind: state}, weight_name=f"{name}.safetensors")
    data = (folder / f"{name}.safetensors").read_bytes()
    return Lora(
        source=f"dir:{folder}",
        file=f"{name}.safetensors",
        sha256=hashlib.sha256(data).hexdigest(),
        licence="none",
    )


def lora_use(name: str, entry: Lora, scale: float = 1.0) -> LoraUse:
    return LoraUse(name=name, scale=scale, sha256=entry.sha256)


@cache
def wide_sd3() -> PipeEngine:
    """A tiny SD3 of 16 latent channels: its stock inpainting knows the mode by that."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "entry", "sd3")
        tiny_sd3(Path(folder) / "wide", channels=16)
        return open_tiny(model.model_copy(update={"source": f"dir:{folder}/wide", "name": "tiny-sd3-wide"}))
