"""Request bodies: read up to a limit, and parsed in the thread that works on them, not in the event loop."""

from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError

from farm.errors import Fault, Invalid, TooLarge
from farm.faults import faults_in

MAX_BODY_BYTES = 16 << 20
MAX_COMMAS = 400_000  # of a body: what is wrong with each value takes many times its room

M = TypeVar("M", bound=BaseModel)


async def raw(request: Request) -> bytes:
    """The body as it came.

    Raises TooLarge as soon as that is known.
    """
    return await limited(request, MAX_BODY_BYTES)


async def limited(request: Request, most_bytes: int) -> bytes:
    """The body as it came.

    Raises TooLarge as soon as that is known.
    """
    length = request.headers.get("content-length", "")
    if length.isdigit() and len(length) < 19 and int(length) > most_bytes:
        raise TooLarge(f"allowed are {most_bytes} bytes", allowed_bytes=most_bytes)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most_bytes:
            raise TooLarge(f"allowed are {most_bytes} bytes", allowed_bytes=most_bytes)
        parts.append(part)
    return b"".join(parts)


Body = Annotated[bytes, Depends(raw)]  # after the caller: who has no key sends nothing


def read(model: type[M], body: bytes) -> M:
    """The body as this model.

    Raises Invalid with a fault for each field, the first hundred of them.
    """
    if len(body) > MAX_COMMAS and (commas := body.count(b",")) > MAX_COMMAS:
        raise Invalid([Fault("body", f"{commas} commas", f"allowed are {MAX_COMMAS}: send fewer values")])
    try:
        return model.model_validate_json(body)
    except ValidationError as e:
        raise Invalid(faults_in(e, model)) from None


def described(model: type[BaseModel], *examples: Any) -> dict[str, Any]:
    """The body for OpenAPI; app.py puts the models' schemas into the components."""
    content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    if examples:
        content["examples"] = {f"{n}": {"value": e} for n, e in enumerate(examples, 1)}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}
