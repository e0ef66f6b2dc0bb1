"""Jobs: submit, find, list, and the verbs that work on a whole job at once."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, NamedTuple, Self
from uuid import UUID

import psycopg
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy import func, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from farm import budgets, events, ids, pricing, queue, quotes, reuse
from farm.accounts import Caller
from farm.catalog import Catalog, Model, catalog
from farm.db import sql
from farm.errors import Conflict, Fault, Gone, Invalid, NotFound
from farm.queue import FrameStatus
from farm.settings import settings
from farm.spec import (
    PRIORITIES,
    Asked,
    Priority,
    PriorityNumber,
    Spec,
    call_key,
    fingerprint,
    quantity,
    random_seed,
    resolve,
    seeds,
    shape_key,
    work,
)
from farm.tables import Count, Frame, IdempotencyKey, Image, Job, JobLane, Quote

MAX_SPECS = 1000
FORESEEN = 1000  # a larger job is held against the budget before its frames are stored too


class JobStatus(StrEnum):
    """What is stored; what is shown says queued or running for active."""

    STAGED = "staged"
    ACTIVE = "active"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    FINISHED = "finished"


class Submission(BaseModel):
    """A job as it is sent: one spec or many."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    spec: Asked | None = Field(None, description="what to render; this or specs")
    specs: Annotated[list[Asked], Field(min_length=1, max_length=MAX_SPECS)] | None = None
    priority: PriorityNumber = Field(
        PRIORITIES[Priority.STANDARD],
        description="0 to 9, 9 most urgent; or urgent (9), standard (5), bulk (1)",
        examples=["standard"],
    )
    name: Annotated[str, Field(strict=True, min_length=1, max_length=200, pattern=r"^[^\x00]*$")] | None = (
        None
    )
    quote: Annotated[str, Field(strict=True, max_length=64)] | None = Field(
        None, description="the id of a quote for just these specs: the job costs that at most"
    )
    budget: pricing.Amount | None = Field(
        None, description="the most the job may cost, as text; one that may cost more is refused"
    )
    reuse: Annotated[bool, Field(strict=True)] = Field(
        True,
        description="answer frames whose seed is given with an image of the same spec and seed that is there, or is"
        " being made, at the price of reusing one; false: render them anew",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.spec is None) == (self.specs is None):
            raise ValueError("send either spec or specs")
        return self

    def asked(self) -> list[tuple[str, Asked]]:
        """Each spec with its path in the body."""
        if self.spec is not None:
            return [("spec", self.spec)]
        return [(f"specs[{k}]", a) for k, a in enumerate(self.specs or [])]


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it is shown: its row, and how many of its frames are where."""

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
    currency: str
    quoted: Decimal
    held: Decimal
    charged: Decimal
    created_at: datetime
    ended_at: datetime | None


class _Drafted(NamedTuple):
    """A frame to be: its spec, that as JSON, its seed and whether that was asked for, and its key's number."""

    spec: Spec
    as_json: str
    seed: int
    seeded: bool
    key_no: int
    model: Model

    def fingerprint(self) -> bytes:
        return fingerprint(self.spec, self.model, self.seed)


