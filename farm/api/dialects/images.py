"""What OpenAI's and SiliconFlow's image APIs ask for, read as one, and how both are answered.

Clients mix the two, `n` and `size` in and `data[0].url` out: a request may use either's names, and every answer has
`images` beside `data`.
"""

import asyncio
import base64
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

from fastapi import Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from farm.answers import Answer
from farm.api.dialects import asking, served
from farm.api.dialects.served import Drawn, Rendered
from farm.catalog import Model
from farm.features import Given, Ref
from farm.spec import MAX_SEED, StyleName, Text
from farm.styles import fitted
from farm.submissions import Submission

FEW_STEPS = 20  # a model that takes fewer was made for its own number of steps
SIZE = re.compile(r"([1-9]\d{0,4})\s*[xX×]\s*([1-9]\d{0,4})")
LOW_FIDELITY, HIGH_FIDELITY = 0.8, 0.5  # strength of an edit without a mask


def _size(text: str) -> str:
    if text != "auto" and SIZE.fullmatch(text) is None:
        raise ValueError("allowed are WIDTHxHEIGHT in pixels, as 1024x1024, and auto")
    return text


def _opaque(text: str) -> str:
    if text not in ("auto", "opaque"):
        raise ValueError("allowed are auto and opaque: the farm's models draw no transparency")
    return text


def _known_quality(text: str) -> str:
    if text not in QUALITIES:
        raise ValueError(f"allowed are {', '.join(QUALITIES)}")
    return text


SizeText = Annotated[str, Field(max_length=20), AfterValidator(_size)]
Name = Annotated[str, Field(max_length=200)]
QUALITIES = ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")
Quality = Annotated[str, Field(json_schema_extra={"enum": list(QUALITIES)}), AfterValidator(_known_quality)]
STEPS: Mapping[str, float] = {
    "low": 0.5,
    "high": 1.5,
    "hd": 1.5,
    "xhigh": 2.0,
    "max": 2.0,
}  # × the model's own
# their answers are base64 only, and clients of theirs look for nothing else
ALWAYS_BASE64 = ("gpt-image-", "chatgpt-image-")
OF_GPT_IMAGE = {"background", "moderation", "output_format", "output_compression", "partial_images"}
IGNORED = "taken and ignored: "


class Generation(BaseModel):
    """A request for images, in OpenAI's or SiliconFlow's words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[Text, Field(min_length=1, examples=["a red circle on a blue background"])]
    model: Name | None = Field(None, description="a model's name or alias; the farm's own if left out")
    negative_prompt: Text | None = None
    n: Annotated[int, Field(ge=1, le=10)] | None = Field(None, description="images; 1 if left out")
    batch_size: Annotated[int, Field(ge=1, le=10)] | None = Field(None, description="the same as n")
    size: SizeText | None = Field(None, description="WIDTHxHEIGHT, or auto: the model's own, or the image's")
    image_size: SizeText | None = Field(None, description="the same as size")
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    image: Ref | None = Field(None, description="to start from: a data URL, an https URL or an input's id")
    prompt_enhancement: bool | None = None
    response_format: Literal["url", "b64_json"] | None = Field(
        None,
        description="url if left out; b64_json of gpt-image models, and with fields of theirs and no model",
    )
    quality: Quality | None = Field(
        None,
        description="low: half the model's steps; high, hd: half as many again; xhigh, max: twice as many",
    )
    style: StyleName | None = None
    background: Annotated[str, Field(max_length=20), AfterValidator(_opaque)] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="of a jpeg or webp: 100 keeps most"
    )
    stream: bool | None = Field(None, description="answer with server-sent events")
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="previews a stream may show, as far as the model makes them"
    )
    moderation: Literal["auto", "low"] | None = Field(None, description=IGNORED + "the farm has none")
    user: Name | None = Field(None, description=IGNORED + "the account is the API key's")
    safety_identifier: Name | None = Field(None, description=IGNORED + "the account is the API key's")

    NAMES: ClassVar[Mapping[str, str]] = {
        "steps": "num_inference_steps", "guidance": "guidance_scale", "count": "n", "format": "output_format",
    }  # fmt: skip

    @model_validator(mode="after")
    def _one_name_each(self) -> Self:
        for one, other in (("n", "batch_size"), ("size", "image_size")):
            if None not in (a := getattr(self, one), b := getattr(self, other)) and a != b:
                raise ValueError(f"{one} and {other} mean the same: send one of them")
        return self

    @property
    def count(self) -> int:
        return self.n or self.batch_size or 1

    @property
    def names(self) -> Mapping[str, str]:
        """What this request calls the fields of a spec."""
        size = "image_size" if self.image_size is not None else "size"
        return {**self.NAMES, "width": size, "height": size, "quality": "output_compression"}

    @property
    def as_base64(self) -> bool:
        """As asked; if it is left open as OpenAI's model of that name does it, or the one its other fields are of."""
        if self.response_format is not None:
            return self.response_format == "b64_json"
        if self.model is not None:
            return self.model.lower().startswith(ALWAYS_BASE64)
        return bool(self.model_fields_set & OF_GPT_IMAGE)


