"""Who a request comes from: an API key as `Bearer …`, `Key …`, `Token …`, or as the password of Basic."""

import base64
import binascii
from typing import Annotated

from fastapi import Depends, Request
from fastapi.requests import HTTPConnection

from farm.accounts import Caller, Role
from farm.api.door import Door, Known
from farm.errors import Unauthorized

READS = ("GET", "HEAD", "OPTIONS")


def key_in(header: str | None) -> str:
    """The API key in an Authorization header.

    Raises Unauthorized if there is none.
    """
    scheme, _, value = (header or "").strip().partition(" ")
    match scheme.lower():
        case "bearer" | "key" | "token":
            return value.strip()
        case "basic":
            try:
                return base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                raise Unauthorized("the Authorization header is not Basic as it should be") from None
    raise Unauthorized("send an API key as 'Authorization: Bearer farm_…'")


async def admitted(request: Request, key: str, *, role: Role | None = None) -> Caller:
    """Who a request with this API key comes from; it counts against the rates of the key and its account.

    Raises Unauthorized, RateLimited (wrong keys from one address, too), and Forbidden if the key may not
    do what role says.
    """
    door: Door = request.app.state.door
    found = await door.find(key, address=address_of(request))
    request.state.known = found
    _count(request, "reads" if request.method in READS else "writes")
    if role is not None:
        found.caller.require(role)
    return found.caller


def address_of(request: HTTPConnection) -> str:
    """Where a request comes from; "" if that is not known."""
    return request.client.host if request.client else ""


def count_submission(request: Request) -> None:
    """Count a job against the rates of who was admitted with this request, once. Raises RateLimited."""
    if not request.scope["state"].get("submits"):
        request.scope["state"]["submits"] = True
        _count(request, "submissions")


def _count(request: Request, kind: str) -> None:
    taken = request.app.state.door.take(request.state.known, kind)
    request.scope["state"].setdefault("rates", []).append(taken)
    if taken.refused is not None:
        raise taken.refused


async def anybody(request: Request) -> Caller:
    """Whose key it is, whatever it may do; looked at, and counted, once a request."""
    known: Known | None = request.scope["state"].get("known")
    if known is not None:
        return known.caller
    return await admitted(request, key_in(request.headers.get("authorization")))


# each asks for itself: a dependency of a dependency takes FastAPI as long as this does


async def reader(request: Request) -> Caller:
    caller = await anybody(request)
    caller.require(Role.READ)
    return caller


async def submitter(request: Request) -> Caller:
    caller = await anybody(request)
    caller.require(Role.SUBMIT)
    return caller


async def submitting(request: Request) -> Caller:
    caller = await submitter(request)
    count_submission(request)
    return caller


async def admin(request: Request) -> Caller:
    caller = await anybody(request)
    caller.require(Role.ADMIN)
    return caller


# an operation names what it needs by the type of its caller
Anybody = Annotated[Caller, Depends(anybody)]
Reader = Annotated[Caller, Depends(reader)]
Submitter = Annotated[Caller, Depends(submitter)]
Submitting = Annotated[Caller, Depends(submitting)]  # makes jobs: counted as such
Admin = Annotated[Caller, Depends(admin)]
