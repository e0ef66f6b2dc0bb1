"""What was used, and the proof that it is right.

Charges are made in one place, settle.sql, from rows frozen at admission; holds are set by submissions.submit and
lowered by the sweep to what open frames still need. Nothing here computes an amount of its own.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid5

from sqlalchemy import func, select, text, tuple_
from sqlalchemy.orm import Session

from farm import ids, pricing
from farm.db import hot, scalar, sql
from farm.errors import Conflict, Damaged, Fault, Invalid, NotFound
from farm.storage import Store
from farm.tables import Image

HOUR = timedelta(hours=1)
HOURLY = UUID("5b1f5c1e-6a86-5d0e-9c3c-0d8a3f1a7f10")  # the name space of an hourly row's id
MAX_REASON = 500
READERS = 8  # images fetched at the same time
FOR_ALL = text("SET LOCAL enable_seqscan = on")  # for what reads whole tables


@dataclass(frozen=True, slots=True)
class UsageLine:
    """What one account used of one model at one rate. quantity: pixels × steps, or images."""

    model: str
    method: str
    currency: str
    rate: Decimal
    frames: int
    quantity: int
    amount: Decimal


@dataclass(frozen=True, slots=True)
class HourlyLine:
    """A usage line of one hour, under an id that is the same whenever and wherever it is asked for.

    reversed: charges taken back in that hour, less in quantity and amount. final: no row can be added any more.
    """

    id: UUID
    hour: datetime
    model: str
    method: str
    currency: str
    rate: Decimal
    frames: int
    reversed: int
    quantity: int
    amount: Decimal
    final: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of usage, and the event that told of it: a charge, or the reversal of one."""

    number: int
    frame_id: UUID
    reversal: bool
    job_id: UUID
    model: str
    method: str
    currency: str
    rate: Decimal
    quantity: int
    amount: Decimal
    at: datetime


@dataclass(frozen=True, slots=True)
class Reversed:
    """A charge that was taken back; amount is what it had been."""

    frame_id: UUID
    currency: str
    amount: Decimal
    at: datetime


@dataclass(frozen=True, slots=True)
class Violation:
    """A fact of the books that is not as it must be."""

    violation: str
    subject: str
    detail: str


@dataclass(frozen=True, slots=True)
class Unseen:
    """What an audit cannot look at, because it is not there any more."""

    what: str
    detail: str


# ------------------------------------------------------------------------------------------------ usage


def usage_lines(
    db: Session,
    account_id: UUID,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    job_id: UUID | None = None,
) -> list[UsageLine]:
    """What an account used in [since, until), by model, method, currency and rate."""
    rows = db.execute(
        sql("usage_lines"), {"account_id": account_id, "since": since, "until": until, "job_id": job_id}
    )
    return [UsageLine(**{**r._mapping, "quantity": int(r.quantity)}) for r in rows]


def hourly(db: Session, account_id: UUID, *, since: datetime, until: datetime) -> list[HourlyLine]:
    """What an account used in [since, until), hour by hour, then by model, method, currency and rate.

    Both times are taken down to the start of their hour, so that a line is always that of a whole hour.
    """
    complete: datetime = db.scalars(
        sql("settled_until")
    ).one()  # before the rows are read: what it says stays true
    window = {"since": hour_of(since), "until": hour_of(until)}
    rows = db.execute(sql("usage_hourly"), {"account_id": account_id, **window})
    return [
        HourlyLine(
            **{**r._mapping, "quantity": int(r.quantity)},
            id=_hourly_id(account_id, r),
            final=r.hour + HOUR <= complete,
        )
        for r in rows
    ]


def hour_of(moment: datetime) -> datetime:
    """The start of its hour in UTC."""
    return moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def _hourly_id(account_id: UUID, row: Any) -> UUID:
    hour = f"{row.hour:%Y-%m-%dT%HZ}"
    name = (account_id.hex, hour, row.model, row.method, row.currency, pricing.shown(row.rate))
    return uuid5(HOURLY, "/".join(name))


