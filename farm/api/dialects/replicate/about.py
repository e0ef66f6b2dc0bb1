"""What Replicate's clients ask beside predictions: models, versions, and what signs webhooks."""

from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from farm import webhooks as callbacks
from farm.api import links
from farm.api.auth import Reader, Submitter
from farm.api.dialects.answers import answered
from farm.api.dialects.replicate.asked import PredictionInput, by_version, named_by, version_of
from farm.api.dialects.replicate.errors import ERRORS, errors
from farm.api.dialects.served import translated
from farm.catalog import Model
from farm.db import transaction
from farm.errors import Invalid, NotFound

COG = "0.16.0"  # the client reads the schemas of older ones in another way

router = APIRouter(prefix="/v1", tags=["dialects"], route_class=translated(errors))


class ReplicateVersion(BaseModel):
    """A version of a model, and what it takes."""

    id: str
    created_at: str
    cog_version: str
    openapi_schema: dict[str, Any]


class ReplicateModel(BaseModel):
    """A model of the farm."""

    url: str
    owner: str
    name: str
    description: str | None
    visibility: str
    github_url: str | None
    paper_url: str | None
    license_url: str | None
    run_count: int
    cover_image_url: str | None
    default_example: None
    latest_version: ReplicateVersion


class ReplicateVersions(BaseModel):
    """A model's versions."""

    previous: str | None
    next: str | None
    results: list[ReplicateVersion]


def _version(model: Model) -> dict[str, Any]:
    taken = PredictionInput.model_json_schema()
    made = {"type": "array", "title": "Output", "items": {"type": "string", "format": "uri"}}
    return {
        "id": version_of(model),
        "created_at": "2026-01-01T00:00:00Z",
        "cog_version": COG,
        "openapi_schema": {
            "openapi": "3.1.0",
            "info": {"title": model.title, "version": COG},
            "paths": {},
            "components": {"schemas": {"Input": taken, "Output": made}},
        },
    }


@router.get(
    "/models/{owner}/{name}",
    response_class=Response,
    responses={200: {"model": ReplicateModel}, **ERRORS(404)},
)
def show_replicate_model(_caller: Reader, owner: str, name: str, request: Request) -> Response:
    """A model of the farm, and its version."""
    model = named_by(owner, name)
    return answered(
        {
            "url": f"{links.base(request)}/v1/models/{owner}/{name}",
            "owner": owner,
            "name": name,
            "description": model.title,
            "visibility": "public",
            "github_url": None,
            "paper_url": None,
            "license_url": None,
            "run_count": 0,
            "cover_image_url": None,
            "default_example": None,
            "latest_version": _version(model),
        }
    )


@router.get(
    "/models/{owner}/{name}/versions",
    response_class=Response,
    responses={200: {"model": ReplicateVersions}, **ERRORS(404)},
)
def list_replicate_versions(_caller: Reader, owner: str, name: str) -> Response:
    """The versions of a model: the one the farm has."""
    return answered({"previous": None, "next": None, "results": [_version(named_by(owner, name))]})


@router.get(
    "/models/{owner}/{name}/versions/{version}",
    response_class=Response,
    responses={200: {"model": ReplicateVersion}, **ERRORS(404)},
)
def show_replicate_version(_caller: Reader, owner: str, name: str, version: str) -> Response:
    """A version of a model, and what it takes."""
    model = named_by(owner, name)
    with suppress(Invalid):
        if by_version(version)[1] is model:  # one of the vendor's own too, if it is an alias
            return answered({**_version(model), "id": version})
    raise NotFound("the model has no such version", id=version)


class ReplicateSecret(BaseModel):
    """What signs the account's webhooks."""

    key: str


@router.get(
    "/webhooks/default/secret",
    response_class=Response,
    responses={200: {"model": ReplicateSecret}, **ERRORS(403)},
)
def show_replicate_secret(caller: Submitter) -> Response:
    """What signs the webhooks of this account's predictions."""
    with transaction() as db:
        return answered({"key": callbacks.callback_secret(db, caller.account_id)})
