"""How Replicate says what went wrong."""

from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from farm.api.dialects.answers import answered, documented
from farm.api.dialects.served import told
from farm.errors import Invalid


def errors(request: Request, error: Exception) -> Response:
    said = told(request, error)
    body: dict[str, Any] = {"title": said.title, "detail": said.detail, "status": said.status}
    if isinstance(error, Invalid):
        body["invalid_fields"] = [
            {"type": "value", "field": f.field[:200], "description": f.allowed} for f in error.faults[:100]
        ]
    return answered(body, said.status, headers=said.headers, media_type="application/problem+json")


class ReplicateRefusal(BaseModel):
    """What went wrong."""

    title: str
    detail: str
    status: int
    invalid_fields: list[dict[str, str]] | None = None


ERRORS = documented(ReplicateRefusal, "application/problem+json")