@dataclass(slots=True)
class _Draft:
    """What a submission becomes: frames, and the distinct keys they carry by number."""

    frames: list[_Drafted] = field(default_factory=list)
    keys: dict[str, tuple[int, Spec, Model]] = field(default_factory=dict)

    def add(self, spec: Spec, model: Model, first_seed: int | None, count: int) -> None:
        key_no = self.keys.setdefault(call_key(spec, model), (len(self.keys), spec, model))[0]
        as_json = json.dumps(spec.to_json())
        first = random_seed() if first_seed is None else first_seed
        self.frames.extend(
            _Drafted(spec, as_json, seed, first_seed is not None, key_no, model)
            for seed in seeds(first, count)
        )

    def quote(self, rates: Mapping[str, pricing.Rate]) -> Decimal:
        """What all of it costs at most."""
        per_key = Counter(f.key_no for f in self.frames)
        return pricing.total(
            rates[model.name].amount(per_key[no] * quantity(spec, rates[model.name].method))
            for no, spec, model in self.keys.values()
        )

    def parts(self, rates: Mapping[str, pricing.Rate]) -> list[quotes.Part]:
        """What is asked of each model."""
        asked: dict[str, list[int]] = {}
        for spec, _, _, _, _, model in self.frames:
            sums = asked.setdefault(model.name, [0, 0, 0])
            for k, more in enumerate((1, quantity(spec, rates[model.name].method), work(spec, model))):
                sums[k] += more
        return [quotes.Part(rates[name], *sums) for name, sums in asked.items()]

    def digest(self) -> bytes:
        return quotes.digest(f.as_json for f in self.frames)

    def key_columns(self) -> dict[str, list[Any]]:
        """The distinct keys in the order of their numbers, one list a column."""
        return {
            "models": [model.name for _, _, model in self.keys.values()],
            "shape_keys": [shape_key(spec, model) for _, spec, model in self.keys.values()],
            "call_keys": list(self.keys),
            "pixels": [spec.width * spec.height for _, spec, _ in self.keys.values()],
        }


def submit(
    db: Session,
    caller: Caller,
    submission: Submission,
    *,
    idempotency_key: str | None = None,
    body_sha256: bytes = b"",
    models: Catalog | None = None,
    rerender_of: UUID | None = None,
) -> tuple[UUID, bool]:
    """Accept a job: hold, keys, frames and event in this one transaction. Wake its models after the commit.

    Returns its id, and False if it had been accepted before under this idempotency key.
    Raises Invalid naming each field that is not allowed, Conflict if the same key is being used just now,
    BudgetExceeded if a budget does not cover it; NotFound, Gone or Invalid for its quote as quotes.take() does.
    """
    if idempotency_key is not None and (earlier := _earlier(db, caller, idempotency_key, body_sha256)):
        return earlier, False
    draft = _draft(submission, models or catalog())
    if (
        len(draft.frames) > FORESEEN
    ):  # a million frames take seconds between two statements; nothing is locked yet
        db.execute(text("SET LOCAL idle_in_transaction_session_timeout = '5min'"))
    quote, rates = _rates(db, caller, submission, draft)
    matched = _match(db, caller, submission, draft, rates)
    costs = pricing.total([draft.quote(rates), *matched.savings])
    budgets.cap(costs, submission.budget, caller.currency)
    if len(draft.frames) > FORESEEN:
        budgets.foresee(db, caller, costs)
    job_id = ids.new_id(ids.clock_ms(db))
    db.execute(
        sql("submit"),
        {
            "job_id": job_id,
            "account_id": caller.account_id,
            "api_key_id": caller.key_id,
            "name": submission.name,
            "priority": submission.priority,
            "frames": len(draft.frames),
            "currency": caller.currency,
            "quoted": costs,
            "idempotency_key": idempotency_key,
            "body_sha256": body_sha256,
            "rerender_of": rerender_of,
            **draft.key_columns(),
            "open": [no in matched.open_keys for no in range(len(draft.keys))],
            "reuse_price_ids": [rate and rate.price_id for rate in matched.rates],
        },
    )
    _copy_frames(db, caller, job_id, draft, rates=rates, matched=matched)
    _answer_known(db, caller, job_id, matched)
    if quote is not None:
        quote.job_id = job_id
    budgets.admit(db, caller, costs)
    if matched.open_keys:
        db.execute(sql("open_lanes"), {"jobs": [job_id]})
    return job_id, True


