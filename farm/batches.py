"""Batches: the requests of a file, each of them some frames of a job, until a time that is set at the start.

What came of a batch is not stored anew: it is read from its jobs, and its files are written as they are fetched.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import groupby
from typing import Any
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from farm import control, ids, jobs, submissions
from farm.accounts import Caller
from farm.db import transaction
from farm.errors import Conflict, NotFound
from farm.jobs import JobStatus
from farm.queue import FrameStatus
from farm.settings import settings
from farm.spec import PRIORITIES, Asked, Priority
from farm.submissions import MAX_SPECS, Submission
from farm.tables import Batch, BatchLine, File, Frame, Image, Job

MAX_LINES = 50_000
PAGE = 100  # lines read at once
OVER = (JobStatus.CANCELLED, JobStatus.LATE, JobStatus.FINISHED)
OUTPUT, ERRORS = 1, 2  # what is added to a batch's id: the low bits of one are free


class Status(StrEnum):
    """Where a batch is, in OpenAI's words."""

    FAILED = "failed"  # its file was not taken
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Line:
    """A request of the file: what it asks for, or why it cannot be."""

    line: int
    custom_id: str
    asked: Asked | None
    format: str = "url"
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class BatchView:
    """A batch, and what came of its lines so far."""

    batch: Batch
    status: Status
    completed: int
    failed: int
    ended_at: datetime | None

    @property
    def over(self) -> bool:
        return self.status not in (Status.IN_PROGRESS, Status.CANCELLING)


@dataclass(frozen=True, slots=True)
class Made:
    """What came of a line: its frames with their images, in order; or the error it had from the start."""

    line: BatchLine
    frames: list[tuple[Frame, Image | None]]

    @property
    def images(self) -> list[tuple[Frame, Image]]:
        return [(frame, image) for frame, image in self.frames if image is not None]


# ------------------------------------------------------------------------------------------------ to begin


def start(
    db: Session,
    caller: Caller,
    file: File,
    lines: Sequence[Line],
    *,
    endpoint: str,
    window: str,
    hours: int,
    labels: dict[str, Any] | None,
) -> tuple[UUID, list[str]]:
    """Submit the lines of a file as jobs of the class bulk, all in this transaction. Wake its models after the commit.

    Returns the batch's id and these models. Raises what submissions.submit raises.
    """
    now = db.scalars(select(func.clock_timestamp())).one()
    made = Batch(
        id=ids.new_id(ids.clock_ms(db)), account_id=caller.account_id, input_file_id=file.id, endpoint=endpoint,
        completion_window=window, labels=labels, lines=len(lines), expires_at=now + timedelta(hours=hours),
    )  # fmt: skip
    db.add(made)
    db.flush()
    models: set[str] = set()
    good = [line for line in lines if line.asked is not None]
    rows = [_row(made, line) for line in lines if line.asked is None]
    for part in _parts(good):
        job = Submission(
            specs=[line.asked for line in part if line.asked is not None],
            priority=PRIORITIES[Priority.BULK],
            name=f"{public(made.id)}: lines {part[0].line} to {part[-1].line}",
            deadline=made.expires_at,
            on_late=control.OnLate.FAIL,
        )
        job_id, _ = submissions.submit(db, caller, job)
        models.update(jobs.models_of(db, job_id))
        first = 0
        for line in part:
            assert line.asked is not None
            rows.append(_row(made, line, job_id=job_id, first=first, frames=line.asked.count))
            first += line.asked.count
    db.add_all(rows)
    db.flush()
    return made.id, sorted(models)


def _row(batch: Batch, line: Line, **place: Any) -> BatchLine:
    return BatchLine(
        batch_id=batch.id,
        line=line.line,
        account_id=batch.account_id,
        custom_id=line.custom_id,
        format=line.format if place else None,
        error=None if line.error is None else dict(line.error),
        **place,
    )


def _parts(lines: Sequence[Line]) -> Iterator[list[Line]]:
    """The lines in so many a job may have of specs and frames."""
    part: list[Line] = []
    frames = 0
    for line in lines:
        assert line.asked is not None
        if part and (len(part) == MAX_SPECS or frames + line.asked.count > settings().max_count):
            yield part
            part, frames = [], 0
        part.append(line)
        frames += line.asked.count
    if part:
        yield part


def refuse(
    db: Session,
    caller: Caller,
    file: File,
    faults: list[dict[str, Any]],
    *,
    endpoint: str,
    window: str,
    labels: dict[str, Any] | None,
) -> UUID:
    """Write down that a file is no batch, and why."""
    now = db.scalars(select(func.clock_timestamp())).one()
    made = Batch(
        id=ids.new_id(ids.clock_ms(db)), account_id=caller.account_id, input_file_id=file.id, endpoint=endpoint,
        completion_window=window, labels=labels, lines=0, expires_at=now, faults=faults,
    )  # fmt: skip
    db.add(made)
    db.flush()
    return made.id


# ------------------------------------------------------------------------------------------------ to look at


def public(batch_id: UUID) -> str:
    return ids.public("batch", batch_id)


def file_of(batch_id: UUID, which: int) -> UUID:
    """The id of a batch's OUTPUT or ERRORS file."""
    return UUID(int=batch_id.int + which)


def of_file(file_id: UUID) -> tuple[UUID, int] | None:
    """The batch whose OUTPUT or ERRORS file this would be; None if it can be none's."""
    which = file_id.int & 0xFFFFFF
    return (UUID(int=file_id.int - which), which) if which in (OUTPUT, ERRORS) else None


def find(db: Session, account_id: UUID, batch_id: UUID) -> BatchView:
    """One of the account's batches.

    Raises NotFound for another account's as for one that does not exist.
    """
    row = db.scalar(select(Batch).where(Batch.id == batch_id, Batch.account_id == account_id))
    if row is None:
        raise NotFound(batch=public(batch_id))
    return _view(db, row)


