"""Rows as the API shows them. Each takes as many queries for a page as for one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from uuid import UUID

from fastapi import Request
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from farm import answers, ids, jobs, pace, pricing
from farm.api import links
from farm.api.progress import Progress
from farm.jobs import JobStatus, JobView
from farm.pace import Pace
from farm.queue import FrameStatus
from farm.spec import CONTENT_TYPE, Format
from farm.tables import Frame, FrameName, Image, Job, Usage


@dataclass(frozen=True, slots=True)
class Around:
    """What an answer needs beside the rows: where clients reach the farm, and the steps being made."""

    url: str
    progress: Progress

    @classmethod
    def of(cls, request: Request) -> "Around":
        return cls(links.base(request), request.app.state.progress)


# ------------------------------------------------------------------------------------------------ jobs


def job(db: Session, view: JobView, around: Around) -> answers.Job:
    return job_list(db, [view], around)[0]


def fresh_job(view: JobView, around: Around) -> answers.Job:
    """One that was accepted just now: nothing of it was rendered, and the database is not asked."""
    return _job(view, 0.0, around, None)


def job_list(db: Session, views: Sequence[JobView], around: Around) -> list[answers.Job]:
    parts = _parts_done(db, [v.id for v in views if v.running], around.progress)
    paces = pace.of(db, [v.id for v in views if v.status == "running" and v.done])
    return [_job(v, parts.get(v.id, 0.0), around, paces.get(v.id)) for v in views]


def _parts_done(db: Session, running: Sequence[UUID], progress: Progress) -> Mapping[UUID, float]:
    """How many frames' worth of steps were made of those on a device, by job."""
    parts: dict[UUID, float] = {}
    if running and progress.state == "up":
        rows = db.execute(
            select(Frame.job_id, Frame.index, Frame.pack_id).where(
                Frame.pack_id.is_not(None), Frame.job_id.in_(running)
            )
        )
        for job_id, index, pack in rows.tuples():
            parts[job_id] = parts.get(job_id, 0.0) + progress.of(job_id, index, pack)
    return parts


def _job(view: JobView, part: float, around: Around, of_late: Pace | None) -> answers.Job:
    name = ids.public("job", view.id)
    url = f"{around.url}/v1/jobs/{name}"
    ended = view.done + view.failed + view.cancelled
    eta = of_late and _eta(of_late.at, (view.frames - ended - part) / of_late.per_s)
    return answers.Job(
        id=name,
        name=view.name,
        status=view.status,
        priority=view.priority,
        frames=view.frames,
        counts=answers.Counts(
            queued=view.queued,
            running=view.running,
            done=view.done,
            failed=view.failed,
            cancelled=view.cancelled,
            waiting=view.waiting,
            staged=view.staged,
            reused=view.reused,
        ),
        progress=round(min(1.0, (ended + part) / view.frames), 6),
        currency=view.currency,
        quoted=pricing.shown(view.quoted),
        held=pricing.shown(view.held),
        charged=pricing.shown(view.charged),
        created_at=view.created_at,
        ended_at=view.ended_at,
        proof=view.proof,
        approved_at=view.approved_at,
        start_after=view.start_after,
        deadline=view.deadline,
        on_late=view.on_late,
        late_at=view.late_at,
        max_parallel=view.max_parallel,
        after=[ids.public("job", first) for first, ok in view.after if not ok],
        after_ok=[ids.public("job", first) for first, ok in view.after if ok],
        rate=of_late and float(f"{of_late.per_s:.3g}"),
        eta=eta,
        on_time=eta < view.deadline if eta and view.deadline else None,
        urls=answers.JobUrls(
            self=url,
            frames=f"{url}/frames",
            sheet=f"{url}/sheet",
            cancel=f"{url}/cancel",
            manifest=f"{url}/manifest",
            archive=f"{url}/archive",
        ),
    )


def _eta(now: datetime, seconds: float) -> datetime | None:
    try:
        return (now + timedelta(seconds=max(0.0, seconds))).replace(microsecond=0)
    except OverflowError:
        return None


