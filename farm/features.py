"""What a spec may ask for beside text: input images, control nets, LoRAs and a second pass.

Read, checked against the model's catalog entry, and counted: which steps of it run, and on how many pixels.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from farm import weights
from farm.catalog import Model
from farm.errors import Fault

STRENGTH = 0.8  # of an init image; a mask's area is painted anew: 1.0
SECOND_STRENGTH = 0.5
UPSCALED_MULTIPLE = 16  # of pixels: every family takes it
MAX_CONTROLS = 4
MAX_LORAS = 8
MAX_SCALE = 8.0  # of a LoRA or a control net, either way

STORED = re.compile(r"inp_[0-9a-f]{32}|sha256:[0-9a-f]{64}")
REFS = "allowed are inp_… of an upload, sha256:… of one, data:image/…;base64,… or https://…"


def _ref(text: str) -> str:
    if not (STORED.fullmatch(text) or text.startswith(("data:", "https://", "http://"))):
        raise ValueError(REFS)
    return text


Ref = Annotated[str, Field(strict=True), AfterValidator(_ref)]
Strength = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
Scale = Annotated[float, Field(strict=True, ge=-MAX_SCALE, le=MAX_SCALE, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]
Name = Annotated[str, Field(strict=True, min_length=1, max_length=63)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Control(_Part):
    """A control net, and the image it follows: of the frame's own size."""

    net: Name = Field(description="one of the model's control nets")
    image: Ref = Field(description="of the frame's width and height")
    scale: Scale = 1.0
    start: Share = Field(0.0, description="share of the steps after which it starts")
    end: Share = Field(1.0, description="share of the steps after which it ends")
    sketch: Annotated[bool, Field(strict=True)] = Field(
        False, description="the image is a sketch or photo: its edges are drawn first (canny nets)"
    )


class LoraUse(_Part):
    """A LoRA of the model's list."""

    name: Name
    scale: Scale = 1.0
    sha256: Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None, description="of the file; it is refused where the farm has another. Left out: the one it has"
    )


class Upscale(_Part):
    """A second pass on the image made larger, by a factor."""

    factor: Annotated[float, Field(strict=True, gt=1, le=4, allow_inf_nan=False)] = 2.0
    steps: Whole | None = Field(None, description="as many as the first pass if left out")
    strength: Strength = SECOND_STRENGTH


class Hires(_Part):
    """A second pass on the image made larger, to a size."""

    width: Whole
    height: Whole
    steps: Whole | None = Field(None, description="as many as the first pass if left out")
    strength: Strength = SECOND_STRENGTH


@dataclass(frozen=True, slots=True)
class Pass:
    """One run of the denoiser over one size: steps are those that run, of `schedule`."""

    width: int
    height: int
    schedule: int
    steps: int

    @property
    def pixels(self) -> int:
        return self.width * self.height


@dataclass(frozen=True, slots=True)
class Given:
    """An input image the account has, as far as a spec is checked against it."""

    sha256: str  # 64 hex digits
    width: int
    height: int


def steps_run(steps: int, strength: float) -> int:
    """Of a schedule of so many steps those that run on an image that is there already: strength × steps, rounded down.

    What binary fractions lack is forgiven: 0.29 × 100 are 29.
    """
    return min(steps, int(steps * strength + 1e-9))


def second_pass(width: int, height: int, steps: int, asked: Upscale | Hires | None) -> Pass | None:
    """The second pass of a frame of this size and steps: a factor's size is rounded down to multiples of 16."""
    if asked is None:
        return None
    schedule = steps if asked.steps is None else asked.steps
    if isinstance(asked, Hires):
        return Pass(asked.width, asked.height, schedule, steps_run(schedule, asked.strength))
    wide, high = (
        int(side * asked.factor) // UPSCALED_MULTIPLE * UPSCALED_MULTIPLE for side in (width, height)
    )
    return Pass(wide, high, schedule, steps_run(schedule, asked.strength))


def refs_of(asked: Any) -> Iterator[tuple[str, str]]:
    """Each input image a spec names, with its path: of Asked and of Spec."""
    if asked.image is not None:
        yield "image", asked.image
    if asked.mask is not None:
        yield "mask", asked.mask
    for k, control in enumerate(asked.control):
        yield f"control[{k}].image", control.image


