"""What a frame asks for: read, checked against the catalog, and what frames must share to be packed."""

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from farm import features, prompting
from farm.catalog import Catalog, Method, Model
from farm.errors import Fault
from farm.features import (
    MAX_CONTROLS,
    MAX_LORAS,
    Control,
    Given,
    Hires,
    LoraUse,
    Pass,
    Ref,
    Strength,
    Upscale,
    second_pass,
    steps_run,
)
from farm.styles import STYLES

MAX_PROMPT = 4096  # characters
MAX_SEED = 2**63 - 1
MEGAPIXEL_SHIFT = 20  # a megapixel is 1024 × 1024
# of a spec: said beside it, and without a say in its pixels
UNSEEN = ("original_prompt", "style", "enhanced_by")
NOTHING_GIVEN: Mapping[str, Given] = {}


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


def _known_style(name: str) -> str:
    if name not in STYLES:
        raise ValueError(f"allowed are {', '.join(STYLES)}")
    return name


PriorityNumber = Annotated[
    int,
    BeforeValidator(
        priority_number,
        json_schema_input_type=Annotated[int, Field(ge=0, le=9)] | Priority,
    ),
    Field(strict=True, ge=0, le=9),
]
Text = Annotated[str, Field(strict=True, max_length=MAX_PROMPT), AfterValidator(_no_nul)]
StyleName = Annotated[
    str, Field(strict=True, json_schema_extra={"enum": list(STYLES)}), AfterValidator(_known_style)
]
Whole = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]


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
    quality: Annotated[int, Field(strict=True, ge=1, le=100)] | None = Field(
        None, description="of a jpeg, 92 if left out; of a webp, which is lossless without it"
    )
    image: Ref | None = Field(None, description="where to start from: see docs/inputs.md")
    strength: Strength | None = Field(
        None, description="how much of the image to change, as a share of the steps; 0.8, with a mask 1"
    )
    mask: Ref | None = Field(None, description="of the image's size; what is white is painted anew")
    control: Annotated[tuple[Control, ...], Field(max_length=MAX_CONTROLS)] = ()
    loras: Annotated[tuple[LoraUse, ...], Field(max_length=MAX_LORAS)] = ()
    hires: Hires | None = Field(None, description="a second pass at a larger size")
    upscale: Upscale | None = Field(None, description="a second pass at a multiple of the size")
    clip_skip: Whole | None = Field(None, description="layers of the text encoder to leave out at its end")
    prompt_weights: Flag = Field(False, description="read the prompts as compel does: (red)1.4, ball++")
    long_prompt: Flag = Field(False, description="read what is beyond 77 tokens too, in chunks")
    reproducible: Literal["strict"] | None = Field(
        None, description="strict: bit for bit the same, whatever it is rendered beside"
    )
    style: StyleName | None = Field(None, description="words that go with the prompt; the spec says which")
    prompt_enhancement: Flag = Field(
        False, description="add what the prompt lacks; the frame shows it as revised_prompt"
    )


class Helped(Asked):
    """A spec as it is sent, whose prompt a text model has worked on, or was asked to."""

    helped_prompt: Text | None = None  # None: it could not
    helped_by: str


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
    quality: int | None = None
    image: str | None = None  # sha256:…, as all input images
    strength: float | None = None
    mask: str | None = None
    control: tuple[Control, ...] = ()
    loras: tuple[LoraUse, ...] = ()
    hires: Hires | None = None
    upscale: Upscale | None = None
    clip_skip: int | None = None
    prompt_weights: bool = False
    long_prompt: bool = False
    reproducible: str | None = None
    original_prompt: str | None = None  # as it was sent, where style or prompt help changed it
    style: str | None = None
    enhanced_by: str | None = None

    @property
    def guided(self) -> bool:
        """Guidance of 1 and less runs without the second row, as in diffusers."""
        return self.guidance > 1

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The runs of the denoiser: one, or two with hires or upscale."""
        run = self.steps if self.strength is None else steps_run(self.steps, self.strength)
        first = Pass(self.width, self.height, self.steps, run)
        second = second_pass(self.width, self.height, self.steps, self.hires or self.upscale)
        return (first,) if second is None else (first, second)

    @property
    def largest_pixels(self) -> int:
        """Of its largest pass: what has to fit."""
        return max(p.pixels for p in self.passes)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The input images it names, each once."""
        return tuple(dict.fromkeys(ref for _, ref in features.refs_of(self)))

    def to_json(self) -> dict[str, Any]:
        """Without what is left at its default: the JSON of plain text to image stays as it was."""
        said = {name: getattr(self, name) for name in ALWAYS}
        for name, default in SOMETIMES.items():
            if (value := getattr(self, name)) != default:
                said[name] = _plain(value)
        return said

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Spec":
        said: dict[str, Any] = {**data, "format": Format(data["format"])}
        for name, kind in PARTS.items():
            if name in said:
                value = said[name]
                said[name] = tuple(map(kind, value)) if isinstance(value, list) else kind(value)
        return cls(**said)

    @classmethod
    @lru_cache(maxsize=1024)
    def from_text(cls, text: str) -> "Spec":
        """The same of JSON's text. Frames of a job mostly share theirs, so it is read once."""
        return cls.from_json(json.loads(text))


