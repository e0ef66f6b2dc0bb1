"""What accounts may do at most: frames that have not ended, input images that are kept, requests a second.

The farm's settings say it for everybody, a row of `limits` for one account or one of its keys. Open frames are the
sum of deltas in tallies, as holds are: the same moment's submissions may pass the limit by what they bring, and what
has ended counts until the sweep has folded it, a second or so. Requests are counted in each API process:
farm/api/limits.py.
"""

from dataclasses import dataclass, fields
from math import ceil
from typing import Any
from uuid import UUID

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from farm import ids
from farm.accounts import Caller
from farm.db import hot, scalar
from farm.errors import Fault, Invalid, QueueFull, TooLarge
from farm.settings import settings
from farm.tables import Account, ApiKey, Input, Limit

PACE_UNKNOWN_S = 60  # when to come back where nothing was rendered of late
LONGEST_S = 3600
MAX_RATE = 1e6
MAX_COUNT = 2**31 - 1
MAX_BIG = 2**53


@dataclass(frozen=True, slots=True)
class Limits:
    """What one account, or one key, is allowed by itself; None: what the settings say."""

    reads_per_s: float | None = None
    writes_per_s: float | None = None
    submissions_per_s: float | None = None
    open_frames: int | None = None
    inputs: int | None = None
    input_bytes: int | None = None


