"""What happened, in order: written to the outbox in the transaction that did it, numbered by the relay after commit.

A number taken inside a transaction may become visible after a higher one; a reader that remembers the highest it
saw would miss it. So the relay alone numbers, without a gap, and wakes readers.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from uuid import UUID

from sqlalchemy import or_, select, text
from sqlalchemy.orm import Session

from farm.db import hot
from farm.errors import Fault, Invalid
from farm.tables import Event, Outbox

CHANNEL = "farm_events"
ENDS = ("job.finished", "job.cancelled")  # nothing more will come of the job
COMMON = "frame.done"  # nearly all of a large job's events
RARE = text("events.kind <> 'frame.done'")  # literally: a parameter's index would not be found
KINDS = (
    "job.accepted", "job.approved", "job.cancelled", "job.changed", "job.finished", "job.images_deleted", "job.late",
    "job.paused", "job.released", "job.reprioritised", "job.resumed", "frame.cancelled", "frame.done", "frame.failed",
    "usage.reversed", "budget.notify", "budget.stop", "budget.drain", "budget.cancel", "webhook.disabled",
    "webhook.test", "progress",
)  # fmt: skip
SORTS = ("*", *dict.fromkeys(f"{kind.partition('.')[0]}.*" for kind in KINDS if "." in kind))
MAX_KINDS = 20


def record(
    db: Session,
    kind: str,
    *,
    account_id: UUID,
    job_id: UUID | None,
    frame_id: UUID | None = None,
    data: dict[str, Any] | None = None,
) -> None:
    """Write down what this transaction did."""
    db.add(Outbox(kind=kind, account_id=account_id, job_id=job_id, frame_id=frame_id, data=data or {}))


def relay(db: Session, *, limit: int = 10_000) -> int:
    """Number what was committed and wake the readers. Only one at a time may do it: the sweep holds a lock.

    Returns how many events got a number.
    """
    (moved,) = hot(db, "relay", {"n": limit})
    if moved.events:
        db.execute(text("SELECT pg_notify(:channel, :last)"), {"channel": CHANNEL, "last": str(moved.last)})
    return int(moved.events)


def after(
    db: Session,
    number: int,
    *,
    account_id: UUID,
    job_id: UUID | None = None,
    kinds: Sequence[str] = (),
    limit: int = 1000,
) -> Sequence[Event]:
    """An account's events above a number, of one job and of some kinds if asked, in order."""
    query = select(Event).where(Event.account_id == account_id, Event.number > number)
    if job_id is not None:
        query = query.where(Event.job_id == job_id)
    if kinds:
        query = query.where(*_of(kinds))
    return db.scalars(query.order_by(Event.number).limit(limit)).all()


def has_ended(db: Session, account_id: UUID, job_id: UUID) -> bool:
    """Whether the event that ends a job has its number."""
    return bool(after(db, 0, account_id=account_id, job_id=job_id, kinds=ENDS, limit=1))


def last(db: Session) -> int:
    """The highest number; 0 if nothing has happened."""
    return db.scalar(select(Event.number).order_by(Event.number.desc()).limit(1)) or 0


# ------------------------------------------------------------------------------------------------ kinds


def checked_kinds(kinds: Sequence[str], *, field: str) -> tuple[str, ...]:
    """Kinds as job.finished, all of a sort as job.*, or all as *.

    Raises Invalid naming the field.
    """
    if len(kinds) > MAX_KINDS:
        raise Invalid([Fault(field, list(kinds), f"allowed are up to {MAX_KINDS} kinds")])
    if wrong := [k for k in kinds if k not in KINDS and k not in SORTS]:
        allowed = f"allowed are kinds of events: {', '.join((*SORTS, *KINDS))}"
        raise Invalid([Fault(field, k, allowed) for k in wrong])
    return tuple(dict.fromkeys(kinds))


@cache
def wants(kinds: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a kind is one of these; without any, each is."""
    exact = {k for k in kinds if not k.endswith("*")}
    starts = tuple(k[:-1] for k in kinds if k.endswith("*"))
    if not kinds or "" in starts:
        return lambda _: True
    return lambda kind: kind in exact or kind.startswith(starts)


def _of(kinds: Sequence[str]) -> list[Any]:
    """The same as conditions."""
    if "*" in kinds:
        return []
    exact = [k for k in kinds if not k.endswith("*")]
    starts = [Event.kind.startswith(k[:-1], autoescape=True) for k in kinds if k.endswith("*")]
    rare = [] if wants(tuple(kinds))(COMMON) else [RARE]
    return [*rare, or_(Event.kind.in_(exact), *starts)]
