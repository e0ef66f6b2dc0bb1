"""The models a farm serves, read from catalog.toml."""

import tomllib
from collections.abc import Mapping
from decimal import Decimal
from enum import StrEnum
from functools import cache
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from farm.errors import Misconfigured
from farm.settings import settings

BUILTIN = Path(__file__).with_name("catalog.toml")

SAMPLERS = (
    "dpm++2m", "dpm++2m-karras", "dpm++2m-sde", "euler", "euler-a", "heun", "ddim", "unipc", "lcm",
    "ddpm", "flow-euler", "flow-heun",
)  # fmt: skip


class Method(StrEnum):
    """How a frame's quantity is counted: pixels × steps, or one an image; a reused image has a price of its own."""

    MPX_STEP = "mpx_step"
    IMAGE = "image"
    REUSE = "reuse"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _exact(value: Any) -> Any:
    if isinstance(value, float):
        raise ValueError("write a rate as a string, so that it stays exact")
    return value


Exact = Annotated[Decimal, BeforeValidator(_exact), Field(ge=0)]


class Price(_Entry):
    """What a rendered frame costs, and a reused image."""

    method: Literal[Method.MPX_STEP, Method.IMAGE]
    rate: Exact
    currency: str = Field(pattern=r"^[A-Z]{3}$")
    reuse: Exact = Decimal(0)

    def rates(self) -> Mapping[Method, Decimal]:
        return {self.method: self.rate, Method.REUSE: self.reuse}


class Side(_Entry):
    """Limits of width and height, in pixels."""

    min: int = Field(gt=0)
    max: int = Field(le=8192)
    multiple: int = Field(gt=0)
    default: int

    def allows(self, value: int) -> bool:
        return self.min <= value <= self.max and value % self.multiple == 0


class Steps(_Entry):
    min: int = Field(ge=1)
    max: int = Field(le=1000)
    default: int


class Guidance(_Entry):
    min: float = Field(ge=0)
    max: float
    default: float


class PackLimit(_Entry):
    """What fits into one pack, or into one forward of a step engine: frames, and their pixels together.

    The step engine counts a guided frame's rows: rows is its cap, and knee the pixels × rows of a forward while
    an urgent frame is in it. What was measured or learned on the device may be less.
    """

    frames: int = Field(ge=1)
    pixels: int = Field(ge=1)
    rows: int = Field(32, ge=2, le=256)
    knee: int | None = Field(None, ge=1)


class Size(_Entry):
    """A size the checkpoint was trained on; others work, and less well."""

    width: int = Field(gt=0)
    height: int = Field(gt=0)


class Weights(_Entry):
    """Files beside the checkpoint: safetensors, from a folder (dir:PATH) or pinned (hub:OWNER/NAME@COMMIT)."""

    source: str = Field(pattern=r"^(dir:.+|hub:[\w.-]+/[\w.-]+@[0-9a-f]{40})$")
    title: str = ""
    licence: str = ""

    @property
    def pinned(self) -> tuple[str, str]:
        """Source and revision apart, as a model has them; a folder has no revision."""
        source, _, revision = (
            self.source.partition("@") if self.source.startswith("hub:") else (self.source, "", "")
        )
        return source, revision


