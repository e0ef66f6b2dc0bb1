"""Jobs: find, list, and the verbs that work on a whole job at once."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from types import SimpleNamespace
from typing import Any
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from farm import budgets, control, events, ids, lanes, queue
from farm.db import hot
from farm.errors import Conflict, Gone, Invalid, NotFound
from farm.queue import FrameStatus
from farm.tables import Count, Frame, IdempotencyKey, Image, Job, JobLane

BITE = 500  # frames that a verb stages or queues at most
BEHIND = (FrameStatus.QUEUED, FrameStatus.WAITING)  # what frames are that a proof holds back


class JobStatus(StrEnum):
    """What is stored; what is shown says queued, running or waiting for active."""

    STAGED = "staged"
    ACTIVE = "active"
    PAUSED = "paused"
    LATE = "late"
    CANCELLED = "cancelled"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it is shown: its row, and how many of its frames are where.

    waiting: of those queued, that wait for an equal one; staged: of those queued, that wait for the job to be approved;
    reused: of those done.
    """

    id: UUID
    name: str | None
    status: str
    priority: int
    frames: int
    queued: int
    running: int
    done: int
    failed: int
    cancelled: int
    waiting: int
    reused: int
    currency: str
    quoted: Decimal
    held: Decimal
    charged: Decimal
    created_at: datetime
    ended_at: datetime | None
    start_after: datetime | None = None
    deadline: datetime | None = None
    on_late: str | None = None
    late_at: datetime | None = None
    max_parallel: int | None = None
    after: tuple[tuple[UUID, bool], ...] = ()
    proof: int | None = None
    approved_at: datetime | None = None
    staged: int = 0


def find(db: Session, account_id: UUID, job_id: UUID) -> JobView:
    """One of the account's jobs.

    Raises NotFound for another account's as for one that does not exist.
    """
    views = _views(db, select(Job).where(Job.id == job_id, Job.account_id == account_id))
    if not views:
        raise NotFound(job=ids.public("job", job_id))
    return views[0]


BLANK = ("ended_at", "start_after", "deadline", "on_late", "late_at", "max_parallel", "proof", "approved_at")


def fresh(row: Mapping[str, Any]) -> JobView:
    """A job that was accepted just now, by what its row says: nothing more is to be known of it."""
    return _view(SimpleNamespace(**dict.fromkeys(BLANK), **row), None, 0, ())


def some(db: Session, account_id: UUID, job_ids: Collection[UUID]) -> dict[UUID, JobView]:
    """Those of these jobs that are the account's, by id."""
    views = _views(db, select(Job).where(Job.id.in_(job_ids), Job.account_id == account_id))
    return {v.id: v for v in views}


def every(
    db: Session, account_id: UUID, *, before: UUID | None = None, key: str | None = None, limit: int = 50
) -> list[JobView]:
    """An account's jobs, newest first; those older than `before`, or the one of an idempotency key."""
    query = select(Job).where(Job.account_id == account_id)
    if before is not None:
        query = query.where(Job.id < before)
    if key is not None:
        query = query.join(IdempotencyKey, IdempotencyKey.job_id == Job.id).where(
            IdempotencyKey.account_id == account_id, IdempotencyKey.key == key
        )
    return _views(db, query.order_by(Job.id.desc()).limit(limit))


