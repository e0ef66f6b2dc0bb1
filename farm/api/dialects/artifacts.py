"""What Stability's first API and Bedrock's Stable Diffusion ask for and answer: the same fields, two envelopes."""

import asyncio
import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from fastapi.concurrency import run_in_threadpool
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from farm import picture
from farm.accounts import Caller
from farm.answers import Answer
from farm.api.dialects import asking, served
from farm.api.dialects.served import Drawn, Rendered
from farm.api.inputs import kept
from farm.catalog import Model
from farm.errors import Fault, Invalid
from farm.features import Given
from farm.picture import MaskOf
from farm.spec import MAX_PROMPT, StyleName, Text
from farm.styles import fitted
from farm.submissions import Submission

GUIDANCE, STEPS = 7.0, 30  # where a request leaves them open, and the model allows it
IMAGE_STRENGTH = 0.35
MAX_SEED = 4_294_967_295
MAX_TEXT = 2000  # characters of one text

# what they call the farm's samplers; the first that the model has is taken
SAMPLERS: Mapping[str, tuple[str, ...]] = {
    "DDIM": ("ddim",),
    "DDPM": ("ddpm",),
    "K_DPMPP_2M": ("dpm++2m", "dpm++2m-karras"),
    "K_EULER": ("euler", "flow-euler"),
    "K_EULER_ANCESTRAL": ("euler-a",),
    "K_HEUN": ("heun", "flow-heun"),
}
NOT_SERVED = ("K_DPMPP_2S_ANCESTRAL", "K_DPM_2", "K_DPM_2_ANCESTRAL", "K_LMS")


def _seed(value: int) -> int:
    if not 0 <= value <= MAX_SEED:
        raise ValueError(f"allowed are 0 to {MAX_SEED}; 0: any")
    return value


def _short(text: str) -> str:
    if not 1 <= len(text) <= MAX_TEXT:
        raise ValueError(f"allowed are 1 to {MAX_TEXT} characters")
    return text


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class TextPrompt(BaseModel):
    """A text and its weight; a negative weight makes it part of the negative prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Annotated[
        Text, Field(json_schema_extra={"minLength": 1, "maxLength": MAX_TEXT}), AfterValidator(_short)
    ]
    weight: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] | None = None


class Asked(BaseModel):
    """The fields that all their operations have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_prompts: Annotated[list[TextPrompt], Field(min_length=1, max_length=20)] = Field(
        examples=[[{"text": "a red circle on a blue background", "weight": 1}]]
    )
    width: Annotated[int, Field(ge=1, le=8192)] | None = Field(
        None, description="the model's own if left out"
    )
    height: Annotated[int, Field(ge=1, le=8192)] | None = Field(
        None, description="the model's own if left out"
    )
    cfg_scale: Annotated[float, Field(ge=0, le=35, allow_inf_nan=False)] | None = Field(
        None, description="7 if left out, or what the model takes"
    )
    steps: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="30 if left out, or what the model takes"
    )
    seed: Annotated[int, AfterValidator(_seed)] | None = Field(None, description="0 or left out: any")
    sampler: Literal[*SAMPLERS, *NOT_SERVED] | None = None  # type: ignore[valid-type]
    samples: Annotated[int, Field(ge=1, le=10)] | None = None
    style_preset: StyleName | None = None
    init_image_mode: Literal["IMAGE_STRENGTH", "STEP_SCHEDULE"] | None = None
    image_strength: Share | None = Field(None, description="how much of the image stays; 0.35 if left out")
    step_schedule_start: Share | None = Field(None, description="1 less image_strength")
    step_schedule_end: Share | None = Field(None, description="allowed are 0 and 1: all steps run")
    mask_source: Literal["MASK_IMAGE_WHITE", "MASK_IMAGE_BLACK", "INIT_IMAGE_ALPHA"] | None = None
    clip_guidance_preset: Annotated[str, Field(max_length=63)] | None = Field(
        None, description="taken and ignored: it tunes their hosting"
    )
    extras: dict[str, Any] | None = Field(None, description="taken and ignored: it tunes their hosting")

    NAMES: ClassVar[Mapping[str, str]] = {
        "guidance": "cfg_scale", "count": "samples", "style": "style_preset", "prompt": "text_prompts",
        "negative_prompt": "text_prompts", "image": "init_image", "mask": "mask_image",
        "strength": "image_strength",
    }  # fmt: skip

    @model_validator(mode="after")
    def _one_strength(self) -> Self:
        if self.image_strength is not None and self.step_schedule_start is not None:
            raise ValueError("image_strength and step_schedule_start say the same: send one of them")
        if self.step_schedule_end not in (None, 0, 1):
            raise ValueError("step_schedule_end: allowed are 0 and 1; the farm runs all steps to the end")
        return self

    @property
    def strength(self) -> float | None:
        """The share of the steps that runs on an image; None: they left it open."""
        if self.step_schedule_start is not None:
            return self.step_schedule_start
        return None if self.image_strength is None else round(1 - self.image_strength, 6)


