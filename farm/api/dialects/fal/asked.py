"""What fal's clients send, and what the farm is asked for."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from farm.api.dialects import samplers
from farm.api.dialects.asking import VendorInput
from farm.api.dialects.served import model_named
from farm.catalog import Model
from farm.errors import Fault, Invalid, NotFound
from farm.spec import Format
from farm.styles import ASPECT_RATIOS, SIZES, named

MOST_IMAGES = 10
# ends of an app's name that say what its fields say anyway
TASKS = ("text-to-image", "image-to-image", "inpainting")
IGNORED = frozenset(
    {"enable_safety_checker", "safety_checker_version", "safety_tolerance", "acceleration", "request_id"}
)


class FalSize(BaseModel):
    """A size in pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: Annotated[int, Field(strict=True)]
    height: Annotated[int, Field(strict=True)]


class FalLora(BaseModel):
    """A LoRA of the model's list, by its name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Annotated[str, Field(strict=True, max_length=63)]
    scale: Annotated[float, Field(strict=True)] = 1.0


class FalInput(VendorInput):
    """What a model of the farm takes, in the words of fal's image models."""

    ignored = IGNORED

    prompt: Annotated[str, Field(strict=True)]
    negative_prompt: Annotated[str, Field(strict=True)] | None = None
    image_size: Literal[tuple(SIZES)] | FalSize | None = None  # type: ignore[valid-type]
    aspect_ratio: Literal[ASPECT_RATIOS] | None = None  # type: ignore[valid-type]
    num_inference_steps: Annotated[int, Field(strict=True)] | None = None
    guidance_scale: Annotated[float, Field(strict=True)] | None = None
    scheduler: Annotated[str, Field(strict=True, max_length=63)] | None = None
    seed: Annotated[int, Field(strict=True)] | None = None
    num_images: Annotated[int, Field(strict=True, ge=1, le=MOST_IMAGES)] = 1
    output_format: Literal["jpeg", "png", "webp"] | None = None
    format: Literal["jpeg", "png", "webp"] | None = Field(None, description="as output_format")
    sync_mode: Annotated[bool, Field(strict=True)] = Field(False, description="images as data URLs")
    image_url: Annotated[str, Field(strict=True)] | None = None
    mask_url: Annotated[str, Field(strict=True)] | None = None
    strength: Annotated[float, Field(strict=True)] | None = None
    loras: list[FalLora] | None = None
    expand_prompt: Annotated[bool, Field(strict=True)] = False


NAMES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "sampler": "scheduler",
    "count": "num_images",
    "format": "output_format",
    "image": "image_url",
    "mask": "mask_url",
    "width": "image_size.width",
    "height": "image_size.height",
    "webhook": "fal_webhook",
}


def spec_of(asked: FalInput, model: Model) -> dict[str, Any]:
    """What the farm is asked for. Raises Invalid for what contradicts itself."""
    if asked.aspect_ratio is not None and asked.image_size is not None:
        raise Invalid([Fault("aspect_ratio", asked.aspect_ratio, "send it or image_size, not both")])
    width, height = None, None
    if isinstance(asked.image_size, FalSize):
        width, height = asked.image_size.width, asked.image_size.height
    elif shape := asked.image_size or asked.aspect_ratio:
        size = named(str(shape), model)
        assert size
        width, height = size
    return {
        "model": model.name,
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "width": width,
        "height": height,
        "steps": asked.num_inference_steps,
        "guidance": asked.guidance_scale,
        "sampler": samplers.of_webui(asked.scheduler, None, model),
        "seed": asked.seed,
        "count": asked.num_images,
        "format": Format(asked.output_format or asked.format or "jpeg"),
        "image": asked.image_url,
        "mask": asked.mask_url,
        "strength": asked.strength,
        "loras": [{"name": lora.path, "scale": lora.scale} for lora in asked.loras or []] or None,
        "prompt_enhancement": asked.expand_prompt or None,
    }


def model_of(owner: str, app: str) -> Model:
    """The model of an app. Raises NotFound."""
    for task in TASKS:
        app = app.removesuffix(f"/{task}")
    if owner == "farm":
        return model_named(app or "?")
    try:
        return model_named(f"{owner}/{app}")
    except NotFound:
        return model_named(app or "?")
