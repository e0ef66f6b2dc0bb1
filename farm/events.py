"""What happened, in order: written to the outbox in the transaction that did it, numbered by the relay after commit.

A number taken inside a transaction may become visible after a higher one; a reader that remembers the highest it
saw would miss it. So the relay alone numbers, without a gap, and wakes readers.
"""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from farm.db import sql
from farm.tables import Event, Outbox

CHANNEL = "farm_events"


def record(
    db: Session,
    kind: str,
    *,
    account_id: UUID,
    job_id: UUID,
    frame_id: UUID | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Write down what this transaction did."""
    db.add(Outbox(kind=kind, account_id=account_id, job_id=job_id, frame_id=frame_id, data=data or {}))


def relay(db: Session, *, limit: int = 10_000) -> int:
    """Number what was committed and wake the readers. Only one at a time may do it: the sweep holds a lock.

    Returns how many events got a number.
    """
    moved = db.execute(sql("relay"), {"n": limit}).one()
    if moved.events:
        db.execute(text("SELECT pg_notify(:channel, :last)"), {"channel": CHANNEL, "last": str(moved.last)})
    return int(moved.events)


def after(
    db: Session, number: int, *, account_id: UUID, job_id: UUID | None = None, limit: int = 1000
) -> Sequence[Event]:
    """An account's events above a number, of one job if asked, in order."""
    query = select(Event).where(Event.account_id == account_id, Event.number > number)
    if job_id is not None:
        query = query.where(Event.job_id == job_id)
    return db.scalars(query.order_by(Event.number).limit(limit)).all()