@dataclass(frozen=True, slots=True)
class Files:
    """The images of a request, as its account's inputs."""

    image: Given | None = None
    mask: Given | None = None


def wanted(asked: Asked, model: Model, files: Files | None = None) -> Submission:
    """What a request asks for. Raises Invalid by the request's own names."""
    files = files or Files()
    prompt, negative, weighted = words(asked.text_prompts, model)
    width, height = _size(asked, model, files.image)
    strength = asked.strength
    if files.image is not None and files.mask is None and strength is None:
        strength = round(1 - IMAGE_STRENGTH, 6)
    steps, guidance = asked.steps, asked.cfg_scale
    if steps is None and model.steps.min <= STEPS <= model.steps.max:
        steps = STEPS
    if guidance is None and model.guidance.min <= GUIDANCE <= model.guidance.max:
        guidance = GUIDANCE
    spec = {
        "prompt": prompt,
        "negative_prompt": negative or None,
        "prompt_weights": weighted or None,
        "model": model.name,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance": guidance,
        "sampler": _sampler(asked.sampler, model),
        "seed": asked.seed or None,
        "count": asked.samples,
        "style": asked.style_preset,
        "image": files.image and f"sha256:{files.image.sha256}",
        "mask": files.mask and f"sha256:{files.mask.sha256}",
        "strength": strength,
    }
    return asking.submission(spec, names=asked.NAMES)


def _sampler(name: str | None, model: Model) -> str | None:
    if name is None:
        return None
    found = [s for s in SAMPLERS.get(name, ()) if s in model.samplers]
    if not found:
        known = [n for n, ours in SAMPLERS.items() if set(ours) & set(model.samplers)]
        raise Invalid([Fault("sampler", name, f"{model.name} has {', '.join(known)}")])
    return model.sampler if model.sampler in found else found[0]


def _size(asked: Asked, model: Model, image: Given | None) -> tuple[int, int]:
    if asked.width is not None or asked.height is not None or image is None:
        return asked.width or model.side.default, asked.height or model.side.default
    size = image.width, image.height
    return size if all(map(model.side.allows, size)) else fitted(size, model)


# ------------------------------------------------------------------------------------------------ words


def words(prompts: Sequence[TextPrompt], model: Model) -> tuple[str, str, bool]:
    """Prompt and negative prompt, and whether they hold weights as compel reads them: (text)1.5.

    Texts that weigh all the same, the usual case, stay as they are. Where a model reads no weights, heavier texts come
    first. A weight of 0 leaves a text out. Raises Invalid if nothing is left to be drawn.
    """
    weighed = [(p.text, 1.0 if p.weight is None else p.weight) for p in prompts]
    wanted = [(text, weight) for text, weight in weighed if weight > 0]
    unwanted = [(text, -weight) for text, weight in weighed if weight < 0]
    if not wanted:
        raise Invalid([Fault("text_prompts", None, "one text of a weight above 0 is required")])
    if unwanted and not model.negative_prompt:
        raise Invalid([Fault("text_prompts", unwanted[0][0], f"{model.name} takes no negative weights")])
    uneven = any(len({weight for _, weight in texts}) > 1 for texts in (wanted, unwanted))
    weighted = uneven and "prompt_weights" in model.takes
    prompt, negative = (_joined(texts, weighted=weighted) for texts in (wanted, unwanted))
    if max(len(prompt), len(negative)) > MAX_PROMPT:
        raise Invalid([Fault("text_prompts", None, f"allowed are {MAX_PROMPT} characters in all")])
    return prompt, negative, weighted


