"""What was used, and the proof that it is right.

Charges are made in one place, settle.sql, from rows frozen at admission; holds are set by jobs.submit and lowered
by the sweep to what open frames still need. Nothing here computes an amount of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from farm.db import sql


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
class Violation:
    """A fact of the books that is not as it must be."""

    violation: str
    subject: str
    detail: str


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


def fold_counts(db: Session, *, limit: int = 10_000) -> Sequence[UUID]:
    """Fold the counts of jobs whose frames ended, and lower their holds. Returns these jobs."""
    return db.scalars(sql("fold_counts"), {"n": limit}).all()


def audit(db: Session) -> list[Violation]:
    """Every fact of the books that is not as it must be; none, if all is well."""
    return [Violation(**_plain(r._mapping)) for r in db.execute(sql("audit"))]


def _plain(row: Any) -> dict[str, str]:
    return {name: str(value) for name, value in row.items()}
