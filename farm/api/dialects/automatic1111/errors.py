"""How the web UI says what went wrong."""

from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from farm.api.dialects.answers import answered, documented
from farm.api.dialects.served import (
    UnknownModel,
    told,
)
from farm.errors import Invalid


class WebuiRefusal(BaseModel):
    """What went wrong: text, or a list with a part for each field."""

    error: str
    detail: str | list[dict[str, Any]]
    body: str
    errors: str


def errors(request: Request, error: Exception) -> Response:
    said = told(request, error)
    detail: Any = said.detail
    if isinstance(error, UnknownModel):
        detail = "Model not found: " + said.detail
    if isinstance(error, Invalid):
        detail = [
            {"loc": ["body", f.field[:200]], "msg": f.allowed, "type": "value_error"}
            for f in error.faults[:100]
        ]
    headers = dict(said.headers)
    if said.status == 401:
        headers["www-authenticate"] = 'Basic realm="farm: the API key is the password"'
    words = {"error": said.kind.__name__, "detail": detail, "body": "", "errors": said.detail}
    return answered(words, said.status, headers=headers)


ERRORS = documented(WebuiRefusal)