class Edit(Generation):
    """The fields of a form that asks for an edit, beside its files."""

    image: None = None
    input_fidelity: Literal["low", "high"] | None = Field(
        None, description="how much of an image without a mask stays: high changes half of the steps' worth"
    )


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request as the farm takes it, and what it has to be told about that."""

    submission: Submission
    notes: list[str] = field(default_factory=list)


def wanted(
    asked: Generation, *, image: Given | None = None, mask: Given | None = None, strength: float | None = None
) -> Wanted:
    """What a request asks for; image and mask are inputs of its account already.

    Raises Invalid by the request's own names, UnknownModel.
    """
    model, notes = served.model_named(asked.model), []
    width, height = size_of(asked, model, image)
    if isinstance(asked, Edit) and mask is None and strength is None:
        strength = HIGH_FIDELITY if asked.input_fidelity == "high" else LOW_FIDELITY
    steps, guidance = asked.num_inference_steps, asked.guidance_scale
    if steps is not None and model.steps.max < FEW_STEPS and not model.steps.min <= steps <= model.steps.max:
        notes.append(f"num_inference_steps {steps} was ignored: {model.name} takes {model.steps.default}")
        steps = None
    if guidance is not None and model.guidance.min == model.guidance.max != guidance:
        notes.append(
            f"guidance_scale {guidance:g} was ignored: {model.name} is made for {model.guidance.max:g}"
        )
        guidance = None
    factor = STEPS.get(asked.quality or "")
    if steps is None and factor and model.steps.max >= FEW_STEPS:
        steps = max(model.steps.min, min(model.steps.max, round(model.steps.default * factor)))
    spec = {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "model": model.name,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance": guidance,
        "seed": asked.seed,
        "count": asked.count,
        "format": asked.output_format,
        "quality": _quality(asked),
        "image": image and f"sha256:{image.sha256}",
        "mask": mask and f"sha256:{mask.sha256}",
        "strength": strength,
        "style": asked.style,
        "prompt_enhancement": asked.prompt_enhancement,
    }
    return Wanted(asking.submission(spec, names=asked.names), notes)


def _quality(asked: Generation) -> int | None:
    if asked.output_compression is None or (
        asked.output_format in (None, "png") and asked.output_compression == 100
    ):
        return None
    return max(1, asked.output_compression)


def size_of(asked: Generation, model: Model, image: Given | None) -> tuple[int, int]:
    """Width and height: those asked for, the image's as far as the model allows them, or the model's own."""
    text = asked.size or asked.image_size or "auto"
    if (match := SIZE.fullmatch(text)) is not None:
        return int(match[1]), int(match[2])
    if image is None:
        return model.side.default, model.side.default
    size = image.width, image.height
    return size if all(map(model.side.allows, size)) else fitted(size, model)


# ------------------------------------------------------------------------------------------------ answers


class ImageShown(Answer):
    """One image: a link that anybody may follow for an hour, or the file in base64."""

    url: str | None = None
    b64_json: str | None = None
    revised_prompt: str | None = Field(None, description="what was rendered, where style or help changed it")
    seed: int


class Timings(Answer):
    inference: float = Field(description="seconds from the request to its images")


class ImagesShown(Answer):
    """Images, in OpenAI's and in SiliconFlow's shape."""

    created: int
    data: list[ImageShown]
    images: list[ImageShown] = Field(description="the same as data")
    timings: Timings
    seed: int = Field(description="of the first image")
    size: str
    output_format: str
    job: str = Field(description="the farm's job; its other images, if any failed, are told of there")
    notes: list[str] | None = Field(None, description="fields that were not taken as they were sent, and why")


async def shown(
    request: Request, asked: Generation, made: Rendered, *, began: float, notes: Sequence[str] = ()
) -> ImagesShown:
    """The answer to a request whose job has ended. Raises Gone if an image was deleted meanwhile."""
    data = await asyncio.gather(*(_shown(request, f, as_base64=asked.as_base64) for f in made.done))
    first = made.done[0]
    assert first.image
    return ImagesShown(
        created=int(time.time()),
        data=data,
        images=data,
        timings=Timings(inference=round(time.monotonic() - began, 3)),
        seed=first.seed,
        size=f"{first.image.width}x{first.image.height}",
        output_format=first.image.format,
        job=made.name,
        notes=list(notes) or None,
    )


async def _shown(request: Request, frame: Drawn, *, as_base64: bool) -> ImageShown:
    return ImageShown(
        url=None if as_base64 else served.link(request, frame),
        b64_json=await base64_of(frame) if as_base64 else None,
        revised_prompt=frame.revised_prompt,
        seed=frame.seed,
    )


async def base64_of(frame: Drawn) -> str:
    return base64.b64encode(await served.content(frame)).decode()


# ------------------------------------------------------------------------------------------------ errors


class ErrorShown(Answer):
    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None
    code: str | None


class OpenAIErrors(Answer):
    """What went wrong: OpenAI's error, and SiliconFlow's code, message and data."""

    error: ErrorShown
    code: int
    message: str
    data: None = None


# OpenAI's type and code, and SiliconFlow's code
KINDS: Mapping[int, tuple[str, str | None, int]] = {
    400: ("invalid_request_error", None, 20015),
    401: ("authentication_error", "invalid_api_key", 30014),
    403: ("permission_error", None, 30011),
    404: ("invalid_request_error", None, 20014),
    405: ("invalid_request_error", None, 20014),
    408: ("timeout", "timeout", 50504),
    409: ("conflict_error", None, 20016),
    413: ("invalid_request_error", "request_too_large", 20015),
    429: ("rate_limit_error", "rate_limit_exceeded", 50603),
    500: ("server_error", None, 50500),
    503: ("server_error", None, 50505),
}


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in both shapes; code: instead of the status's own."""
    kind, usual, number = KINDS.get(status, KINDS[400 if status < 500 else 500])
    if code == "model_not_found":
        number = 20012
    if code == "insufficient_quota":
        kind, number = "insufficient_quota", 30001
    error = ErrorShown(message=message, type=kind, param=param, code=code or usual)
    return OpenAIErrors(error=error, code=number, message=message).model_dump()