def export(db: Session, account_id: UUID, *, cursor: int, limit: int) -> tuple[list[Entry], int, bool]:
    """Rows of usage told of by the account's next events after a cursor, in the order they became known.

    Returns the rows, the cursor to go on from, and whether there may be more; limit counts events, of which some
    have no row. Nothing is skipped and nothing comes twice, whatever commits meanwhile.
    """
    rows = hot(db, "usage_export", {"account_id": account_id, "cursor": cursor, "n": limit})
    found = [
        Entry(
            r.number, r.frame_id, r.entry == 1, r.job_id, r.model, r.method, r.currency, r.rate, r.quantity, r.amount,
            r.at,
        )
        for r in rows
        if r.frame_id is not None
    ]  # fmt: skip
    return found, rows[-1].number if rows else cursor, len(rows) == limit


def reverse(db: Session, frame_id: UUID, *, reason: str, api_key_id: UUID | None = None) -> Reversed:
    """Take back a frame's charge. Money only: the frame stays done, and the image stays the account's.

    Raises NotFound if the frame was not charged, Conflict if it was taken back before, Invalid for a reason that is
    empty or too long.
    """
    if not 1 <= len(reason.strip()) <= MAX_REASON or "\0" in reason:
        allowed = f"allowed are 1 to {MAX_REASON} characters, none of them NUL"
        raise Invalid([Fault("reason", reason, allowed)])
    shown = ids.public("frm", frame_id)
    facts = {"frame_id": frame_id, "reason": reason.strip(), "api_key_id": api_key_id}
    row = db.execute(sql("reverse"), facts).one_or_none()
    if row is None:
        raise NotFound("no charge was made for this frame", frame=shown)
    if row.at is None:
        raise Conflict("this charge was reversed before", frame=shown)
    return Reversed(frame_id, row.currency, row.amount, row.at)


def fold_counts(db: Session, *, limit: int = 10_000) -> Sequence[UUID]:
    """Fold the counts of jobs whose frames ended, and lower their holds. Returns these jobs."""
    return [r[0] for r in hot(db, "fold_counts", {"n": limit})]


def count_delivered(db: Session, *, limit: int = 10_000) -> int:
    """Count delivered images by model, for metrics. Returns how many events were looked at."""
    return int(scalar(db, "count_delivered", {"n": limit}) or 0)


# ------------------------------------------------------------------------------------------------ audit


def audit(db: Session) -> list[Violation]:
    """Every fact of the books that is not as it must be; none, if all is well, as far as unseen() has nothing."""
    db.execute(FOR_ALL)
    return [Violation(**_plain(r._mapping)) for r in db.execute(sql("audit"))]


def unseen(db: Session) -> list[Unseen]:
    """What an audit does not see: months that were detached, and events before the oldest."""
    db.execute(FOR_ALL)
    return [Unseen(r.what, r.detail) for r in db.execute(sql("audit_unseen"))]


def _plain(row: Any) -> dict[str, str]:
    return {name: str(value) for name, value in row.items()}


def images_after(db: Session, number: int, *, limit: int, seed: int | None = None) -> Sequence[Image]:
    """The next images after one, 0 for the first, that should be in the store.

    In the order of their ids; with a seed, 0 to 2⁶³−1, in an order drawn by it, which reads the whole table.
    """
    kept = select(Image).where(Image.deleted_at.is_(None)).limit(limit)
    if seed is None:
        return db.scalars(kept.where(Image.id > number).order_by(Image.id)).all()
    db.execute(FOR_ALL)
    drawn = tuple_(func.hashint8extended(Image.id, seed), Image.id)
    if number:
        kept = kept.where(drawn > tuple_(func.hashint8extended(number, seed), number))
    return db.scalars(kept.order_by(drawn)).all()


def images_among(db: Session, numbers: Sequence[int]) -> Sequence[Image]:
    """Those of these images that should be in the store."""
    return db.scalars(select(Image).where(Image.id.in_(numbers), Image.deleted_at.is_(None))).all()


def audit_images(images: Iterable[Image], store: Store) -> list[Violation]:
    """Images whose file is not there, or not what was booked. Reads every one of them; hold no transaction.

    Raises StorageAway if the store does not answer.
    """
    with ThreadPoolExecutor(READERS) as readers:
        found = readers.map(lambda image: _wrong(image, store), images)
        return [violation for violation in found if violation]


def _wrong(image: Image, store: Store) -> Violation | None:
    try:
        data = store.get(image.key)
    except NotFound:
        return Violation("image is not in the store", str(image.id), image.key)
    except Damaged:
        return Violation("image differs from its hash", str(image.id), image.key)
    if sha256(data).digest() != image.sha256 or len(data) != image.bytes:
        return Violation("image differs from its hash", str(image.id), image.key)
    return None
