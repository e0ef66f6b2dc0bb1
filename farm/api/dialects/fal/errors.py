"""How fal says what went wrong."""

from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from farm.api.dialects.answers import answered, documented
from farm.api.dialects.served import told
from farm.errors import Invalid


class FalRefusal(BaseModel):
    """What went wrong: text, or a list with a part for each field."""

    detail: str | list[dict[str, Any]]
    error_type: str | None = None


def errors(request: Request, error: Exception) -> Response:
    said = told(request, error)
    body: dict[str, Any] = {"detail": said.detail}
    if isinstance(error, Invalid):
        body["detail"] = [
            {"loc": ["body", f.field[:200]], "msg": f.allowed, "type": "value_error"}
            for f in error.faults[:100]
        ]
    return answered(body, said.status, headers=said.headers)


ERRORS = documented(FalRefusal)
