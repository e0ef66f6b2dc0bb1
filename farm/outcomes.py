"""What became of jobs, whole: each with its frames, their images, and when work on it began.

As many statements for a page of jobs as for one. Meant for small jobs, as other APIs make them.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from farm import ids, jobs
from farm.jobs import JobStatus, JobView
from farm.queue import FrameStatus
from farm.tables import Frame, Image, Job, Pack, Ticket, Usage


@dataclass(frozen=True, slots=True)
class Part:
    """A frame of a job, its status as it is shown, and its image once there is one, while it is kept."""

    frame: Frame
    status: str
    image: Image | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A job as it is. started_at: when a worker took the first of its frames; None while none did.

    late: its deadline passed, and what was not done by then failed.
    """

    job: JobView
    parts: list[Part]
    started_at: datetime | None
    late: bool

    @property
    def cancelled(self) -> bool:
        return self.job.status == JobStatus.CANCELLED

    @property
    def over(self) -> bool:
        """Nothing more will come of it."""
        return self.job.ended_at is not None or self.cancelled or self.late

    @property
    def images(self) -> list[Image]:
        """Of the frames that are done, in order."""
        return [p.image for p in self.parts if p.image is not None]

    @property
    def reasons(self) -> list[str]:
        """Why frames failed, each once."""
        return list(dict.fromkeys(p.frame.reason or p.status for p in self.parts if p.status in LOST))


LOST = (FrameStatus.FAILED, "rejected")


def find(db: Session, account_id: UUID, job_id: UUID) -> Outcome:
    """Raises NotFound for another account's job as for one that does not exist."""
    jobs.find(db, account_id, job_id)
    return of(db, account_id, [job_id])[job_id]


def of(db: Session, account_id: UUID, job_ids: Collection[UUID]) -> dict[UUID, Outcome]:
    """Those of these jobs that are the account's."""
    views = jobs.some(db, account_id, job_ids)
    frames = _frames(db, views)
    images = _images(db, frames)
    started = _started(db, frames)
    late = set(
        db.scalars(select(Job.id).where(Job.id.in_(views), Job.late_at.is_not(None), Job.on_late == "fail"))
    )
    found = {}
    for job_id, view in views.items():
        is_cancelled = view.status == JobStatus.CANCELLED
        parts = [
            Part(f, jobs.shown_status(f, is_cancelled), images.get(f.image_id or -1)) for f in frames[job_id]
        ]
        found[job_id] = Outcome(view, parts, started.get(job_id), job_id in late)
    return found


def _frames(db: Session, wanted: Collection[UUID]) -> Mapping[UUID, list[Frame]]:
    found: dict[UUID, list[Frame]] = defaultdict(list)
    if not wanted:
        return found
    ranges = or_(*(Frame.id.between(ids.frame_id(j, 0), ids.last_frame_id(j)) for j in wanted))
    for frame in db.scalars(select(Frame).where(ranges).order_by(Frame.id)):
        found[frame.job_id].append(frame)
    return found


def _images(db: Session, frames: Mapping[UUID, list[Frame]]) -> dict[int, Image]:
    """Those that are still there, by id; of a job whose images were deleted none."""
    wanted = {f.image_id for of_job in frames.values() for f in of_job if f.image_id is not None}
    if not wanted:
        return {}
    kept = set(db.scalars(select(Job.id).where(Job.id.in_(frames), Job.images_deleted_at.is_(None))))
    shown = {f.image_id for j in kept for f in frames[j] if f.image_id is not None}
    rows = db.scalars(select(Image).where(Image.id.in_(shown), Image.deleted_at.is_(None)))
    return {row.id: row for row in rows}


def _started(db: Session, frames: Mapping[UUID, list[Frame]]) -> dict[UUID, datetime]:
    every = [f for of_job in frames.values() for f in of_job]
    packs = {f.pack_id: f.job_id for f in every if f.pack_id is not None}
    found: dict[UUID, datetime] = {}
    done = [f.id for f in every if f.status == FrameStatus.DONE]
    if done:
        charged = (
            select(Usage.job_id, func.min(Pack.claimed_at))
            .join(Pack, Pack.id == Usage.pack_id)
            .where(Usage.frame_id.in_(done), Usage.entry == 0)
            .group_by(Usage.job_id)
        )
        found = dict(db.execute(charged).tuples().all())
    if packs:
        claimed = select(Pack.id, Pack.claimed_at).where(Pack.id.in_(packs))
        for pack, at in db.execute(claimed).tuples():
            job = packs[pack]
            found[job] = min(at, found.get(job, at))
    return found


# ------------------------------------------------------------------------------------------------ too late


def give_up(db: Session, *, limit: int = 100) -> int:
    """Cancel jobs that were to begin by now, and that no worker has begun. Returns how many."""
    due = (
        select(Ticket)
        .where(Ticket.start_by <= func.now())
        .order_by(Ticket.start_by)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    given_up = 0
    for ticket in db.scalars(due).all():
        ticket.start_by = None
        found = of(db, ticket.account_id, [ticket.job_id])[ticket.job_id]
        if found.over or found.started_at is not None or found.job.done or found.job.failed:
            continue
        jobs.cancel(db, ticket.account_id, ticket.job_id)
        ticket.timed_out = True
        given_up += 1
    return given_up