# ------------------------------------------------------------------------------------------------ frames


def frame(db: Session, row: Frame, around: Around) -> answers.Frame:
    return frame_list(db, [row], around)[0]


def frame_list(db: Session, rows: Sequence[Frame], around: Around) -> list[answers.Frame]:
    images, costs, cancelled = images_of(db, rows), _costs_of(db, rows), cancelled_among(db, rows)
    proofs = jobs.withheld(db, {r.job_id for r in rows if r.status in jobs.BEHIND})
    names = names_of(db, rows)
    return [
        _frame(
            r,
            images.get(r.id),
            costs.get(r.id),
            around,
            custom_id=names.get(r.id),
            status=jobs.shown_status(r, r.job_id in cancelled, proofs.get(r.job_id)),
        )
        for r in rows
    ]


def names_of(db: Session, rows: Iterable[Frame]) -> Mapping[UUID, str]:
    """What the account calls these frames, by their id."""
    wanted: dict[UUID, list[int]] = {}
    for row in rows:
        wanted.setdefault(row.job_id, []).append(row.index)
    names: dict[UUID, str] = {}
    for job_id, places in wanted.items():
        found = select(FrameName.index, FrameName.custom_id).where(
            FrameName.job_id == job_id, FrameName.index.in_(places)
        )
        names |= {ids.frame_id(job_id, index): name for index, name in db.execute(found).tuples()}
    return names


def images_of(db: Session, rows: Iterable[Frame]) -> Mapping[UUID, Image]:
    """The images of these frames that are still there, by their frame's id."""
    wanted = {r.id: r.image_id for r in rows if r.image_id is not None}
    if not wanted:
        return {}
    found = (
        select(Frame.id, Image)
        .join(Image, Image.id == Frame.image_id)
        .join(Job, Job.id == Frame.job_id)
        .where(Frame.id.in_(wanted), Image.deleted_at.is_(None), Job.images_deleted_at.is_(None))
    )
    return dict(db.execute(found).tuples().all())


def cancelled_among(db: Session, rows: Iterable[Frame]) -> set[UUID]:
    """The cancelled jobs of these frames, as far as a frame of theirs is open."""
    wanted = {r.job_id for r in rows if r.ended_at is None}
    if not wanted:
        return set()
    return set(db.scalars(select(Job.id).where(Job.id.in_(wanted), Job.status == JobStatus.CANCELLED)))


def _costs_of(db: Session, rows: Iterable[Frame]) -> Mapping[UUID, Decimal]:
    wanted = [r.id for r in rows if r.status == FrameStatus.DONE]
    if not wanted:
        return {}
    found = select(Usage.frame_id, func.sum(Usage.amount)).where(Usage.frame_id.in_(wanted))
    return dict(db.execute(found.group_by(Usage.frame_id)).tuples().all())


def _frame(
    row: Frame,
    image: Image | None,
    cost: Decimal | None,
    around: Around,
    *,
    custom_id: str | None,
    status: str,
) -> answers.Frame:
    name = ids.public("job", row.job_id)
    done = row.status == FrameStatus.DONE
    return answers.Frame(
        id=ids.public("frm", row.id),
        job=name,
        index=row.index,
        custom_id=custom_id,
        status=status,
        progress=1.0 if done else round(around.progress.of(row.job_id, row.index, row.pack_id), 6),
        attempts=row.attempts,
        seed=row.seed,
        spec=row.spec,
        revised_prompt=row.spec["prompt"] if "original_prompt" in row.spec else None,
        cost=None if cost is None else pricing.shown(cost),
        reused=row.reused,
        image=image and _image(image, f"{around.url}/v1/jobs/{name}/frames/{row.index}/image"),
        reason=row.reason,
        ended_at=row.ended_at,
    )


def _image(image: Image, url: str) -> answers.ImageFile:
    return answers.ImageFile(
        url=url,
        sha256=image.sha256.hex(),
        bytes=image.bytes,
        width=image.width,
        height=image.height,
        content_type=content_type(image),
    )


def content_type(image: Image) -> str:
    return CONTENT_TYPE[Format(image.format)]
