"""Ids: UUIDv7 inside, with a prefix outside. A frame's id is its job's plus its index.

A job's id leaves its low 24 bits free, and its frames' ids count up from there: they rise with time,
those of a job stand together, in one partition, and job and index can be read off the id.
"""

import secrets
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from farm.errors import NotFound

INDEX_BITS = 24
MAX_FRAMES = (1 << INDEX_BITS) - 1


def clock_ms(db: Session) -> int:
    """Now, by the database's clock: a host with a wrong one must not choose a partition."""
    return int(db.execute(text("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")).scalar_one())


def new_id(ms: int) -> UUID:
    """A UUIDv7 of that millisecond whose low 24 bits are zero; 50 random bits keep equal moments apart."""
    drawn = secrets.randbits(50)  # once: it is a call of the system
    value = ms << 80 | 0x7 << 76 | drawn >> 38 << 64 | 0b10 << 62 | (drawn & (1 << 38) - 1) << INDEX_BITS
    return UUID(int=value)


def frame_id(job_id: UUID, index: int) -> UUID:
    return UUID(int=job_id.int + 1 + index)


def last_frame_id(job_id: UUID) -> UUID:
    """The highest id a frame of this job may have."""
    return UUID(int=job_id.int + MAX_FRAMES)


def job_of(frame: UUID) -> UUID:
    return UUID(int=frame.int >> INDEX_BITS << INDEX_BITS)


def public(prefix: str, value: UUID) -> str:
    """`job_0192…`: prefix, underscore, 32 hex digits."""
    return f"{prefix}_{value.hex}"


def parse(prefix: str, shown: str) -> UUID:
    """The UUID behind a public id.

    Raises NotFound if it is not one of that prefix: a malformed id answers like an unknown one.
    """
    head, _, tail = shown.partition("_")
    if head != prefix or len(tail) != 32:
        raise NotFound(id=shown)
    try:
        return UUID(hex=tail)
    except ValueError:
        raise NotFound(id=shown) from None