def resolved(asked: Any, model: Model, given: Mapping[str, Given]) -> dict[str, Any]:
    """The optional fields of a spec: images by their hash, LoRAs with theirs, second passes with their steps."""
    hashes = {name: f"sha256:{one.sha256}" for name, one in given.items()}
    steps = model.steps.default if asked.steps is None else asked.steps
    strength = asked.strength
    if asked.image is not None and strength is None:
        strength = 1.0 if asked.mask is not None else STRENGTH
    return {
        "quality": asked.quality,
        "image": hashes.get(asked.image, asked.image),
        "strength": strength,
        "mask": hashes.get(asked.mask, asked.mask),
        "control": tuple(c.model_copy(update={"image": hashes.get(c.image, c.image)}) for c in asked.control),
        "loras": tuple(_pinned(use, model) for use in asked.loras),
        "hires": _with_steps(asked.hires, steps),
        "upscale": _with_steps(asked.upscale, steps),
        "clip_skip": asked.clip_skip,
        "prompt_weights": asked.prompt_weights,
        "long_prompt": asked.long_prompt,
        "reproducible": asked.reproducible,
    }


def _pinned(use: LoraUse, model: Model) -> LoraUse:
    if use.sha256 is not None or use.name not in model.loras:
        return use
    return use.model_copy(update={"sha256": model.loras[use.name].sha256})


P = TypeVar("P", Hires, Upscale)


def _with_steps(asked: P | None, steps: int) -> P | None:
    return asked if asked is None or asked.steps is not None else asked.model_copy(update={"steps": steps})


# ------------------------------------------------------------------------------------------------ keys


def shape_part(spec: Any, *, loras: bool) -> str:
    """What frames must share in any forward, beside model and size."""
    used = "".join(f" {u.name}@{(u.sha256 or '')[:12]}*{u.scale!r}" for u in spec.loras) if loras else ""
    return used + "".join(f" {c.net}" for c in spec.control)


def call_part(spec: Any) -> str:
    """What a call takes once beside steps, sampler and guidance; whatever changes a frame's quantity is in it."""
    said: list[tuple[str, Any]] = [
        ("img", "" if spec.strength is None else repr(spec.strength)),
        ("mask", "1" if spec.mask is not None else ""),
        ("control", ";".join(f"{c.scale!r},{c.start!r},{c.end!r}" for c in spec.control)),
        ("second", _second_part(spec) if spec.hires or spec.upscale else ""),
        ("clip", spec.clip_skip or ""),
        ("weights", "1" if spec.prompt_weights else ""),
        ("long", "1" if spec.long_prompt else ""),
        ("strict", "1" if spec.reproducible else ""),
    ]
    return "".join(f" {name}:{value}" for name, value in said if value)


def _second_part(spec: Any) -> str:
    second = spec.passes[1]
    return f"{second.width}x{second.height},{second.schedule},{second.steps}"


# ------------------------------------------------------------------------------------------------ checks

WORDS: Mapping[str, str] = {
    "image": "init images",
    "mask": "masks",
    "control": "control images",
    "loras": "LoRAs",
    "hires": "second passes",
    "upscale": "second passes",
    "clip_skip": "clip_skip",
    "prompt_weights": "prompt weights",
    "long_prompt": "long prompts",
}


def faults_of(spec: Any, model: Model, found: Mapping[str, Given], at: str) -> Iterator[Fault]:
    """What is wrong with the features of a resolved spec."""
    given = {f"sha256:{one.sha256}": one for one in found.values()}
    for name, words in WORDS.items():
        feature = "second_pass" if name in ("hires", "upscale") else name
        if getattr(spec, name) and feature not in model.takes:
            yield Fault(f"{at}{name}", _shown(getattr(spec, name)), f"{model.name} takes no {words}")
    yield from _image_faults(spec, given, at)
    yield from _control_faults(spec, model, given, at)
    yield from _lora_faults(spec, model, at)
    yield from _second_faults(spec, model, at)
    if spec.clip_skip is not None and not 1 <= spec.clip_skip <= model.clip_layers:
        yield Fault(f"{at}clip_skip", spec.clip_skip, f"allowed are 1 to {model.clip_layers} layers")
    if spec.prompt_weights:
        for name in ("prompt", "negative_prompt"):
            if wrong := weights.fault_of(getattr(spec, name)):
                yield Fault(f"{at}{name}", *wrong)
    if spec.quality is not None and spec.format == "png":
        yield Fault(f"{at}quality", spec.quality, "a PNG has none; allowed with webp and jpeg")