def every(db: Session, account_id: UUID, *, after: UUID | None = None, limit: int = 20) -> list[BatchView]:
    """An account's batches, newest first; those older than `after`."""
    query = select(Batch).where(Batch.account_id == account_id)
    if after is not None:
        query = query.where(Batch.id < after)
    return [_view(db, row) for row in db.scalars(query.order_by(Batch.id.desc()).limit(limit))]


def _view(db: Session, row: Batch) -> BatchView:
    if row.faults is not None:
        return BatchView(row, Status.FAILED, 0, 0, row.created_at)
    lines = db.execute(
        select(BatchLine.job_id, BatchLine.first, BatchLine.frames).where(BatchLine.batch_id == row.id)
    ).all()
    wanted = sorted({line.job_id for line in lines if line.job_id is not None})
    owned = {j.id: j for j in db.scalars(select(Job).where(Job.id.in_(wanted)))}
    done = _done(db, row.account_id, wanted)
    open_jobs = {j.id for j in owned.values() if j.ended_at is None and j.status != JobStatus.CANCELLED}
    completed = failed = 0
    for line in lines:
        if line.job_id is None:
            failed += 1
            continue
        images = sum((line.job_id, k) in done for k in range(line.first, line.first + line.frames))
        completed += images == line.frames or (images > 0 and line.job_id not in open_jobs)
        failed += images == 0 and line.job_id not in open_jobs
    ends = [j.ended_at for j in owned.values() if j.ended_at is not None]
    ended_at = max(ends, default=row.cancelled_at or row.created_at) if not open_jobs else None
    is_late = any(j.late_at is not None for j in owned.values())
    if open_jobs:
        status = Status.IN_PROGRESS if row.cancelled_at is None else Status.CANCELLING
    elif row.cancelled_at is not None:
        status = Status.CANCELLED
    else:
        status = Status.EXPIRED if is_late and failed else Status.COMPLETED
    return BatchView(row, status, completed, failed, ended_at)


def _done(db: Session, account_id: UUID, wanted: Sequence[UUID]) -> set[tuple[UUID, int]]:
    """The frames of these jobs that are done, by job and index."""
    found: set[tuple[UUID, int]] = set()
    for job_id in wanted:
        view = jobs.find(db, account_id, job_id)
        if view.done in (0, view.frames):  # its counts say it all
            found.update((job_id, index) for index in range(view.done))
            continue
        place = Frame.id.between(ids.frame_id(job_id, 0), ids.last_frame_id(job_id))
        query = select(Frame.index).where(Frame.job_id == job_id, place, Frame.status == FrameStatus.DONE)
        found.update((job_id, index) for index in db.scalars(query))
    return found


def made(account_id: UUID, batch_id: UUID) -> Iterator[Made]:
    """What came of each line, in order, read a page at a time in transactions of their own."""
    after = 0
    while True:
        with transaction() as db:
            page = db.scalars(
                select(BatchLine)
                .where(
                    BatchLine.batch_id == batch_id, BatchLine.account_id == account_id, BatchLine.line > after
                )
                .order_by(BatchLine.line)
                .limit(PAGE)
            ).all()
            found = _made(db, page)
        yield from found
        if len(page) < PAGE:
            return
        after = page[-1].line


def _made(db: Session, page: Sequence[BatchLine]) -> list[Made]:
    frames: dict[tuple[UUID, int], tuple[Frame, Image | None]] = {}
    placed = sorted(
        (line for line in page if line.job_id is not None), key=lambda line: line.job_id or UUID(int=0)
    )
    for job_id, some in groupby(placed, key=lambda line: line.job_id):
        assert job_id is not None
        part = list(some)
        first = min(line.first or 0 for line in part)
        last = max((line.first or 0) + (line.frames or 0) for line in part)
        rows = jobs.frames_of(db, job_id, first=first, limit=last - first)
        images = _images(db, rows)
        frames |= {(job_id, f.index): (f, images.get(f.image_id or 0)) for f in rows}
    return [
        Made(
            line,
            [frames[line.job_id, k] for k in range(line.first or 0, (line.first or 0) + (line.frames or 0))],
        )
        if line.job_id is not None
        else Made(line, [])
        for line in page
    ]


def _images(db: Session, rows: Sequence[Frame]) -> dict[int, Image]:
    wanted = [f.image_id for f in rows if f.image_id is not None]
    kept = (
        select(Image)
        .join(Frame, Frame.image_id == Image.id)
        .join(Job, Job.id == Frame.job_id)
        .where(
            Frame.id.in_([f.id for f in rows]), Image.deleted_at.is_(None), Job.images_deleted_at.is_(None)
        )
    )
    return {image.id: image for image in db.scalars(kept)} if wanted else {}


# ------------------------------------------------------------------------------------------------ to end


def cancel(db: Session, account_id: UUID, batch_id: UUID) -> None:
    """Stop what is not done by now; it is neither delivered nor billed.

    Raises NotFound as find() does, Conflict if the batch has ended.
    """
    view = find(db, account_id, batch_id)
    if view.batch.cancelled_at is not None:
        return
    if view.over:
        raise Conflict(f"this batch is {view.status}", batch=public(batch_id))
    view.batch.cancelled_at = db.scalars(select(func.clock_timestamp())).one()
    wanted = select(BatchLine.job_id).where(BatchLine.batch_id == batch_id, BatchLine.job_id.is_not(None))
    for job_id in sorted({j for j in db.scalars(wanted) if j is not None}):
        row = db.get_one(Job, job_id)
        if row.ended_at is None and row.status not in OVER:
            jobs.cancel(db, account_id, job_id)
    db.flush()
