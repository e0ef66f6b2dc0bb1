"""Answers of dialects: JSON that anything which came in can be repeated in, and how OpenAPI says what may go wrong."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import Response
from pydantic import BaseModel

from farm.api import problems

Responses = dict[int | str, dict[str, Any]]


def answered(
    body: Any,
    status: int = 200,
    *,
    headers: Mapping[str, str] | None = None,
    media_type: str = "application/json",
) -> Response:
    """The body as ASCII JSON: halves of surrogate pairs can be repeated too."""
    text = json.dumps(body, default=str)
    return Response(text, status_code=status, media_type=media_type, headers=dict(headers or {}))


def documented(shape: type[BaseModel], media_type: str = "application/json") -> Callable[..., Responses]:
    """What operations may answer when they don't do what was asked, in a dialect's own shape."""

    def of(*statuses: int) -> Responses:
        found = problems.documented(*statuses)
        content = {media_type: {"schema": {"$ref": f"#/components/schemas/{shape.__name__}"}}}
        return {status: {**said, "content": content} for status, said in found.items()}

    return of
