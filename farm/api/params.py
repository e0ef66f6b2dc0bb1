"""Path, query and header parameters that several operations share, with their limits."""

import re
from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import Header, Path, Query
from pydantic import AfterValidator

from farm import ids
from farm.control import utc
from farm.errors import Fault, Invalid, NotFound

MAX_BIGINT = 2**63 - 1
KEY = re.compile(r"[ -~]{1,255}")

JobId = Annotated[
    str, Path(description="as in the job's JSON", examples=["job_0192f0c1a2b37c4d8e5f6a7b8c000000"])
]
FrameId = Annotated[str, Path(examples=["frm_0192f0c1a2b37c4d8e5f6a7b8c000001"])]
KeyId = Annotated[str, Path(examples=["key_0192f0c1a2b37c4d8e5f6a7b8c000000"])]
AccountName = Annotated[str, Path(examples=["acme"])]
OfAccount = Annotated[str | None, Query(description="another account's, for admins", examples=["acme"])]
Index = Annotated[int, Path(ge=0, le=ids.MAX_FRAMES - 1, description="of the frame in its job, from 0")]


def _countable(moment: datetime) -> datetime:
    """In UTC, and so that a month before and after it is a time as well."""
    if not 1970 <= (found := utc(moment)).year <= 9998:
        raise ValueError("allowed are times of the years 1970 to 9998")
    return found


Moment = Annotated[
    datetime,
    Query(description="RFC 3339; without a zone it is UTC", examples=["2026-01-31T00:00:00Z"]),
    AfterValidator(_countable),
]
IdempotencyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="1 to 255 printable ASCII characters. The same key with the same body is the same job",
    ),
]
AnyIdempotencyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="1 to 255 printable ASCII characters. The same key with the same body is carried out once, and"
        " answered the same again, for a day at least",
    ),
]


def job_id(shown: str) -> UUID:
    """Raises NotFound if it is no job's."""
    value = ids.parse("job", shown)
    if ids.job_of(value) != value:
        raise NotFound(id=shown)
    return value


def checked_key(key: str | None, *, field: str) -> str | None:
    """The idempotency key. Raises Invalid naming the field it came in."""
    if key is not None and not KEY.fullmatch(key):
        raise Invalid([Fault(field, key, "allowed are 1 to 255 printable ASCII characters")])
    return key