def quote(
    db: Session, caller: Caller, submission: Submission, *, models: Catalog | None = None
) -> quotes.Quoted:
    """Say what a job costs at most and when it may be done, and keep these prices for it for a while.

    Raises Invalid naming each field that is not allowed, BudgetExceeded if the job's own budget does not cover it.
    """
    if submission.quote is not None:
        raise Invalid([Fault("quote", submission.quote, "a quote is asked for without one")])
    models = models or catalog()
    draft = _draft(submission, models)
    _, rates = _rates(db, caller, submission, draft)
    costs = draft.quote(rates)
    budgets.cap(costs, submission.budget, caller.currency)
    return quotes.make(
        db,
        caller,
        specs_sha256=draft.digest(),
        amount=costs,
        parts=draft.parts(rates),
        priority=submission.priority,
        models=models,
    )


def _rates(
    db: Session, caller: Caller, submission: Submission, draft: _Draft
) -> tuple[Quote | None, Mapping[str, pricing.Rate]]:
    """The prices of rendering each model: those of the job's quote, or those in force."""
    if submission.quote is not None:
        return quotes.take(db, caller, ids.parse("quo", submission.quote), draft.digest())
    methods = {model.name: model.price.method for _, _, model in draft.keys.values()}
    return None, pricing.current(db, account_id=caller.account_id, currency=caller.currency, models=methods)


def _earlier(db: Session, caller: Caller, key: str, body_sha256: bytes) -> UUID | None:
    try:
        db.execute(text("SET LOCAL lock_timeout = '5s'"))
        db.execute(
            text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 0))"),
            {"key": f"{caller.account_id}/{key}"},
        )
        db.execute(text("SET LOCAL lock_timeout = 0"))
    except OperationalError as e:
        if isinstance(e.orig, psycopg.errors.LockNotAvailable):
            raise Conflict("a request with this Idempotency-Key is being worked on", key=key) from e
        raise
    row = db.get(IdempotencyKey, (caller.account_id, key))
    if row is None:
        return None
    if row.body_sha256 != body_sha256:
        raise Invalid([Fault("Idempotency-Key", key, "it came before with another body; use another key")])
    return row.job_id


def _draft(submission: Submission, models: Catalog) -> _Draft:
    """Raises Invalid with the faults of every spec."""
    draft, faults, total = _Draft(), [], 0
    for path, asked in submission.asked():
        spec = resolve(asked, models, path=path)
        total += asked.count
        if isinstance(spec, list):
            faults.extend(spec)
        elif total <= settings().max_count:
            draft.add(spec, models[spec.model], asked.seed, asked.count)
        else:
            faults.append(
                Fault(f"{path}.count", asked.count, f"allowed are {settings().max_count} images in all")
            )
            break
    if faults:
        raise Invalid(faults)
    return draft


# ------------------------------------------------------------------------------------------------ reuse

AT_ONCE = 2000  # frames a submission answers itself; the sweep does more than that


@dataclass(slots=True)
class _Matched:
    """What a draft's frames have equals for.

    rates: of reusing an image, by key; None: frames of that key are rendered in any case. prints: every frame's
    fingerprint. waiting: frames that wait, by index; True if the image is known already. at_once: those with a known
    image are answered in this transaction. savings: what the job costs less for that.
    """

    rates: list[pricing.Rate | None]
    prints: list[bytes]
    waiting: dict[int, bool]
    open_keys: set[int]
    at_once: bool
    savings: list[Decimal]


