"""Synchronous calls that were not answered yet, by what they ask for: a client that tries again takes its own over.

A call that was answered is open no more, so that whoever asks for the same twice gets it twice.
"""

from uuid import UUID

from sqlalchemy import delete, func, select, text, update
from sqlalchemy.orm import Session

from farm.tables import OpenCall

OPEN_S = 3600  # a try that comes later is a call of its own
RECENT = func.now() - text(f"interval '{OPEN_S} s'")


def note(db: Session, job_id: UUID, *, account_id: UUID, digest: bytes, attempt: int) -> None:
    """Remember whose call a new job answers, in the job's transaction. attempt: how often it was tried before."""
    db.add(OpenCall(job_id=job_id, account_id=account_id, body_sha256=digest, attempt=attempt))
    db.flush()


def take_over(db: Session, *, account_id: UUID, digest: bytes, attempt: int) -> UUID | None:
    """The job of the oldest open call for the same that was tried less often; from now on it is this try's."""
    before = (
        select(OpenCall.job_id)
        .where(
            OpenCall.account_id == account_id,
            OpenCall.body_sha256 == digest,
            OpenCall.attempt < attempt,
            OpenCall.at > RECENT,
        )
        .order_by(OpenCall.at, OpenCall.job_id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    taken = update(OpenCall).where(OpenCall.job_id == before).values(attempt=attempt)
    return db.scalar(taken.returning(OpenCall.job_id))


def close(db: Session, job_id: UUID) -> None:
    """Forget a call: it is answered."""
    db.execute(delete(OpenCall).where(OpenCall.job_id == job_id))


def forget(db: Session) -> int:
    """Drop calls whose clients will not come back. Returns how many."""
    return int(getattr(db.execute(delete(OpenCall).where(OpenCall.at <= RECENT)), "rowcount", 0))