def _shown(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _image_faults(spec: Any, given: Mapping[str, Given], at: str) -> Iterator[Fault]:
    if spec.image is None:
        for name in ("strength", "mask"):
            if getattr(spec, name) is not None:
                yield Fault(f"{at}{name}", getattr(spec, name), "it needs an image")
        return
    if spec.strength is not None and steps_run(spec.steps, spec.strength) < 1:
        yield Fault(f"{at}strength", spec.strength, _least_strength(spec.steps))
    image, mask = given.get(spec.image), given.get(spec.mask or "")
    if image and mask and (image.width, image.height) != (mask.width, mask.height):
        size = f"a mask has its image's size, {image.width} × {image.height}; it has {mask.width} × {mask.height}"
        yield Fault(f"{at}mask", spec.mask, size)


def _least_strength(steps: int) -> str:
    least = ceil(1000 / steps) / 1000  # rounded up: what is said here is enough
    return f"allowed are {least:g} and more with {steps} steps: it leaves none to run"


def _control_faults(spec: Any, model: Model, given: Mapping[str, Given], at: str) -> Iterator[Fault]:
    if "control" not in model.takes:
        return
    for k, control in enumerate(spec.control):
        path = f"{at}control[{k}]"
        net = model.controls.get(control.net)
        if net is None:
            allowed = (
                f"allowed are {', '.join(model.controls)}" if model.controls else f"{model.name} has none"
            )
            yield Fault(f"{path}.net", control.net, allowed)
        elif control.sketch and net.kind != "canny":
            yield Fault(
                f"{path}.sketch", True, f"{control.net} does not follow edges; send its control image"
            )
        if control.start >= control.end:
            yield Fault(f"{path}.end", control.end, f"allowed are more than start, {control.start:g}")
        image = given.get(control.image)
        if image and (image.width, image.height) != (spec.width, spec.height):
            size = (
                f"it must be {spec.width} × {spec.height}, as the frame; it is {image.width} × {image.height}"
            )
            yield Fault(f"{path}.image", control.image, size)
    nets = [c.net for c in spec.control]
    if len(set(nets)) < len(nets):
        yield Fault(f"{at}control", nets, "a net may come once")


def _lora_faults(spec: Any, model: Model, at: str) -> Iterator[Fault]:
    if "loras" not in model.takes:
        return
    for k, lora in enumerate(spec.loras):
        entry = model.loras.get(lora.name)
        if entry is None:
            allowed = f"allowed are {', '.join(model.loras)}" if model.loras else f"{model.name} has none"
            yield Fault(f"{at}loras[{k}].name", lora.name, allowed)
        elif lora.sha256 != entry.sha256:
            yield Fault(f"{at}loras[{k}].sha256", lora.sha256, f"the farm's {lora.name} is {entry.sha256}")
    names = [lora.name for lora in spec.loras]
    if len(set(names)) < len(names):
        yield Fault(f"{at}loras", names, "a LoRA may come once")


def _second_faults(spec: Any, model: Model, at: str) -> Iterator[Fault]:
    if spec.hires is not None and spec.upscale is not None:
        yield Fault(f"{at}upscale", _shown(spec.upscale), "one second pass: send hires or upscale")
        return
    name, asked = ("hires", spec.hires) if spec.hires is not None else ("upscale", spec.upscale)
    second = second_pass(spec.width, spec.height, spec.steps, asked)
    if second is None:
        return
    limit, side = model.steps, model.side
    if not limit.min <= second.schedule <= limit.max:
        yield Fault(f"{at}{name}.steps", second.schedule, f"allowed are {limit.min} to {limit.max}")
    elif second.steps < 1:
        yield Fault(f"{at}{name}.strength", asked.strength, _least_strength(second.schedule))
    for what in ("width", "height"):
        value = getattr(second, what)
        if name == "hires" and not side.allows(value):
            allowed = f"allowed are multiples of {side.multiple} from {side.min} to {side.max}"
            yield Fault(f"{at}hires.{what}", value, allowed)
        elif name == "upscale" and not side.allows(value):
            allowed = f"{what} would be {value}; allowed are multiples of {side.multiple} from {side.min} to {side.max}"
            yield Fault(f"{at}upscale.factor", asked.factor, allowed)