def _match(
    db: Session, caller: Caller, submission: Submission, draft: _Draft, rates: Mapping[str, pricing.Rate]
) -> _Matched:
    """Find the frames that need not be rendered: their image is known, or an equal frame comes before them."""
    prints = [f.fingerprint() for f in draft.frames]
    reused = _reuse_rates(db, caller, submission, draft, rates)
    keys = {
        no: (prints[no], f.spec.format.value)
        for no, f in enumerate(draft.frames)
        if f.seeded and reused[f.key_no] is not None
    }
    waiting: dict[int, bool] = {}
    if keys:
        found = reuse.equals(db, caller.account_id, priority=submission.priority, keys=set(keys.values()))
        for no, key in keys.items():
            if key in found:
                waiting[no] = found[key]
            else:
                found[key] = False  # those that come after it in this job wait for it
    open_keys = {f.key_no for no, f in enumerate(draft.frames) if no not in waiting}
    known = Counter(draft.frames[no].key_no for no, is_known in waiting.items() if is_known)
    at_once = 0 < known.total() <= AT_ONCE
    savings: list[Decimal] = []
    for no, spec, model in draft.keys.values():
        rate, again = rates[model.name], reused[no]
        if at_once and known[no] and again is not None:
            savings += [rate.amount(-known[no] * quantity(spec, rate.method)), again.amount(known[no])]
    return _Matched(reused, prints, waiting, open_keys, at_once, savings)


def _reuse_rates(
    db: Session, caller: Caller, submission: Submission, draft: _Draft, rates: Mapping[str, pricing.Rate]
) -> list[pricing.Rate | None]:
    """The price of reusing an image for each key; None where no frame may, or where rendering costs less."""
    seeded = {f.key_no for f in draft.frames if f.seeded} if submission.reuse else set()
    if not seeded:
        return [None] * len(draft.keys)
    names = {model.name for no, _, model in draft.keys.values() if no in seeded}
    free = reuse.rates(db, caller.account_id, currency=caller.currency, models=names)
    return [
        free[model.name]
        if no in seeded
        and free[model.name].rate <= rates[model.name].amount(quantity(spec, rates[model.name].method))
        else None
        for no, spec, model in draft.keys.values()
    ]


def _answer_known(db: Session, caller: Caller, job_id: UUID, matched: _Matched) -> None:
    """Answer at once what is known; what waits is looked at again when this is committed.

    Raises Conflict if an image was deleted in between: the job was quoted with it.
    """
    known = {ids.frame_id(job_id, no): job_id for no, is_known in matched.waiting.items() if is_known}
    if matched.at_once and queue.answer(db, known, at_once=True) < len(known):
        raise Conflict("an image that this job would reuse was deleted just now; send it again")
    left = [
        matched.prints[no] for no, is_known in matched.waiting.items() if not (is_known and matched.at_once)
    ]
    if left:
        reuse.look_later(db, caller.account_id, left)
    elif len(known) == len(matched.prints):
        db.execute(sql("finish"), {"jobs": [job_id]})


# ------------------------------------------------------------------------------------------------ to submit

COPY = (
    "COPY frames (id, job_id, index, key_no, account_id, status, seed, work, quantity, price_id, fingerprint, spec,"
    " seeded) FROM STDIN"
)


def _copy_frames(
    db: Session,
    caller: Caller,
    job_id: UUID,
    draft: _Draft,
    *,
    rates: Mapping[str, pricing.Rate],
    matched: _Matched,
) -> None:
    raw = db.connection().connection.driver_connection
    assert isinstance(raw, psycopg.Connection)
    with raw.cursor() as cursor, cursor.copy(COPY) as copy:
        for index, (spec, as_json, seed, seeded, key_no, model) in enumerate(draft.frames):
            rate = rates[model.name]
            status = FrameStatus.WAITING if index in matched.waiting else FrameStatus.QUEUED
            copy.write_row(
                (
                    ids.frame_id(job_id, index),
                    job_id,
                    index,
                    key_no,
                    caller.account_id,
                    status.value,
                    seed,
                    work(spec, model),
                    quantity(spec, rate.method),
                    rate.price_id,
                    matched.prints[index],
                    as_json,
                    seeded,
                )
            )


# ------------------------------------------------------------------------------------------------ to look at


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
    done, failed, cancelled = (int(getattr(ended, n, 0) or 0) for n in ("done", "failed", "cancelled"))
    status: str = job.status
    if job.status == JobStatus.CANCELLED:  # the verb touched the job alone: its frames follow
        running, cancelled = 0, job.frames - done - failed
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
