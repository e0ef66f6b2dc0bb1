"""What there is to choose from."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, RootModel

from farm.api.auth import Reader, Submitter
from farm.api.bodies import Body, described, read
from farm.api.dialects import samplers
from farm.api.dialects.answers import answered
from farm.api.dialects.automatic1111.asked import hash_of, title_of
from farm.api.dialects.automatic1111.errors import ERRORS, errors
from farm.api.dialects.automatic1111.standing import Nothing
from farm.api.dialects.browsers import OwnPages
from farm.api.dialects.served import (
    translated,
)
from farm.catalog import catalog
from farm.errors import Fault, Invalid
from farm.styles import STYLES

router = APIRouter(
    prefix="/sdapi/v1", tags=["dialects"], route_class=translated(errors), dependencies=[OwnPages]
)


class WebuiModel(BaseModel):
    """A checkpoint."""

    title: str
    model_name: str
    hash: str | None
    sha256: str | None
    filename: str
    config: str | None


class WebuiSampler(BaseModel):
    """A sampler."""

    name: str
    aliases: list[str]
    options: dict[str, str]


class WebuiScheduler(BaseModel):
    """A noise schedule."""

    name: str
    label: str
    aliases: list[str] | None
    default_rho: float | None
    need_inner_model: bool | None


class WebuiOptions(BaseModel):
    """Settings: those that a request may override."""

    model_config = ConfigDict(extra="allow")

    sd_model_checkpoint: str
    sd_checkpoint_hash: str
    samples_format: str
    CLIP_stop_at_last_layers: int


class WebuiSettings(RootModel[dict[str, Any]]):
    """Settings to change, by name."""


class WebuiStyle(BaseModel):
    """A style."""

    name: str
    prompt: str
    negative_prompt: str


class WebuiScripts(BaseModel):
    """Scripts: there are none."""

    txt2img: list[str]
    img2img: list[str]


class WebuiLora(BaseModel):
    """A LoRA, of one of the models."""

    name: str
    alias: str
    path: str
    metadata: dict[str, Any]


@router.get("/sd-models", response_class=Response, responses={200: {"model": list[WebuiModel]}, **ERRORS()})
def list_webui_models(_caller: Reader) -> Response:
    """The models, as checkpoints."""
    return answered(
        [
            {
                "title": title_of(m),
                "model_name": m.name,
                "hash": hash_of(m),
                "sha256": None,
                "filename": f"{m.name}.safetensors",
                "config": None,
            }
            for m in catalog().values()
        ]
    )


@router.get("/samplers", response_class=Response, responses={200: {"model": list[WebuiSampler]}, **ERRORS()})
def list_webui_samplers(_caller: Reader) -> Response:
    """The samplers that a model has; which one has which, a refusal says."""
    names: dict[str, list[str]] = {}
    for known in _served():
        names.setdefault(known.webui[0], []).append(known.sampler)
    return answered([{"name": n, "aliases": a, "options": {}} for n, a in names.items()])


@router.get(
    "/schedulers", response_class=Response, responses={200: {"model": list[WebuiScheduler]}, **ERRORS()}
)
def list_webui_schedulers(_caller: Reader) -> Response:
    """The noise schedules."""
    names = dict.fromkeys([samplers.ANY, *(s for k in _served() for s in k.webui[1])])
    empty = {"aliases": None, "default_rho": None, "need_inner_model": None}
    return answered([{"name": n, "label": n.capitalize(), **empty} for n in names])


def _served() -> Sequence[samplers.Known]:
    found = {s for m in catalog().values() for s in m.samplers}
    return [k for k in samplers.TABLE if k.sampler in found]


@router.get("/options", response_class=Response, responses={200: {"model": WebuiOptions}, **ERRORS()})
def show_webui_options(_caller: Reader) -> Response:
    """What holds where a request does not say otherwise."""
    default = catalog().default
    return answered(
        {
            "sd_model_checkpoint": title_of(default),
            "sd_checkpoint_hash": hash_of(default),
            "samples_format": "png",
            "CLIP_stop_at_last_layers": 1,
        }
    )


@router.post(
    "/options",
    response_class=Response,
    responses={200: {"model": Nothing}, **ERRORS(403, 413, 422)},
    openapi_extra=described(WebuiSettings),
)
def change_webui_options(_caller: Submitter, body: Body) -> Response:
    """Refused, but for what holds anyway: settings would be everybody's. Send override_settings with a request."""
    asked = read(WebuiSettings, body).root
    kept = {"sd_model_checkpoint": (title_of(catalog().default), catalog().default.name)}
    words = "settings are not changed for everybody; send override_settings with the request"
    faults = [Fault(n, v, words) for n, v in asked.items() if v not in kept.get(n, ())]
    if faults:
        raise Invalid(faults)
    return answered({})


@router.get(
    "/prompt-styles", response_class=Response, responses={200: {"model": list[WebuiStyle]}, **ERRORS()}
)
def list_webui_styles(_caller: Reader) -> Response:
    """The styles that a request may name."""
    return answered(
        [{"name": n, "prompt": s.prompt, "negative_prompt": s.negative} for n, s in STYLES.items()]
    )


@router.get("/loras", response_class=Response, responses={200: {"model": list[WebuiLora]}, **ERRORS()})
def list_webui_loras(_caller: Reader) -> Response:
    """The LoRAs, each once a model that has it."""
    return answered(
        [
            {"name": name, "alias": name, "path": f"{m.name}/{name}", "metadata": {"model": m.name}}
            for m in catalog().values()
            for name in m.loras
        ]
    )


@router.get("/scripts", response_class=Response, responses={200: {"model": WebuiScripts}, **ERRORS()})
def list_webui_scripts(_caller: Reader) -> Response:
    """Scripts: there are none."""
    return answered({"txt2img": [], "img2img": []})
