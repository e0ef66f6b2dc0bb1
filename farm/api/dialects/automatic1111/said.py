"""What the web UI says of images."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from farm.api.dialects import samplers
from farm.api.dialects.automatic1111.asked import Txt2Img, hash_of
from farm.api.dialects.served import (
    Drawn,
    Rendered,
)
from farm.catalog import Model

VERSION = "image-farm"


class WebuiImages(BaseModel):
    """What was made; info is JSON as text."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


def info_of(found: Rendered, model: Model, asked: Txt2Img, sent: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of the images, as the web UI does. sent: the spec that was made of what was asked."""
    done, spec = found.done, found.frames[0].spec
    prompt, negative = (
        _as_asked(asked.has(name) or "", sent[name], spec[name]) for name in ("prompt", "negative_prompt")
    )
    sampler, schedule = samplers.webui_name(spec["sampler"])
    texts = [infotext(f, model, prompt, negative) for f in done]
    seeds = [f.seed for f in done]
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * len(done),
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * len(done),
        "seed": seeds[0] if seeds else found.frames[0].seed,
        "all_seeds": seeds,
        "subseed": 0,
        "all_subseeds": [0] * len(done),
        "subseed_strength": 0,
        "width": spec["width"],
        "height": spec["height"],
        "sampler_name": sampler,
        "cfg_scale": spec["guidance"],
        "steps": spec["steps"],
        "batch_size": asked.batch_size or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model.name,
        "sd_model_hash": hash_of(model),
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": spec.get("strength"),
        "extra_generation_params": {"Schedule type": schedule},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [s for s in asked.styles or [] if s],
        "job_timestamp": datetime.now(UTC).strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1 + spec.get("clip_skip", 0),
        "is_using_inpainting_conditioning": False,
        "version": VERSION,
        "job": found.name,
        "failed": [f"{f.index}: {f.reason}" for f in found.frames if f.reason],
    }


def _as_asked(asked: str, sent: str, drawn: str) -> str:
    """A prompt as it came, with what a style added: its weights stay as the web UI reads them, to be sent again."""
    if drawn == sent:
        return asked
    return asked.rstrip(" ,.;") + drawn.removeprefix(sent.rstrip(" ,.;"))


def infotext(frame: Drawn, model: Model, prompt: str, negative: str) -> str:
    """What the web UI writes below a picture."""
    spec = frame.spec
    sampler, schedule = samplers.webui_name(spec["sampler"])
    facts = {
        "Steps": spec["steps"],
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": f"{spec['guidance']:g}",
        "Seed": frame.seed,
        "Size": f"{spec['width']}x{spec['height']}",
        "Model hash": hash_of(model),
        "Model": model.name,
    }
    if spec.get("strength") is not None:
        facts["Denoising strength"] = f"{spec['strength']:g}"
    if spec.get("clip_skip"):
        facts["Clip skip"] = spec["clip_skip"] + 1
    lines = [prompt]
    if negative:
        lines.append(f"Negative prompt: {negative}")
    return "\n".join([*lines, ", ".join(f"{k}: {v}" for k, v in {**facts, "Version": VERSION}.items())])
