"""The models a farm serves, read from catalog.toml."""

import tomllib
from collections.abc import Mapping
from decimal import Decimal
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from farm.errors import Misconfigured
from farm.settings import settings

BUILTIN = Path(__file__).with_name("catalog.toml")

SAMPLERS = (
    "dpm++2m", "dpm++2m-karras", "dpm++2m-sde", "euler", "euler-a", "heun", "ddim", "unipc", "lcm",
    "flow-euler", "flow-heun",
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
    """What fits into one pack: frames, and their pixels together."""

    frames: int = Field(ge=1)
    pixels: int = Field(ge=1)


class Model(_Entry):
    """One checkpoint, with what may be asked of it and what that costs."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")
    title: str
    family: str
    pipeline: str
    source: str = Field(pattern=r"^(builtin|hub|dir):.+")
    revision: str = Field(min_length=1)
    licence: str
    dtype: Literal["float32", "float16", "bfloat16"]
    engine: Literal["pipe"] = "pipe"
    packs_by: Literal["call", "shape"] = "call"
    negative_prompt: bool = True
    guided_rows: int = Field(2, ge=1, le=2)
    free: tuple[Literal["guidance"], ...] = ()
    side: Side
    steps: Steps
    guidance: Guidance
    samplers: tuple[str, ...]
    sampler: str
    pack: PackLimit
    pool: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")
    price: Price

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if unknown := set(self.samplers) - set(SAMPLERS):
            raise ValueError(f"samplers {sorted(unknown)} are unknown; known are {', '.join(SAMPLERS)}")
        if self.sampler not in self.samplers:
            raise ValueError(f"sampler {self.sampler!r} is not one of samplers {', '.join(self.samplers)}")
        if not self.side.allows(self.side.default):
            raise ValueError(f"side.default {self.side.default} is outside its own limits")
        return self


class Catalog(Mapping[str, Model]):
    """Models by name."""

    def __init__(self, models: list[Model]) -> None:
        self._models = {m.name: m for m in models}

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def __iter__(self) -> Any:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def pool(self, name: str) -> list[Model]:
        """The models a pool's workers serve.

        Raises Misconfigured if the pool is unknown.
        """
        models = [m for m in self.values() if m.pool == name]
        if not models:
            known = ", ".join(sorted({m.pool for m in self.values()}))
            raise Misconfigured(f"no model is served by pool {name!r}; pools are {known}", pool=name)
        return models


def read(path: Path) -> Catalog:
    """Read a catalog file.

    Raises Misconfigured naming the file, the entry and what is allowed.
    """
    try:
        tables = tomllib.loads(path.read_text())
        families = tables.get("families", {})
        entries = tables["models"].items()
        return Catalog([Model(name=name, **{**families[t["family"]], **t}) for name, t in entries])
    except (OSError, tomllib.TOMLDecodeError, KeyError, ValidationError) as e:
        raise Misconfigured(f"catalog {path}: {type(e).__name__}: {e}", setting="FARM_CATALOG") from e


@cache
def catalog() -> Catalog:
    """The catalog this process works by."""
    return read(settings().catalog or BUILTIN)
