"""Every error as application/problem+json (RFC 9457), by one set of handlers."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from farm import errors
from farm.errors import (
    Away,
    FarmError,
    Fault,
    Forbidden,
    Invalid,
    LinesRefused,
    NotFound,
    Refused,
    TooMany,
    Unauthorized,
)
from farm.faults import LONGEST, faults_of, shortened

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
MOST_FAULTS = 100
OWN = ("type", "title", "status", "detail", "errors", "request")


class FaultShown(BaseModel):
    """One field that was refused."""

    field: str = Field(examples=["specs[0].width"])
    value: Any = Field(None, description="what came; long values are cut")
    allowed: str = Field(examples=["allowed are multiples of 8 from 64 to 128"])


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["urn:farm:invalid"])
    title: str
    status: int
    detail: str
    request: str = Field(description="the request's id, as in the farm's log")
    errors: list[FaultShown] | None = Field(None, description="each field that was refused, of a 422")


def urn(kind: type[FarmError]) -> str:
    return "urn:farm:" + re.sub("(?<=[a-z0-9])(?=[A-Z])", "-", kind.__name__).lower()


def of(error: FarmError, request_id: str) -> Response:
    """The answer to an error. What is the farm's own fault is logged, and not told."""
    body: dict[str, Any] = {
        "type": urn(type(error)),
        "title": error.title,
        "status": error.http_status,
        "detail": error.detail or error.title,
    }
    headers = {}
    if isinstance(error, Invalid):
        shown = [
            {"field": f.field[:LONGEST], "value": shortened(f.value), "allowed": f.allowed}
            for f in error.faults
        ]
        body |= {"detail": _sentence(shown), "errors": shown[:MOST_FAULTS]}
        if isinstance(error, LinesRefused):
            body["upload"] = error.upload
    elif isinstance(error, Refused):
        body |= {k: shortened(v) for k, v in error.facts.items() if k not in OWN}
        if isinstance(error, TooMany):
            headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, Away):
        log.warning("request %s: %s", request_id, error)
        body["detail"] = f"{error.title} Try again in {error.retry_after_s} s."
        headers["Retry-After"] = str(error.retry_after_s)
    else:
        log.error("request %s: %s: %s", request_id, type(error).__name__, error)
        body |= {"type": urn(FarmError), "title": FarmError().title, "detail": _unsaid(request_id)}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="farm"'
    return _response(body, request_id, headers)


def unexpected(request_id: str) -> Response:
    """The answer when something broke that nobody thought of."""
    return _response(
        {"type": urn(FarmError), "title": FarmError().title, "status": 500, "detail": _unsaid(request_id)},
        request_id,
    )


def _unsaid(request_id: str) -> str:
    return f"It is in the farm's log under request {request_id}."


def _sentence(shown: Sequence[Mapping[str, Any]]) -> str:
    parts = [f"{f['field']}: {f['allowed']}" for f in shown[:3]]
    more = len(shown) - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more else "")


def _response(body: dict[str, Any], request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    text = json.dumps({**body, "request": request_id}, default=str)  # ASCII: whatever came can be encoded
    return Response(text, status_code=body["status"], media_type=MEDIA_TYPE, headers=dict(headers or {}))


# a browser asks its user, and sends what it was told from then on
BROWSER = 'Basic realm="farm: the API key is the password", charset="UTF-8"'


def install(app: FastAPI) -> None:
    """Answer every error of this app in the one form."""

    @app.exception_handler(FarmError)
    async def farm_error(request: Request, error: FarmError) -> Response:
        answer = of(error, request.state.id)
        if isinstance(error, Unauthorized) and request.headers.get("accept", "").startswith("text/html"):
            answer.headers["WWW-Authenticate"] = BROWSER
        return answer

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return of(Invalid(faults_of(error.errors())), request.state.id)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return of(NotFound("There is no such path."), request.state.id)
        phrase = HTTPStatus(error.status_code).phrase
        body = {
            "type": "urn:farm:" + phrase.lower().replace(" ", "-"),
            "title": phrase,
            "status": error.status_code,
            "detail": str(error.detail),
        }
        return _response(body, request.state.id, error.headers)


# ------------------------------------------------------------------------------------------------ for OpenAPI

WHEN = {
    401: Unauthorized,
    402: errors.BudgetExceeded,
    403: Forbidden,
    404: NotFound,
    409: errors.Conflict,
    410: errors.Gone,
    413: errors.TooLarge,
    422: Invalid,
    429: TooMany,
    503: Away,
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What an operation may answer when it doesn't do what was asked; 401, 429 and 503 always."""
    return {s: _documented(WHEN[s]) for s in sorted({401, 429, 503, *statuses})}


def _documented(kind: type[FarmError]) -> dict[str, Any]:
    error: FarmError = kind([Fault("spec.width", 63, "…")]) if issubclass(kind, Invalid) else kind()
    example = {
        "type": urn(kind),
        "title": error.title,
        "status": kind.http_status,
        "detail": error.title,
        "request": "b2a1c0d9e8f7",
    }
    if kind is Invalid:
        fault = {
            "field": "specs[0].width",
            "value": 63,
            "allowed": "allowed are multiples of 8 from 64 to 128",
        }
        example |= {"detail": f"{fault['field']}: {fault['allowed']}", "errors": [fault]}
    schema = {"$ref": "#/components/schemas/Problem"}
    answer: dict[str, Any] = {
        "description": error.title,
        "content": {MEDIA_TYPE: {"schema": schema, "example": example}},
    }
    if kind in (Away, TooMany):
        answer["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    if kind is Unauthorized:
        answer["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}}}
    return answer
