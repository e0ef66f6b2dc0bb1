"""What Replicate's clients send, and what the farm is asked for."""

import hashlib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from farm.api.dialects import samplers
from farm.api.dialects.asking import VendorInput
from farm.api.dialects.served import model_named
from farm.catalog import Model, catalog
from farm.errors import Fault, Invalid, NotFound
from farm.spec import Format
from farm.styles import ASPECT_RATIOS, named

MOST_OUTPUTS = 10
OWNER = "farm"  # of the farm's models, where nobody else's name for them is known
FORMATS = {"webp": Format.WEBP, "jpg": Format.JPEG, "jpeg": Format.JPEG, "png": Format.PNG}
IGNORED = frozenset(
    {"go_fast", "disable_safety_checker", "apply_watermark", "safety_tolerance", "speed_mode", "raw", "hf_token"}
)  # fmt: skip


class PredictionInput(VendorInput):
    """What a model of the farm takes, in the words of Replicate's image models."""

    ignored = IGNORED

    prompt: Annotated[str, Field(strict=True)]
    negative_prompt: Annotated[str, Field(strict=True)] | None = None
    aspect_ratio: Literal[(*ASPECT_RATIOS, "custom")] | None = None  # type: ignore[valid-type]
    megapixels: Literal["1"] | None = None
    width: Annotated[int, Field(strict=True)] | None = None
    height: Annotated[int, Field(strict=True)] | None = None
    num_outputs: Annotated[int, Field(strict=True, ge=1, le=MOST_OUTPUTS)] = 1
    num_inference_steps: Annotated[int, Field(strict=True)] | None = None
    guidance: Annotated[float, Field(strict=True)] | None = None
    guidance_scale: Annotated[float, Field(strict=True)] | None = None
    scheduler: Annotated[str, Field(strict=True, max_length=63)] | None = None
    seed: Annotated[int, Field(strict=True)] | None = None
    image: Annotated[str, Field(strict=True)] | None = None
    mask: Annotated[str, Field(strict=True)] | None = None
    prompt_strength: Annotated[float, Field(strict=True)] | None = None
    prompt_upsampling: Annotated[bool, Field(strict=True)] = False
    lora_weights: Annotated[str, Field(strict=True, max_length=63)] | None = None
    lora_scale: Annotated[float, Field(strict=True)] | None = None
    output_format: Literal["webp", "jpg", "jpeg", "png"] = "webp"
    output_quality: Annotated[int, Field(strict=True, ge=0, le=100)] = 80


NAMES = {
    "steps": "input.num_inference_steps",
    "sampler": "input.scheduler",
    "strength": "input.prompt_strength",
    "format": "input.output_format",
    "quality": "input.output_quality",
    "count": "input.num_outputs",
    "loras": "input.lora_weights",
    "webhook": "webhook",
    **{f: f"input.{f}" for f in ("prompt", "negative_prompt", "width", "height", "seed", "image", "mask")},
}


class ModelPrediction(BaseModel):
    """A prediction to make of a model that the path names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: PredictionInput
    webhook: Annotated[str, Field(strict=True, max_length=4096)] | None = None
    webhook_events_filter: list[Literal["start", "output", "logs", "completed"]] | None = None
    webhook_completed: Annotated[str, Field(strict=True, max_length=4096)] | None = Field(
        None, description="as webhook, of completed alone"
    )
    stream: bool | None = Field(None, description="ignored: images come whole")

    @model_validator(mode="before")
    @classmethod
    def _unversioned(cls, sent: Any) -> Any:
        if isinstance(sent, dict):  # clients send null for what is left open
            return {k: v for k, v in sent.items() if v is not None}
        return sent


class Prediction(ModelPrediction):
    """A prediction to make."""

    version: Annotated[str, Field(strict=True, min_length=1, max_length=300)] = Field(
        description="a version's id, owner/name:id, owner/name, or a model's name"
    )


def spec_of(asked: PredictionInput, model: Model) -> dict[str, Any]:
    """What the farm is asked for. Raises Invalid for what contradicts itself."""
    if asked.guidance is not None and asked.guidance_scale is not None:
        raise Invalid([Fault("input.guidance_scale", asked.guidance_scale, "send it or guidance, not both")])
    width, height = _size(asked, model)
    form = FORMATS[asked.output_format]
    loras = None
    if asked.lora_weights is not None:
        loras = [{"name": asked.lora_weights, "scale": 1.0 if asked.lora_scale is None else asked.lora_scale}]
    elif asked.lora_scale is not None:
        raise Invalid([Fault("input.lora_scale", asked.lora_scale, "it is said with lora_weights")])
    return {
        "model": model.name,
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "width": width,
        "height": height,
        "steps": asked.num_inference_steps,
        "guidance": asked.guidance if asked.guidance is not None else asked.guidance_scale,
        "sampler": samplers.of_replicate(asked.scheduler, model),
        "seed": asked.seed,
        "count": asked.num_outputs,
        "format": form,
        "quality": None if form is Format.PNG else max(1, asked.output_quality),
        "image": asked.image,
        "mask": asked.mask,
        "strength": asked.prompt_strength,
        "loras": loras,
        "prompt_enhancement": asked.prompt_upsampling or None,
    }


def _size(asked: PredictionInput, model: Model) -> tuple[int | None, int | None]:
    if asked.aspect_ratio in (None, "custom"):
        return asked.width, asked.height
    if asked.width is not None or asked.height is not None:
        raise Invalid([Fault("input.aspect_ratio", asked.aspect_ratio, "with width or height it is custom")])
    size = named(str(asked.aspect_ratio), model)
    assert size
    return size


def version_of(model: Model) -> str:
    """The id of what the model is now: another revision is another version."""
    return hashlib.sha256(f"{model.name}@{model.revision}/{model.precision}".encode()).hexdigest()


def slug_of(model: Model) -> str:
    """owner/name: the first that somebody calls it by, else the farm's own."""
    return next((a for a in model.aliases if re.fullmatch(r"[\w.-]+/[\w.-]+", a)), f"{OWNER}/{model.name}")


def named_by(owner: str, name: str) -> Model:
    """Raises NotFound."""
    return model_named(name if owner == OWNER else f"{owner}/{name}")


def by_version(version: str) -> tuple[str, Model]:
    """What `version` names: a slug to show, and the model.

    Raises Invalid if it names none.
    """
    slug, _, wanted = version.rpartition(":")
    wanted = wanted or version
    for model in catalog().values():
        if wanted == version_of(model):
            return slug or slug_of(model), model
    try:
        model = model_named(version.removeprefix(f"{OWNER}/"))
    except NotFound as e:
        raise Invalid([Fault("version", version, str(e.detail))]) from None
    return (version if "/" in version else slug_of(model)), model
