"""Jobs: find, list, and the verbs that work on a whole job at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from farm import budgets, events, ids
from farm.db import sql
from farm.errors import Conflict, Gone, NotFound
from farm.queue import FrameStatus
from farm.tables import Count, Frame, IdempotencyKey, Image, Job, JobLane


class JobStatus(StrEnum):
    """What is stored; what is shown says queued or running for active."""

    STAGED = "staged"
    ACTIVE = "active"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it is shown: its row, and how many of its frames are where.

    waiting: of those queued, that wait for an equal one; reused: of those done.
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


def find(db: Session, account_id: UUID, job_id: UUID) -> JobView:
    """One of the account's jobs.

    Raises NotFound for another account's as for one that does not exist.
    """
    views = _views(db, select(Job).where(Job.id == job_id, Job.account_id == account_id))
    if not views:
        raise NotFound(job=ids.public("job", job_id))
    return views[0]


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
    return [_view(j, ended.get(j.id), running.get(j.id, 0)) for j in jobs]


def _view(job: Job, ended: Any, running: int) -> JobView:
    done, failed, cancelled, reused, waiting = (
        int(getattr(ended, n, 0) or 0) for n in ("done", "failed", "cancelled", "reused", "waiting")
    )
    status: str = job.status
    if job.status == JobStatus.CANCELLED:  # the verb touched the job alone: its frames follow
        running, waiting, cancelled = 0, 0, job.frames - done - failed
    elif job.status == JobStatus.ACTIVE:
        status = "running" if running or done or failed else "queued"
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
    )


def frames_of(
    db: Session, job_id: UUID, *, first: int = 0, limit: int = 100, status: FrameStatus | None = None
) -> Sequence[Frame]:
    """A job's frames from an index on, in order. Find the job first: this looks at no account."""
    query = select(Frame).where(
        Frame.job_id == job_id, Frame.id >= ids.frame_id(job_id, first), Frame.id <= ids.last_frame_id(job_id)
    )
    if status is not None:
        query = query.where(Frame.status == status)
    return db.scalars(query.order_by(Frame.id).limit(limit)).all()


def find_frame(db: Session, account_id: UUID, frame_id: UUID) -> Frame:
    """One of the account's frames, by its id; of a job and index, by ids.frame_id().

    Raises NotFound for another account's as for one that does not exist.
    """
    frame = db.scalar(select(Frame).where(Frame.id == frame_id, Frame.account_id == account_id))
    if frame is None:
        raise NotFound(frame=ids.public("frm", frame_id))
    return frame


def shown_status(frame: Frame, job_cancelled: bool) -> str:
    """A frame's status as it is shown: an open frame of a cancelled job is cancelled already."""
    return FrameStatus.CANCELLED if job_cancelled and frame.ended_at is None else frame.status


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
    job.status, job.runnable = JobStatus.ACTIVE, True
    events.record(db, "job.resumed", account_id=account_id, job_id=job_id)
    return _reopen(db, job_id)


def reprioritise(db: Session, account_id: UUID, job_id: UUID, priority: int) -> list[str]:
    """Move a job to another class: its next frame is handed out as such. Returns the models to wake."""
    job = _locked(db, account_id, job_id)
    _refuse_ended(job)
    if job.priority == priority:
        return []
    job.priority = priority
    events.record(db, "job.reprioritised", account_id=account_id, job_id=job_id, data={"priority": priority})
    return _reopen(db, job_id)


def _reopen(db: Session, job_id: UUID) -> list[str]:
    db.flush()
    return sorted(r.model for r in db.execute(sql("open_lanes"), {"jobs": [job_id]}))


def _locked(db: Session, account_id: UUID, job_id: UUID) -> Job:
    """The job, locked against settling: whichever commits first, wins."""
    job = db.scalar(select(Job).where(Job.id == job_id, Job.account_id == account_id).with_for_update())
    if job is None:
        raise NotFound(job=ids.public("job", job_id))
    return job


def _refuse_ended(job: Job) -> None:
    if job.status in (JobStatus.CANCELLED, JobStatus.FINISHED):
        raise Conflict(f"this job is {job.status}", job=ids.public("job", job.id), status=job.status)


def models_of(db: Session, job_id: UUID) -> list[str]:
    return list(db.scalars(select(JobLane.model).where(JobLane.job_id == job_id).order_by(JobLane.model)))
