"""What a frame asks for: read, checked against the catalog, and what frames must share to be packed."""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from farm.catalog import Catalog, Method, Model
from farm.errors import Fault

MAX_PROMPT = 4096  # characters
MAX_SEED = 2**63 - 1
MEGAPIXEL_SHIFT = 20  # a megapixel is 1024 × 1024


class Format(StrEnum):
    PNG = "png"
    WEBP = "webp"
    JPEG = "jpeg"


CONTENT_TYPE = {Format.PNG: "image/png", Format.WEBP: "image/webp", Format.JPEG: "image/jpeg"}


class Priority(StrEnum):
    """Names of the usual classes; any of 0 to 9 is one, 9 most urgent."""

    URGENT = "urgent"
    STANDARD = "standard"
    BULK = "bulk"


PRIORITIES = {Priority.URGENT: 9, Priority.STANDARD: 5, Priority.BULK: 1}


def priority_number(value: Any) -> Any:
    """9 for urgent, 5 for standard, 1 for bulk; anything else as it came, for the type to judge."""
    return PRIORITIES[Priority(value)] if value in list(Priority) else value


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("text without NUL characters")
    return text


PriorityNumber = Annotated[
    int,
    BeforeValidator(
        priority_number,
        json_schema_input_type=Annotated[int, Field(ge=0, le=9)] | Priority,
    ),
    Field(strict=True, ge=0, le=9),
]
Text = Annotated[str, Field(strict=True, max_length=MAX_PROMPT), AfterValidator(_no_nul)]
Whole = Annotated[int, Field(strict=True)]


class Asked(BaseModel):
    """A spec as it is sent: what is left out, the model's catalog entry decides."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[Text, Field(min_length=1, examples=["a red circle on a blue background"])]
    negative_prompt: Text = ""
    model: Annotated[str, Field(strict=True, max_length=63)] = "starter"
    width: Whole | None = Field(None, description="pixels; the model's own size if left out")
    height: Whole | None = Field(None, description="pixels; the model's own size if left out")
    steps: Whole | None = Field(None, description="denoising steps; they are what is billed")
    guidance: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None
    sampler: Annotated[str, Field(strict=True, max_length=63)] | None = None
    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)] | None = Field(
        None, description="of the first image; the others count up. Drawn at random if left out"
    )
    count: Annotated[int, Field(strict=True, ge=1)] = Field(1, description="images, one seed each")
    format: Format = Format.PNG


@dataclass(frozen=True, slots=True)
class Spec:
    """A frame's spec with everything decided but the seed, which each frame has for itself."""

    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance: float
    sampler: str
    format: Format

    @property
    def guided(self) -> bool:
        """Guidance of 1 and less runs without the second row, as in diffusers."""
        return self.guidance > 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Spec":
        return cls(**{**data, "format": Format(data["format"])})

    @classmethod
    @lru_cache(maxsize=1024)
    def from_text(cls, text: str) -> "Spec":
        """The same of JSON's text. Frames of a job mostly share theirs, so it is read once."""
        return cls.from_json(json.loads(text))


def resolve(asked: Asked, models: Catalog, *, path: str = "") -> Spec | list[Fault]:
    """Decide what was left open, or say of each field what is wrong with it."""
    at = f"{path}." if path else ""
    model = models.get(asked.model)
    if model is None:
        return [Fault(f"{at}model", asked.model, f"allowed are {', '.join(models)}")]
    spec = Spec(
        model=model.name,
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        width=model.side.default if asked.width is None else asked.width,
        height=model.side.default if asked.height is None else asked.height,
        steps=model.steps.default if asked.steps is None else asked.steps,
        guidance=model.guidance.default if asked.guidance is None else float(asked.guidance),
        sampler=asked.sampler or model.sampler,
        format=asked.format,
    )
    return _faults(spec, model, at) or spec


def _faults(spec: Spec, model: Model, at: str) -> list[Fault]:
    faults = []
    side = model.side
    for name in ("width", "height"):
        if not side.allows(getattr(spec, name)):
            allowed = f"allowed are multiples of {side.multiple} from {side.min} to {side.max}"
            faults.append(Fault(f"{at}{name}", getattr(spec, name), allowed))
    for name, limit in (("steps", model.steps), ("guidance", model.guidance)):
        if not limit.min <= getattr(spec, name) <= limit.max:
            faults.append(
                Fault(f"{at}{name}", getattr(spec, name), f"allowed are {limit.min} to {limit.max}")
            )
    if spec.sampler not in model.samplers:
        faults.append(Fault(f"{at}sampler", spec.sampler, f"allowed are {', '.join(model.samplers)}"))
    if spec.negative_prompt and not model.negative_prompt:
        faults.append(Fault(f"{at}negative_prompt", spec.negative_prompt, f"{model.name} takes none"))
    return faults


def random_seed() -> int:
    return secrets.randbits(63)


def seeds(first: int, count: int) -> range | list[int]:
    """One seed a frame, counting up, and round the end to 0."""
    return [(first + k) & MAX_SEED for k in range(count)]


def shape_key(spec: Spec, model: Model) -> str:
    """What frames must share in any forward pass."""
    return f"{model.name}@{model.revision[:12]}/{model.dtype} {spec.width}x{spec.height}"


def call_key(spec: Spec, model: Model) -> str:
    """What frames must share in one stock pipe() call: the shape key and what the call takes once."""
    guidance = (
        ("guided" if spec.guided else "unguided") if "guidance" in model.free else f"g{spec.guidance:g}"
    )
    return f"{shape_key(spec, model)} {spec.steps} {spec.sampler} {guidance}"


def rows(spec: Spec, model: Model) -> int:
    """Rows a frame takes in a forward pass: two when guided by a negative prompt."""
    return model.guided_rows if spec.guided else 1


def work(spec: Spec, model: Model) -> int:
    """pixels × steps × rows: what fairness charges for a frame."""
    return spec.width * spec.height * spec.steps * rows(spec, model)


def quantity(spec: Spec, method: Method) -> int:
    """What is billed, as an integer: pixels × steps, or one image."""
    return spec.width * spec.height * spec.steps if method is Method.MPX_STEP else 1


def fingerprint(spec: Spec, model: Model, seed: int) -> bytes:
    """Hash of everything that decides a frame's pixels; the file's format does not. 32 bytes."""
    facts = {**spec.to_json(), "seed": seed, "revision": model.revision, "dtype": model.dtype}
    del facts["format"]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=True).encode()).digest()