RATES = ("reads_per_s", "writes_per_s", "submissions_per_s")
MOST: dict[str, float] = {
    **dict.fromkeys(RATES, MAX_RATE), "open_frames": MAX_BIG, "inputs": MAX_COUNT, "input_bytes": MAX_BIG,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Use:
    """What an account has of what is limited, and what it may have."""

    open_frames: int
    max_open_frames: int
    inputs: int
    max_inputs: int
    input_bytes: int
    max_input_bytes: int


# ------------------------------------------------------------------------------------------------ frames


def check_queued(db: Session, caller: Caller, frames: int, *, before: int = 0) -> None:
    """Refuse a job of so many frames if the account, or the farm, has as many as it may.

    before: frames that the job brought earlier; they are open too, and do not end before it is whole.
    Raises QueueFull with what is used, what is allowed and when to come back; Invalid for a job that can never fit.
    """
    (row,) = hot(db, "open_frames", {"account_id": caller.account_id})
    check_row(db, row, frames, before=before)


def check_row(db: Session, row: Any, frames: int, *, before: int = 0) -> None:
    """As check_queued(), of a row of open_frames.sql that is at hand."""
    allowed = settings().max_open_frames if row.allowed is None else row.allowed
    _fit(db, frames, before=before, used=row.account, allowed=allowed, whose="the account")
    _fit(db, frames, before=before, used=row.farm, allowed=settings().max_farm_frames, whose="the farm")


def _fit(db: Session, frames: int, *, before: int, used: int, allowed: int, whose: str) -> None:
    if used + frames <= allowed:
        return
    if before + frames > allowed:
        fault = Fault("frames", before + frames, f"{whose} may have {allowed} frames that have not ended")
        raise Invalid([fault])
    used = max(used, 0)
    raise QueueFull(
        f"{whose} has {used} frames that have not ended, of {allowed}; this job brings {frames}",
        retry_after_s=_room_in_s(db, used + frames - allowed),
        limit=whose.removeprefix("the "), used=used, allowed=allowed, needed=frames,
    )  # fmt: skip


def _room_in_s(db: Session, frames: int) -> int:
    """Seconds until so many frames have ended, at the pace of the last minutes."""
    pace = scalar(db, "finished_pace")
    return min(LONGEST_S, max(1, ceil(frames / pace))) if pace else PACE_UNKNOWN_S


# ------------------------------------------------------------------------------------------------ inputs


def check_input(db: Session, account_id: UUID, size: int) -> None:
    """Refuse another input image of so many bytes if the account keeps as many as it may.

    Raises TooLarge with what is used and what is allowed.
    """
    use = _inputs(db, account_id, _row(db, account_id, None))
    if use["inputs"] + 1 > use["max_inputs"]:
        raise TooLarge(
            f"the account keeps {use['inputs']} input images, and may keep {use['max_inputs']}; remove some",
            used=use["inputs"], allowed=use["max_inputs"],
        )  # fmt: skip
    if use["input_bytes"] + size > use["max_input_bytes"]:
        raise TooLarge(
            f"the account's input images take {use['input_bytes']} bytes, and may take {use['max_input_bytes']};"
            f" this one has {size}",
            used_bytes=use["input_bytes"], allowed_bytes=use["max_input_bytes"], needed_bytes=size,
        )  # fmt: skip


def _inputs(db: Session, account_id: UUID, own: Limits) -> dict[str, int]:
    kept = select(func.count(), func.coalesce(func.sum(Input.bytes), 0))
    count, size = db.execute(kept.where(Input.account_id == account_id, Input.deleted_at.is_(None))).one()
    return {
        "inputs": int(count),
        "max_inputs": settings().max_inputs if own.inputs is None else own.inputs,
        "input_bytes": int(size),
        "max_input_bytes": settings().max_inputs_bytes if own.input_bytes is None else own.input_bytes,
    }


# ------------------------------------------------------------------------------------------------ to look at, to set


def use(db: Session, account_id: UUID) -> Use:
    """What an account has, and what it may have."""
    own = _row(db, account_id, None)
    (row,) = hot(db, "open_frames", {"account_id": account_id})
    allowed = settings().max_open_frames if own.open_frames is None else own.open_frames
    return Use(open_frames=max(row.account, 0), max_open_frames=allowed, **_inputs(db, account_id, own))


def of(db: Session, account_id: UUID, key: UUID | None = None) -> Limits:
    """What was set for an account, or for one of its keys."""
    return _row(db, account_id, key)


def both(db: Session, caller: Caller) -> tuple[Limits, Limits]:
    """What was set for the caller's account, and for its key."""
    rows = db.scalars(
        select(Limit).where(
            Limit.account_id == caller.account_id,
            Limit.api_key_id.is_(None) | (Limit.api_key_id == caller.key_id),
        )
    )
    found = {row.api_key_id: _limits(row) for row in rows}
    return found.get(None, Limits()), found.get(caller.key_id, Limits())


def put(
    db: Session, account: Account, changes: dict[str, float | int | None], *, key: UUID | None = None
) -> Limits:
    """Change limits of an account, or of one of its keys: None lets the settings say it again.

    Raises Invalid for what is not allowed.
    """
    if faults := _faults(db, account, changes, key):
        raise Invalid(faults)
    db.execute(text("SELECT FROM accounts WHERE id = :id FOR NO KEY UPDATE"), {"id": account.id})
    row = db.scalar(_of(account.id, key))
    if row is None:
        row = Limit(account_id=account.id, api_key_id=key)
        db.add(row)
    for name, value in changes.items():
        setattr(row, name, value)
    row.set_at = db.scalars(select(func.now())).one()
    db.flush()
    return _limits(row)


def _faults(
    db: Session, account: Account, changes: dict[str, float | int | None], key: UUID | None
) -> list[Fault]:
    faults = [
        Fault(name, value, f"allowed are 0 to {MOST[name]:g}")
        for name, value in changes.items()
        if value is not None and not 0 <= value <= MOST[name]
    ]
    if key is None:
        return faults
    if db.scalar(select(ApiKey.account_id).where(ApiKey.id == key)) != account.id:
        faults.append(Fault("key", ids.public("key", key), f"allowed are the keys of {account.name}"))
    faults += [
        Fault(name, value, "it is an account's limit, not a key's")
        for name, value in changes.items()
        if value is not None and name not in RATES
    ]
    return faults


def _of(account_id: UUID, key: UUID | None) -> Any:
    return select(Limit).where(Limit.account_id == account_id, Limit.api_key_id.is_not_distinct_from(key))


def _row(db: Session, account_id: UUID, key: UUID | None) -> Limits:
    row = db.scalar(_of(account_id, key))
    return Limits() if row is None else _limits(row)


def _limits(row: Limit) -> Limits:
    return Limits(**{f.name: getattr(row, f.name) for f in fields(Limits)})
