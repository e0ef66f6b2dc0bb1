"""Who a request comes from: an API key as `Bearer …`, `Key …`, or as the password of Basic."""

import base64
import binascii
from typing import Annotated

from fastapi import Depends, Request

from farm import accounts
from farm.accounts import Caller, Role
from farm.db import transaction
from farm.errors import Unauthorized


def key_in(header: str | None) -> str:
    """The API key in an Authorization header.

    Raises Unauthorized if there is none.
    """
    scheme, _, value = (header or "").strip().partition(" ")
    match scheme.lower():
        case "bearer" | "key":
            return value.strip()
        case "basic":
            try:
                return base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                raise Unauthorized("the Authorization header is not Basic as it should be") from None
    raise Unauthorized("send an API key as 'Authorization: Bearer farm_…'")


def reader(request: Request) -> Caller:
    with transaction() as db:
        return accounts.authenticate(db, key_in(request.headers.get("authorization")))


def submitter(caller: Annotated[Caller, Depends(reader)]) -> Caller:
    caller.require(Role.SUBMIT)
    return caller


def admin(caller: Annotated[Caller, Depends(reader)]) -> Caller:
    caller.require(Role.ADMIN)
    return caller


# an operation names the role it needs by the type of its caller
Reader = Annotated[Caller, Depends(reader)]
Submitter = Annotated[Caller, Depends(submitter)]
Admin = Annotated[Caller, Depends(admin)]