def _views(db: Session, query: Any) -> list[JobView]:
    query = query.where(Job.status != JobStatus.STAGED)  # those are no jobs yet
    jobs: Sequence[Job] = db.scalars(query).all()
    wanted = [j.id for j in jobs]
    ended = {
        r.job_id: r
        for r in db.execute(
            select(
                Count.job_id,
                func.sum(Count.done).label("done"),
                func.sum(Count.failed).label("failed"),
                func.sum(Count.cancelled).label("cancelled"),
                func.sum(Count.reused).label("reused"),
                func.sum(Count.waiting).label("waiting"),
                func.sum(Count.charged).label("charged"),
                func.coalesce(func.sum(Count.freed).filter(~Count.folded), 0).label("freed"),
            )
            .where(Count.job_id.in_(wanted))
            .group_by(Count.job_id)
        )
    }
    running = dict(
        db.execute(
            select(Frame.job_id, func.count())
            .where(Frame.pack_id.is_not(None), Frame.job_id.in_(wanted))
            .group_by(Frame.job_id)
        )
        .tuples()
        .all()
    )
    after = control.after_of(db, [j.id for j in jobs if j.follows])
    return [_view(j, ended.get(j.id), running.get(j.id, 0), after.get(j.id, ())) for j in jobs]


def _view(
    job: Job | SimpleNamespace, ended: Any, running: int, after: Sequence[tuple[UUID, bool]]
) -> JobView:
    done, failed, cancelled, reused, waiting = (
        int(getattr(ended, n, 0) or 0) for n in ("done", "failed", "cancelled", "reused", "waiting")
    )
    status: str = job.status
    if job.status == JobStatus.CANCELLED:  # the verb touched the job alone: its frames follow
        running, waiting, cancelled = 0, 0, job.frames - done - failed
    elif job.status == JobStatus.LATE:
        running, waiting, failed = 0, 0, job.frames - done - cancelled
    elif job.status == JobStatus.ACTIVE and job.waits and not running:
        status = "waiting"
    elif job.status == JobStatus.ACTIVE:
        status = "running" if running or done or failed else "queued"
    staged = 0
    if job.proof is not None and job.approved_at is None and status not in ("cancelled", "late", "finished"):
        staged = job.frames - job.proof
        if status == "running" and done + failed + cancelled >= job.proof:
            status = JobStatus.STAGED.value
    return JobView(
        id=job.id,
        name=job.name,
        status=status,
        priority=job.priority,
        frames=job.frames,
        queued=job.frames - done - failed - cancelled - running,
        running=running,
        done=done,
        failed=failed,
        cancelled=cancelled,
        waiting=waiting,
        reused=reused,
        currency=job.currency,
        quoted=job.quoted,
        held=job.held - (ended.freed if ended is not None else 0),
        charged=ended.charged if ended is not None else Decimal(0),
        created_at=job.created_at,
        ended_at=job.ended_at,
        start_after=job.start_after,
        deadline=job.deadline,
        on_late=job.on_late,
        late_at=job.late_at,
        max_parallel=None if job.max_parallel == control.NO_LIMIT else job.max_parallel,
        after=tuple(after),
        proof=job.proof,
        approved_at=job.approved_at,
        staged=staged,
    )


def frames_of(
    db: Session, job_id: UUID, *, first: int = 0, limit: int = 100, status: FrameStatus | None = None
) -> Sequence[Frame]:
    """A job's frames from an index on, in order. Find the job first: this looks at no account."""
    query = select(Frame).where(
        Frame.job_id == job_id, Frame.id >= ids.frame_id(job_id, first), Frame.id <= ids.last_frame_id(job_id)
    )
    if status is not None:
        query = query.where(_shown_as(status, withheld(db, [job_id]).get(job_id)))
    return db.scalars(query.order_by(Frame.id).limit(limit)).all()


def withheld(db: Session, jobs: Collection[UUID]) -> dict[UUID, int]:
    """Of these jobs those whose proof is not approved, and the index from which on their frames wait for that."""
    if not jobs:
        return {}
    rows = select(Job.id, Job.proof).where(Job.id.in_(jobs), Job.approved_at.is_(None))
    return {job: proof for job, proof in db.execute(rows).tuples() if proof is not None}


def _shown_as(status: FrameStatus, proof: int | None) -> Any:
    """Of frames that are shown with this status; see shown_status."""
    is_so = Frame.status == status
    if proof is None:
        return is_so
    if status == FrameStatus.STAGED:
        return is_so | (Frame.status.in_(BEHIND) & (Frame.index >= proof))
    return is_so & (Frame.index < proof) if status in BEHIND else is_so