class Lora(Weights):
    """An adapter that frames may ask for by name."""

    file: str = Field(pattern=r"^[^/\\][^\\]*\.safetensors$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ControlNet(Weights):
    """A net that follows a control image; canny ones also take a sketch, whose edges the worker draws."""

    kind: Literal["canny", "depth", "pose", "scribble", "lineart", "tile", "other"] = "other"


class Stage(_Entry):
    """What makes a model's image larger before it is one: a checkpoint of its own, with fixed settings."""

    pipeline: str
    source: str = Field(pattern=r"^(hub|dir):.+")
    revision: str = Field(min_length=1)
    factor: int = Field(ge=2, le=8)
    steps: int = Field(ge=1, le=1000)
    guidance: float = Field(ge=0)
    sampler: str


class Speed(_Entry):
    """What makes a checkpoint faster on a GPU; a CPU takes only channels_last of it."""

    channels_last: bool = True
    fused_qkv: bool = False
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    compile: bool = False  # repeated blocks, for the row buckets; minutes at the first start
    decode_beside: bool = False  # a step engine's decoder on a stream of its own, beside the next forward
    fp8: bool = False  # weights and activations of the denoiser, with a parity tolerance of its own


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")]
# what other services call it: in requests of their APIs it stands for the name
Alias = Annotated[str, Field(pattern=r"^[\w.:/-]{1,127}$")]
# what a frame may ask for beside text: see farm/features.py
Feature = Literal[
    "image", "mask", "control", "loras", "second_pass", "clip_skip", "prompt_weights", "long_prompt"
]


class Model(_Entry):
    """One checkpoint, with what may be asked of it and what that costs."""

    name: Name
    title: str
    aliases: tuple[Alias, ...] = ()
    family: str
    pipeline: str
    source: str = Field(pattern=r"^(builtin|hub|dir):.+")
    revision: str = Field(min_length=1)
    licence: str
    dtype: Literal["float32", "float16", "bfloat16"]
    engine: Literal["pipe", "step"] = "pipe"
    packs_by: Literal["call", "shape"] = "call"
    offload: Literal["none", "model", "sequential"] = "none"
    devices: int = Field(1, ge=1, le=16, description="GPUs that hold one copy together")
    parts: dict[str, Weights] = {}  # components from elsewhere, as LCM's unet in SDXL
    stages: tuple[Stage, ...] = ()
    speed: Speed = Speed()
    sizes: tuple[Size, ...] = ()
    loras: dict[Name, Lora] = {}
    controls: dict[Name, ControlNet] = {}
    negative_prompt: bool = True
    guided_rows: int = Field(2, ge=1, le=2)
    clip_layers: int = Field(
        12, ge=1, description="of its shortest text encoder: what clip_skip may leave out"
    )
    free: tuple[Literal["guidance"], ...] = ()
    takes: tuple[Feature, ...] = ()
    side: Side
    steps: Steps
    guidance: Guidance
    samplers: tuple[str, ...]
    sampler: str
    pack: PackLimit
    pool: Name
    pools: tuple[Name, ...] = ()
    price: Price

    @model_validator(mode="before")
    @classmethod
    def _first_pool(cls, entry: Any) -> Any:
        """pools alone is enough: the first is the one quotes and lists go by."""
        if isinstance(entry, dict) and entry.get("pools") and "pool" not in entry:
            return {**entry, "pool": entry["pools"][0]}
        return entry

    @property
    def served_by(self) -> tuple[str, ...]:
        """Every pool whose workers have this model."""
        return tuple(dict.fromkeys((self.pool, *self.pools)))

    @property
    def stage_factor(self) -> int:
        """How many times smaller than the image its first stage is."""
        return prod(stage.factor for stage in self.stages)

    @property
    def beside(self) -> dict[str, str]:
        """What else decides its pixels: components from elsewhere and later stages, with their revisions."""
        parts = {name: weights.source for name, weights in self.parts.items()}
        return parts | {f"stage-{n}": f"{s.source}@{s.revision}" for n, s in enumerate(self.stages, 2)}

    @property
    def precision(self) -> str:
        """What numbers it computes with: part of what decides a frame's pixels."""
        return f"{self.dtype}+fp8" if self.speed.fp8 else self.dtype

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if unknown := set(self.samplers) - set(SAMPLERS):
            raise ValueError(f"samplers {sorted(unknown)} are unknown; known are {', '.join(SAMPLERS)}")
        if self.sampler not in self.samplers:
            raise ValueError(f"sampler {self.sampler!r} is not one of samplers {', '.join(self.samplers)}")
        if not self.side.allows(self.side.default):
            raise ValueError(f"side.default {self.side.default} is outside its own limits")
        for name, limit in (("steps", self.steps), ("guidance", self.guidance)):
            if not limit.min <= limit.default <= limit.max:
                raise ValueError(f"{name}.default {limit.default} is outside {limit.min} to {limit.max}")
        for size in self.sizes:
            if not (self.side.allows(size.width) and self.side.allows(size.height)):
                raise ValueError(f"sizes: {size.width} × {size.height} is outside the limits of side")
        return self

    @model_validator(mode="after")
    def _engine_can(self) -> Self:
        if self.engine == "step" and self.packs_by != "shape":
            raise ValueError('engine "step" packs by shape: write packs_by = "shape"')
        if self.engine == "pipe" and self.packs_by != "call":
            raise ValueError('engine "pipe" packs by call: packs_by = "shape" wants engine = "step"')
        if unknown := {stage.sampler for stage in self.stages} - set(SAMPLERS):
            raise ValueError(
                f"stages: samplers {sorted(unknown)} are unknown; known are {', '.join(SAMPLERS)}"
            )
        if self.stages and self.engine == "step":
            raise ValueError('a model with further stages runs with engine = "pipe"')
        if self.speed.fused_qkv and self.loras:
            raise ValueError("speed.fused_qkv has no place for loras")
        if self.devices > 1 and (self.offload != "none" or self.engine == "step"):
            raise ValueError('a model over several devices runs with engine = "pipe" and offload = "none"')
        return self


class Catalog(Mapping[str, Model]):
    """Models by name."""

    def __init__(self, models: list[Model]) -> None:
        self._models = {m.name: m for m in models}
        self._aliases = {m.name.lower(): m for m in models}
        for model in models:
            for alias in model.aliases:
                self._aliases.setdefault(alias.lower(), model)

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def __iter__(self) -> Any:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def named(self, name: str) -> Model | None:
        """The model of this name or alias, whatever its case."""
        return self._aliases.get(name.lower())

    @property
    def default(self) -> Model:
        """What requests of other APIs get that name no model: FARM_DEFAULT_MODEL, or the catalog's first.

        Raises Misconfigured if the setting names none.
        """
        wanted = settings().default_model
        found = self.named(wanted) if wanted else next(iter(self._models.values()), None)
        if found is None:
            raise Misconfigured(f"there is no model {wanted!r}", setting="FARM_DEFAULT_MODEL")
        return found

    def pools(self) -> list[str]:
        return sorted({pool for m in self.values() for pool in m.served_by})

    def pool(self, name: str) -> list[Model]:
        """The models a pool's workers serve.

        Raises Misconfigured if the pool is unknown.
        """
        models = [m for m in self.values() if name in m.served_by]
        if not models:
            known = ", ".join(self.pools())
            raise Misconfigured(f"no model is served by pool {name!r}; pools are {known}", pool=name)
        return models


def read(path: Path, text: str | None = None) -> Catalog:
    """Read a catalog file. text: what it is to hold, if that is not written yet.

    Raises Misconfigured naming the file, the entry and what is allowed.
    """
    try:
        tables = tomllib.loads(path.read_text() if text is None else text)
        known = {**families(), **tables.get("families", {})}
        entries = tables["models"].items()
        models = [_model(name, {**known.get(t["family"], {}), **t}) for name, t in entries]
        _refuse_shared_aliases(models)
        return Catalog(models)
    except (OSError, tomllib.TOMLDecodeError, KeyError, ValueError) as e:
        raise Misconfigured(f"catalog {path}: {type(e).__name__}: {e}", setting="FARM_CATALOG") from e


def _model(name: str, entry: Mapping[str, Any]) -> Model:
    try:
        return Model(name=name, **entry)
    except ValidationError as e:
        wrong = [(".".join(map(str, f["loc"])), f["msg"].removeprefix("Value error, ")) for f in e.errors()]
        raise ValueError(
            f"model {name!r}: " + "; ".join(f"{at}: {said}" if at else said for at, said in wrong)
        ) from None


def _refuse_shared_aliases(models: list[Model]) -> None:
    names: dict[str, str] = {m.name.lower(): m.name for m in models}
    for model in models:
        for alias in model.aliases:
            if (other := names.setdefault(alias.lower(), model.name)) != model.name:
                raise ValueError(f"alias {alias!r} is of {other} and of {model.name}")


@cache
def families() -> Mapping[str, Mapping[str, Any]]:
    """The built-in families, known to every catalog: an operator's file need not repeat them."""
    found: Mapping[str, Mapping[str, Any]] = tomllib.loads(BUILTIN.read_text())["families"]
    return found


@cache
def catalog() -> Catalog:
    """The catalog this process works by."""
    return read(settings().catalog or BUILTIN)