def _joined(texts: list[tuple[str, float]], *, weighted: bool) -> str:
    if not weighted:
        return ", ".join(text for text, _ in sorted(texts, key=lambda t: -t[1]))
    return ", ".join(_weighted(text, weight) for text, weight in texts)


def _weighted(text: str, weight: float) -> str:
    """As compel has it; its own signs in the text are only letters."""
    plain = "".join(f"\\{c}" if c in '()"+-' else c for c in text)
    return plain if weight == 1 else f"({plain}){weight:g}"


# ------------------------------------------------------------------------------------------------ images


def from_base64(text: str, *, field: str) -> bytes:
    """Raises Invalid naming the field. A data URL's head is passed over."""
    body = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError:
        raise Invalid([Fault(field, text[:40], "it must be an image in base64")]) from None


async def files_of(
    caller: Caller, image: bytes | None, mask: bytes | None, source: str | None, *, name: str = "init_image"
) -> Files:
    """The images of a request as inputs, its mask white where it is painted anew. Raises Invalid naming the field."""
    if image is None:
        if mask is not None or source is not None:
            field = "mask_image" if mask is not None else "mask_source"
            raise Invalid([Fault(field, None, f"it needs {name}")])
        return Files()
    start = await kept(caller, image, "", field=name)
    match source:
        case None if mask is None:
            return Files(start)
        case None:
            raise Invalid([Fault("mask_source", None, "it is required with mask_image")])
        case "INIT_IMAGE_ALPHA":
            if mask is not None:
                raise Invalid([Fault("mask_image", None, "INIT_IMAGE_ALPHA takes the mask from init_image")])
            return Files(start, await _mask(caller, image, MaskOf.ALPHA, field=name))
    if mask is None:
        raise Invalid([Fault("mask_image", None, f"{source} needs it")])
    if source == "MASK_IMAGE_BLACK":
        return Files(start, await _mask(caller, mask, MaskOf.BLACK, field="mask_image"))
    return Files(start, await kept(caller, mask, "", field="mask_image"))


async def _mask(caller: Caller, data: bytes, of: MaskOf, *, field: str) -> Given:
    try:
        made = await run_in_threadpool(picture.mask, data, of)
    except ValueError as e:
        raise Invalid([Fault(field, None, str(e))]) from None
    if made is None:
        what = "transparent" if of is MaskOf.ALPHA else "black"
        raise Invalid([Fault(field, None, f"nothing of it is {what}: that is what is painted anew")])
    return await kept(caller, made, "image/png", field=field)


# ------------------------------------------------------------------------------------------------ answers


class Artifact(Answer):
    """One image in base64."""

    seed: int
    base64: str
    finishReason: Literal["SUCCESS", "ERROR", "CONTENT_FILTERED"]  # noqa: N815 - theirs


def as_file(accept: str, wanted: Submission) -> bool:
    """Whether the image itself is to be answered. Raises Invalid if there would be several."""
    if not accept.startswith("image/"):
        return False
    count = sum(asked.count for _, asked in wanted.asked())
    if count > 1:
        raise Invalid([Fault("samples", count, f"with Accept: {accept[:40]} allowed is 1")])
    return True


async def of_job(made: Rendered) -> list[Artifact]:
    """The images of a job that has ended, and ERROR for those that failed."""
    return list(await asyncio.gather(*(_artifact(f) for f in made.frames)))


async def _artifact(frame: Drawn) -> Artifact:
    if frame.image is None:
        return Artifact(seed=frame.seed, base64="", finishReason="ERROR")
    data = base64.b64encode(await served.content(frame)).decode()
    return Artifact(seed=frame.seed, base64=data, finishReason="SUCCESS")