def find_frame(db: Session, account_id: UUID, frame_id: UUID) -> Frame:
    """One of the account's frames, by its id; of a job and index, by ids.frame_id().

    Raises NotFound for another account's as for one that does not exist.
    """
    frame = db.scalar(
        select(Frame)
        .join(Job, Job.id == Frame.job_id)
        .where(Frame.id == frame_id, Frame.account_id == account_id, Job.status != JobStatus.STAGED)
    )
    if frame is None:
        raise NotFound(frame=ids.public("frm", frame_id))
    return frame


def shown_status(frame: Frame, job_cancelled: bool, proof: int | None = None) -> str:
    """A frame's status as it is shown: an open frame of a cancelled job is cancelled already.

    proof: of a job that is not approved, see withheld(); what is queued behind it is staged.
    """
    if job_cancelled and frame.ended_at is None:
        return FrameStatus.CANCELLED
    if proof is not None and frame.index >= proof and frame.status in BEHIND:
        return FrameStatus.STAGED
    return frame.status


def image_of(db: Session, frame: Frame) -> Image:
    """A frame's image.

    Raises Conflict while there is none yet, Gone if there will be none or it was deleted.
    """
    name = ids.public("frm", frame.id)
    if frame.image_id is not None:
        image = db.get_one(Image, frame.image_id)
        deleted_at = db.get_one(Job, frame.job_id).images_deleted_at or image.deleted_at
        if deleted_at is not None:
            raise Gone("the image was deleted", frame=name, deleted_at=deleted_at.isoformat())
        return image
    if frame.ended_at is not None:
        raise Gone(f"this frame ended as {frame.status}", frame=name, reason=frame.reason)
    raise Conflict(f"this frame has no image yet: it is {frame.status}", frame=name)


# ------------------------------------------------------------------------------------------------ verbs


def cancel(db: Session, account_id: UUID, job_id: UUID) -> None:
    """Stop what is queued, now; what is on a device ends unbilled unless it was settled first."""
    job = _locked(db, account_id, job_id)
    if job.status == JobStatus.CANCELLED:
        return
    _refuse_ended(job)
    job.status, job.runnable = JobStatus.CANCELLED, False
    events.record(db, "job.cancelled", account_id=account_id, job_id=job_id)


def pause(db: Session, account_id: UUID, job_id: UUID) -> None:
    """Hand out no further frame; those on a device are finished."""
    job = _locked(db, account_id, job_id)
    if job.status == JobStatus.PAUSED:
        budgets.forget_pause(db, job_id)
        return
    _refuse_ended(job)
    job.status, job.runnable = JobStatus.PAUSED, False
    events.record(db, "job.paused", account_id=account_id, job_id=job_id)


def resume(db: Session, account_id: UUID, job_id: UUID) -> list[str]:
    """Hand out frames again. Returns the models to wake after the commit."""
    job = _locked(db, account_id, job_id)
    if job.status == JobStatus.ACTIVE:
        return []
    _refuse_ended(job)
    budgets.refuse_held_back(db, account_id, job.api_key_id)
    job.status, job.runnable = JobStatus.ACTIVE, not job.waits
    events.record(db, "job.resumed", account_id=account_id, job_id=job_id)
    return _reopen(db, job_id)


def approve(db: Session, account_id: UUID, job_id: UUID) -> list[str]:
    """Hand out what stands behind a job's proof. Returns the models to wake.

    The job and its keys are touched, none of its frames. Raises Conflict if it has no proof, or has ended.
    """
    job = _locked(db, account_id, job_id)
    if job.proof is None:
        raise Conflict("this job has no proof to approve", job=ids.public("job", job_id))
    if job.approved_at is not None:
        return []
    _refuse_ended(job)
    job.approved_at = db.scalars(select(func.clock_timestamp())).one()
    events.record(db, "job.approved", account_id=account_id, job_id=job_id)
    db.flush()
    hot(db, "approve", {"job": job_id, "account_id": account_id})
    hot(db, "open_job_lanes", {"jobs": [job_id]})
    models = _reopen(db, job_id)
    queue.refill(db, [job_id])
    return models