ALWAYS = tuple(f.name for f in fields(Spec) if f.default is MISSING)
SOMETIMES: Mapping[str, Any] = {f.name: f.default for f in fields(Spec) if f.default is not MISSING}
PARTS: Mapping[str, Callable[[Any], BaseModel]] = {
    "control": Control.model_validate,
    "loras": LoraUse.model_validate,
    "hires": Hires.model_validate,
    "upscale": Upscale.model_validate,
}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def resolve(
    asked: Asked, models: Catalog, *, path: str = "", given: Mapping[str, Given] = NOTHING_GIVEN
) -> Spec | list[Fault]:
    """Decide what was left open, or say of each field what is wrong with it.

    given: the account's input images by how the spec names them.
    """
    at = f"{path}." if path else ""
    model = models.get(asked.model)
    if model is None:
        return [Fault(f"{at}model", asked.model, f"allowed are {', '.join(models)}")]
    prompt, negative_prompt, beside = _words(asked, model)
    if len(prompt) > MAX_PROMPT or len(negative_prompt) > MAX_PROMPT:
        words = f"prompt and style have {max(len(prompt), len(negative_prompt))} characters together"
        return [Fault(f"{at}style", asked.style, f"{words}; allowed are {MAX_PROMPT}")]
    spec = Spec(
        model=model.name,
        prompt=prompt,
        negative_prompt=negative_prompt,
        width=model.side.default if asked.width is None else asked.width,
        height=model.side.default if asked.height is None else asked.height,
        steps=model.steps.default if asked.steps is None else asked.steps,
        guidance=model.guidance.default if asked.guidance is None else float(asked.guidance),
        sampler=asked.sampler or model.sampler,
        format=asked.format,
        **(features.resolved(asked, model, given) if asked.model_fields_set & SOMETIMES.keys() else {}),
        **beside,
    )
    if not asked.model_fields_set & SOMETIMES.keys():
        return _faults(spec, model, at) or spec
    return [*_faults(spec, model, at), *features.faults_of(spec, model, given, at)] or spec


def _words(asked: Asked, model: Model) -> tuple[str, str, dict[str, Any]]:
    """Prompt and negative prompt with style and help, and what a spec says of that."""
    if asked.style is None and not asked.prompt_enhancement:
        return asked.prompt, asked.negative_prompt, {}
    prompt, negative = asked.prompt, asked.negative_prompt
    beside: dict[str, Any] = {}
    helped = asked.helped_prompt if isinstance(asked, Helped) else None
    if helped is not None:
        prompt = helped
    if asked.style is not None:
        prompt, negative = prompting.styled(prompt, negative, asked.style, model)
        beside["style"] = asked.style
    if asked.prompt_enhancement:
        beside["enhanced_by"] = asked.helped_by if isinstance(asked, Helped) else prompting.TEMPLATE
        if helped is None:
            prompt = prompting.enhanced(prompt, model, longest=MAX_PROMPT)
    if prompt != asked.prompt:
        beside["original_prompt"] = asked.prompt
    return prompt, negative, beside


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


RANDOM_BITS = 52  # JavaScript loses digits of numbers beyond 2⁵³, and a job's seeds count up from this one


def random_seed() -> int:
    return secrets.randbits(RANDOM_BITS)


def seeds(first: int, count: int) -> range | list[int]:
    """One seed a frame, counting up, and round the end to 0."""
    return [(first + k) & MAX_SEED for k in range(count)]


def shape_key(spec: Spec, model: Model) -> str:
    """What frames must share in any forward pass."""
    size = f"{model.name}@{model.revision[:12]}/{model.precision} {spec.width}x{spec.height}"
    mixed = model.engine == "step"  # whose rows have LoRAs each of its own
    return size + features.shape_part(spec, loras=not mixed) if spec.loras or spec.control else size


def call_key(spec: Spec, model: Model) -> str:
    """What frames must share in one stock pipe() call: the shape key and what the call takes once."""
    guidance = (
        ("guided" if spec.guided else "unguided") if "guidance" in model.free else f"g{spec.guidance:g}"
    )
    return f"{shape_key(spec, model)} {spec.steps} {spec.sampler} {guidance}{features.call_part(spec)}"


def rows(spec: Spec, model: Model) -> int:
    """Rows a frame takes in a forward pass: two when guided by a negative prompt."""
    return model.guided_rows if spec.guided else 1


def work(spec: Spec, model: Model) -> int:
    """pixels × steps × rows of all passes: what fairness charges for a frame."""
    return quantity(spec, Method.MPX_STEP) * rows(spec, model)


def quantity(spec: Spec, method: Method) -> int:
    """What is billed, as an integer: pixels × the steps that run, of all passes; or one image."""
    if method is not Method.MPX_STEP:
        return 1
    if spec.strength is None and spec.hires is None and spec.upscale is None:  # nearly all, by the million
        return spec.width * spec.height * spec.steps
    return sum(p.pixels * p.steps for p in spec.passes)


def fingerprint(spec: Spec, model: Model, seed: int) -> bytes:
    """Hash of everything that decides a frame's pixels; the file's format does not, a quality does. 32 bytes."""
    return hashlib.sha256(fingerprinted(spec, model, seed).encode()).digest()


def fingerprinted(spec: Spec, model: Model, seed: int | str) -> str:
    """What the fingerprint is made of. seed: as text it marks the place where the number belongs, for farm/bulk."""
    facts = spec.to_json()
    facts |= {"seed": seed, "revision": model.revision, "dtype": model.precision}
    if model.beside:
        facts["beside"] = model.beside
    for name in ("format", *UNSEEN):
        facts.pop(name, None)
    if spec.control:
        facts["nets"] = [model.controls[c.net].source for c in spec.control if c.net in model.controls]
    return json.dumps(facts, sort_keys=True, ensure_ascii=True)
