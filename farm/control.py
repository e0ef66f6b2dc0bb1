"""Control: when a job is handed out, by when it has to be done, and how much of it at once.

A job that waits (jobs.waits) is accepted and held against its budget, and not runnable: until its start has come and
the jobs it comes after have ended. The sweep ends that, and does what was asked once a deadline has passed. Of a job
with max_parallel no more frames are queued and claimed at once; the others are staged, and queue.refill() brings them
up. So nobody who claims has to count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from farm import ids, lanes, queue
from farm.db import hot
from farm.errors import Fault, Invalid, NotFound
from farm.tables import Job, JobAfter

MAX_AFTER = 100
MAX_PARALLEL = 10_000
NO_LIMIT = ids.MAX_FRAMES  # max_parallel of a job that had one, until all of its frames are queued


class OnLate(StrEnum):
    """What becomes of what is not done by the deadline: it fails, unbilled; or it goes on as bulk."""

    FAIL = "fail"
    DEMOTE = "demote"


def utc(moment: datetime) -> datetime:
    """The moment in UTC; without a zone it is."""
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("allowed are times of the years 1 to 9999") from None


Moment = Annotated[datetime, Field(strict=True), AfterValidator(utc)]
Parallel = Annotated[int, Field(strict=True, ge=1, le=MAX_PARALLEL)]
JobRef = Annotated[str, Field(strict=True, max_length=64)]
Refs = Annotated[tuple[JobRef, ...], Field(max_length=MAX_AFTER)]


class Timing(BaseModel):
    """When a job runs and how much of it at once, as it is sent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    after: Refs = Field((), description="ids of jobs that have to end first, whatever becomes of them")
    after_ok: Refs = Field(
        (), description="the same, and each of their frames has to be done: else this job is cancelled"
    )
    start_after: Moment | None = Field(
        None, description="no frame is handed out before, RFC 3339", examples=["2026-12-01T02:00:00Z"]
    )
    deadline: Moment | None = Field(
        None, description="see on_late; it lies ahead", examples=["2026-12-01T06:00:00Z"]
    )
    on_late: OnLate | None = Field(
        None, description="what is not done by the deadline fails, unbilled; or goes on as bulk, if demoted"
    )
    max_parallel: Parallel | None = Field(None, description="frames that are rendered at once, at most")


@dataclass(frozen=True, slots=True)
class Admitted:
    """What submit.sql stores of it, and the jobs it comes after: True if they have to be all done."""

    columns: Mapping[str, Any]
    after: Mapping[UUID, bool]


def admit(db: Session, account_id: UUID, timing: Timing) -> Admitted:
    """Check what a submission says.

    Raises Invalid naming the field, NotFound for a job that is not the account's.
    """
    if faults := faults_of(db, timing.start_after, timing.deadline, timing.on_late):
        raise Invalid(faults)
    after = {ids.parse("job", shown): False for shown in timing.after}
    after |= {ids.parse("job", shown): True for shown in timing.after_ok}
    _find_all(db, account_id, after)
    return Admitted(
        {
            "start_after": timing.start_after,
            "deadline": timing.deadline,
            "on_late": timing.deadline and (timing.on_late or OnLate.FAIL).value,
            "max_parallel": timing.max_parallel,
            "waits": bool(after) or timing.start_after is not None,
            "follows": bool(after),
        },
        after,
    )


def faults_of(
    db: Session,
    start_after: datetime | None,
    deadline: datetime | None,
    on_late: OnLate | str | None,
    *,
    ahead: bool = True,
) -> list[Fault]:
    """What is wrong with these times. ahead: the deadline has not passed."""
    faults = []
    if deadline is None:
        if on_late is not None:
            faults.append(Fault("on_late", str(on_late), "it is said with a deadline"))
        return faults
    if ahead and deadline <= now(db):
        faults.append(Fault("deadline", deadline.isoformat(), "it lies ahead"))
    if start_after is not None and deadline <= start_after:
        faults.append(Fault("deadline", deadline.isoformat(), "it comes after start_after"))
    return faults


def now(db: Session) -> datetime:
    """By the database's clock."""
    moment: datetime = db.scalars(select(func.clock_timestamp())).one()
    return moment


def _find_all(db: Session, account_id: UUID, wanted: Mapping[UUID, bool]) -> None:
    if not wanted:
        return
    found = set(
        db.scalars(
            select(Job.id).where(Job.id.in_(wanted), Job.account_id == account_id, Job.status != "staged")
        )
    )
    for missing in wanted.keys() - found:
        raise NotFound(job=ids.public("job", missing))


def bind(db: Session, account_id: UUID, job_id: UUID, after: Mapping[UUID, bool]) -> None:
    """Store which jobs this one comes after; its row is there."""
    if after:
        rows = [
            {"job_id": job_id, "after_id": first, "account_id": account_id, "ok": ok}
            for first, ok in after.items()
        ]
        db.execute(insert(JobAfter), rows)


def after_of(db: Session, jobs: Sequence[UUID]) -> dict[UUID, list[tuple[UUID, bool]]]:
    """The jobs that each of these comes after, oldest first."""
    found: dict[UUID, list[tuple[UUID, bool]]] = {}
    if jobs:
        rows = select(JobAfter.job_id, JobAfter.after_id, JobAfter.ok).where(JobAfter.job_id.in_(jobs))
        for job, first, ok in db.execute(rows.order_by(JobAfter.after_id)).tuples():
            found.setdefault(job, []).append((first, ok))
    return found


# ------------------------------------------------------------------------------------------------ the sweep's


def release(db: Session, *, limit: int = 1000) -> int:
    """Let jobs be handed out whose turn has come, and cancel those whose turn cannot come.

    Returns how many, and of how many frames it took some back for a max_parallel that was lowered.
    """
    narrowed = queue.narrow_waiting(db)
    rows = hot(db, "release_jobs", {"n": limit})
    runnable = [r.id for r in rows if r.runnable]
    if runnable:
        lanes.open_for(db, runnable)
    return len(rows) + narrowed


def note_late(db: Session, *, limit: int = 1000) -> int:
    """Do to jobs whose deadline has passed what they ask for. Returns how many.

    Only the jobs are touched: the frames of one that fails follow, as those of a cancelled one do.
    """
    rows = hot(db, "late_jobs", {"n": limit})
    demoted = [r.id for r in rows if r.on_late == OnLate.DEMOTE]
    if demoted:
        lanes.open_for(db, demoted)
    return len(rows)