def reprioritise(db: Session, account_id: UUID, job_id: UUID, priority: int) -> list[str]:
    """Move a job to another class: its next frame is handed out as such. Returns the models to wake."""
    job = _locked(db, account_id, job_id)
    _refuse_ended(job)
    if job.priority == priority:
        return []
    job.priority = priority
    events.record(db, "job.reprioritised", account_id=account_id, job_id=job_id, data={"priority": priority})
    return _reopen(db, job_id)


def change(db: Session, account_id: UUID, job_id: UUID, changes: Mapping[str, Any]) -> list[str]:
    """Change when a job runs and how much of it at once, by the names of control.Timing. Returns the models to wake.

    What is on a device is finished all the same. Raises Invalid naming the field.
    """
    job = _locked(db, account_id, job_id)
    _refuse_ended(job)
    wanted = {n: changes.get(n, getattr(job, n)) for n in ("start_after", "deadline", "on_late")}
    if wanted["deadline"] is not None:
        wanted["on_late"] = str(wanted["on_late"] or job.on_late or control.OnLate.FAIL)
    elif "on_late" not in changes:
        wanted["on_late"] = None
    if changes.keys() & wanted.keys() and (
        faults := control.faults_of(db, **wanted, ahead="deadline" in changes)
    ):
        raise Invalid(faults)
    job.start_after, job.deadline, job.on_late = wanted["start_after"], wanted["deadline"], wanted["on_late"]
    if "deadline" in changes:
        job.late_at = None
    if "start_after" in changes and job.start_after is not None:
        job.waits = True  # until the sweep sees that it has come
    if "max_parallel" in changes:
        _cap(db, job, changes["max_parallel"])
    job.runnable = job.status == JobStatus.ACTIVE and not job.waits
    said = {k: v.isoformat() if isinstance(v, datetime) else v for k, v in changes.items()}
    events.record(db, "job.changed", account_id=account_id, job_id=job_id, data=said)
    models = _reopen(db, job_id)
    queue.refill(db, [job_id], limit=BITE)
    return models


def _cap(db: Session, job: Job, max_parallel: int | None) -> None:
    """Let so many frames be queued and claimed at once, from the commit on."""
    if job.max_parallel is None and max_parallel is None:
        return
    job.max_parallel = control.NO_LIMIT if max_parallel is None else max_parallel
    db.flush()
    if max_parallel is not None and queue.narrow(db, job.id, limit=BITE) == BITE:
        job.waits = True  # more is queued than a verb should touch: the sweep goes on, and then hands out


def _reopen(db: Session, job_id: UUID) -> list[str]:
    db.flush()
    return lanes.open_for(db, [job_id])


def _locked(db: Session, account_id: UUID, job_id: UUID) -> Job:
    """The job, locked against settling: whichever commits first, wins."""
    job = db.scalar(select(Job).where(Job.id == job_id, Job.account_id == account_id).with_for_update())
    if job is None or job.status == JobStatus.STAGED:
        raise NotFound(job=ids.public("job", job_id))
    return job


def _refuse_ended(job: Job) -> None:
    if job.status in (JobStatus.CANCELLED, JobStatus.FINISHED, JobStatus.LATE):
        raise Conflict(f"this job is {job.status}", job=ids.public("job", job.id), status=job.status)


def models_of(db: Session, job_id: UUID) -> list[str]:
    return list(db.scalars(select(JobLane.model).where(JobLane.job_id == job_id).order_by(JobLane.model)))
