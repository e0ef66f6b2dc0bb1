"""Submissions: what a job is asked for with, what it costs, and accepting it."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Self
from uuid import UUID

import psycopg
from pydantic import Field, model_validator
from sqlalchemy import text
from sqlalchemy.orm import Session

from farm import budgets, control, drafts, ids, inputs, lanes, limits, once, pricing, quotes, reuse, webhooks
from farm.accounts import Caller
from farm.catalog import Catalog, catalog
from farm.db import array, together
from farm.drafts import Draft
from farm.errors import Fault, Invalid
from farm.features import refs_of
from farm.queue import FrameStatus
from farm.spec import PRIORITIES, Asked, Priority, PriorityNumber, quantity, work
from farm.tables import Count, IdempotencyKey, Quote

MAX_SPECS = 1000
AT_ONCE = 100  # frames sent along with the job; more go by COPY
FORESEEN = 1000  # a larger job is held against the budget before its frames are stored too


class Submission(control.Timing):
    """A job as it is sent: one spec or many."""

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
    webhook: webhooks.Callback | None = Field(
        None, description="tell this URL how the job ends, or what else happens to it"
    )
    reuse: Annotated[bool, Field(strict=True)] = Field(
        True,
        description="answer frames whose seed is given with an image of the same spec and seed that is there, or is"
        " being made, at the price of reusing one; false: render them anew",
    )

    proof: Annotated[int, Field(strict=True, ge=1, le=ids.MAX_FRAMES)] | None = Field(
        None, description="render so many images, the first ones; the rest waits until the job is approved"
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
class Accepted:
    """A job that was accepted, now or before. models: to wake after the commit.

    row: what its row of jobs says, where nothing more is to be known of it; None: look it up.
    """

    id: UUID
    is_new: bool
    models: tuple[str, ...] = ()
    row: Mapping[str, Any] | None = None


def submit(db: Session, caller: Caller, submission: Submission, **how: Any) -> tuple[UUID, bool]:
    """Accept a job as accept() does. Returns its id, and False if it had been accepted before under this key."""
    accepted = accept(db, caller, submission, **how)
    return accepted.id, accepted.is_new


def accept(
    db: Session,
    caller: Caller,
    submission: Submission,
    *,
    idempotency_key: str | None = None,
    body_sha256: bytes = b"",
    models: Catalog | None = None,
    rerender_of: UUID | None = None,
    commit: bool = False,
) -> Accepted:
    """Accept a job: hold, keys, frames and event in this one transaction. Wake its models after the commit.

    commit: nothing but this job belongs to the transaction; it may end here, along with the last statements.

    One that was accepted before under this idempotency key is not accepted again.
    Raises Invalid naming each field that is not allowed, Conflict if the same key is being used just now,
    BudgetExceeded if a budget does not cover it; NotFound, Gone or Invalid for its quote as quotes.take() does;
    QueueFull if the account or the farm has as many open frames as it may; NotFound or Gone for its inputs. They are
    the account's: URLs were taken in before (farm/api/inputs.py).
    """
    models = models or catalog()
    before, opened, prices = _begin(
        db, caller, idempotency_key, {spec.model for _, spec in submission.asked()} & models.keys()
    )
    if before is not None:
        once.same(before.body_sha256, body_sha256, str(idempotency_key))
        return Accepted(before.job_id, False)
    draft = drafts.draft(
        submission.asked(),
        models,
        inputs.known(db, caller.account_id, _refs(submission)),
        proof=submission.proof,
    )
    limits.check_row(db, opened, len(draft.frames))
    timing = control.admit(db, caller.account_id, submission)
    if (
        len(draft.frames) > FORESEEN
    ):  # a million frames take seconds between two statements; nothing is locked yet
        db.execute(text("SET LOCAL idle_in_transaction_session_timeout = '5min'"))
    quote, rates = _rates(db, caller, submission, draft, prices)
    matched = reuse.match(
        db, caller, draft, priority=submission.priority, wanted=submission.reuse, prices=rates
    )
    costs = pricing.total([draft.quote(rates), *matched.savings])
    budgets.cap(costs, submission.budget, caller.currency)
    if len(draft.frames) > FORESEEN:
        budgets.foresee(db, caller, costs)
    job_id = ids.new_id(opened.ms)
    staged_from = _staged_from(matched, len(draft.frames), submission.max_parallel)
    open_keys = _open_keys(matched, draft, staged_from) - draft.rest()
    admitted = (
        "submit",
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
            **timing.columns,
            **{name: array(column) for name, column in draft.key_columns().items()},
            "open": array(no in open_keys for no in range(len(draft.keys))),
            "proof": draft.proof if draft.proof and draft.proof < len(draft.frames) else None,
            "reuse_price_ids": array(rate and rate.price_id for rate in matched.rates),
        },
    )
    rows = _rows(job_id, draft, rates=rates, matched=matched, staged_from=staged_from)
    then = lanes.opening([job_id]) if open_keys and not timing.columns["waits"] else []
    names = tuple(sorted({model.name for _, _, model in draft.keys.values()}))
    statements: list[tuple[str, Mapping[str, Any]]] = [admitted]
    if len(draft.frames) <= AT_ONCE:
        columns = dict(zip(COLUMNS, map(array, zip(*rows, strict=True)), strict=True))
        statements.append(("insert_frames", columns | {"job_id": job_id, "account_id": caller.account_id}))
        if _is_plain(submission, timing, draft, matched):  # one round trip for all of it
            if opened.has_budget:
                budgets.admit(db, caller, costs, first=statements, then=then)
            else:
                together(db, [*statements, *then], commit=commit)
            row = {n: v for n, v in admitted[1].items() if n in SHOWN}
            row |= {"id": job_id, "status": "active", "held": costs, "created_at": opened.began}
            return Accepted(job_id, True, names, row)
        together(db, statements)
    else:
        together(db, statements)
        _copy_frames(db, job_id, caller.account_id, rows)
    inputs.bind(db, caller.account_id, job_id, draft.inputs())
    if submission.webhook is not None:
        webhooks.bind(db, caller.account_id, job_id, submission.webhook)
    control.bind(db, caller.account_id, job_id, timing.after)
    if matched.waiting:
        db.add(Count(job_id=job_id, waiting=len(matched.waiting)))
        db.flush()
    reuse.answer_known(db, caller, job_id, matched)
    if quote is not None:
        quote.job_id = job_id
        db.flush()
    budgets.admit(db, caller, costs, then=then)
    return Accepted(job_id, True, names)


SHOWN = ("name", "priority", "frames", "currency", "quoted", "waits", "follows")


def _is_plain(submission: Submission, timing: control.Admitted, draft: Draft, matched: reuse.Matched) -> bool:
    """Whether nothing but its row, keys and frames is to be stored of a job, and all of it waits for workers."""
    more = (
        submission.webhook,
        submission.quote,
        submission.proof,
        submission.max_parallel,
        submission.deadline,
    )
    return not any(more) and not timing.columns["waits"] and not matched.waiting and not draft.inputs()


def _begin(
    db: Session, caller: Caller, key: str | None, models: Collection[str]
) -> tuple[Any, Any, Sequence[Any]]:
    """The job that was accepted under this idempotency key, if one was; what opening.sql says; prices of these models.

    In one round trip. Raises InProgress if the same key is being used just now.
    """
    ours = {"account_id": caller.account_id}
    facts = [("opening", ours), pricing.asking(caller.account_id, caller.currency, models)]
    if key is None:
        (opened,), prices = together(db, facts)
        return None, opened, prices
    before, (opened,), prices = once.turn(
        db, f"{caller.account_id}/{key}", key, then=[("submitted", {**ours, "key": key}), *facts]
    )
    return before[0] if before else None, opened, prices


def quote(
    db: Session, caller: Caller, submission: Submission, *, models: Catalog | None = None
) -> quotes.Quoted:
    """Say what a job costs at most and when it may be done, and keep these prices for it for a while.

    Raises Invalid naming each field that is not allowed, BudgetExceeded if the job's own budget does not cover it.
    """
    if submission.quote is not None:
        raise Invalid([Fault("quote", submission.quote, "a quote is asked for without one")])
    models = models or catalog()
    given = inputs.known(db, caller.account_id, _refs(submission))
    draft = drafts.draft(submission.asked(), models, given)
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
    db: Session, caller: Caller, submission: Submission, draft: Draft, prices: Sequence[Any] | None = None
) -> tuple[Quote | None, Mapping[str, pricing.Rate]]:
    """The prices of rendering each model: those of the job's quote, or those in force. prices: found before."""
    if submission.quote is not None:
        return quotes.take(db, caller, ids.parse("quo", submission.quote), draft.digest())
    methods = {model.name: model.price.method for _, _, model in draft.keys.values()}
    if prices is not None:
        return None, pricing.chosen(prices, caller.currency, methods)
    return None, pricing.current(db, account_id=caller.account_id, currency=caller.currency, models=methods)


def _refs(submission: Submission) -> set[str]:
    return {ref for _, asked in submission.asked() for _, ref in refs_of(asked)}


def came_before(db: Session, caller: Caller, key: str) -> bool:
    """Whether a job was accepted under this idempotency key."""
    return db.get(IdempotencyKey, (caller.account_id, key)) is not None


def _staged_from(matched: reuse.Matched, frames: int, max_parallel: int | None) -> int:
    """The first frame that is beyond max_parallel, of those that wait for none."""
    if max_parallel is None or max_parallel >= frames:
        return frames
    rendered = (index for index in range(frames) if index not in matched.waiting)
    return next(islice(rendered, max_parallel, None), frames)


def _status(index: int, matched: reuse.Matched, staged_from: int) -> FrameStatus:
    if index in matched.waiting:
        return FrameStatus.WAITING
    return FrameStatus.QUEUED if index < staged_from else FrameStatus.STAGED


def _open_keys(matched: reuse.Matched, draft: Draft, staged_from: int) -> set[int]:
    if staged_from == len(draft.frames):
        return matched.open_keys
    return {draft.frames[k].key_no for k in range(staged_from) if k not in matched.waiting}


COLUMNS = (
    "ids", "indices", "key_nos", "statuses", "seeds", "works", "quantities", "price_ids", "fingerprints", "specs",
    "seededs",
)  # fmt: skip
COPY = (
    "COPY frames (id, index, key_no, status, seed, work, quantity, price_id, fingerprint, spec, seeded, job_id,"
    " account_id) FROM STDIN"
)


def _rows(
    job_id: UUID,
    draft: Draft,
    *,
    rates: Mapping[str, pricing.Rate],
    matched: reuse.Matched,
    staged_from: int,
) -> Iterator[tuple[Any, ...]]:
    """The frames as rows of COLUMNS."""
    for index, (spec, as_json, seed, seeded, key_no, model) in enumerate(draft.frames):
        rate = rates[model.name]
        yield (
            ids.frame_id(job_id, index),
            index,
            key_no,
            _status(index, matched, staged_from).value,
            seed,
            work(spec, model),
            quantity(spec, rate.method),
            rate.price_id,
            matched.prints[index],
            as_json,
            seeded,
        )


def _copy_frames(db: Session, job_id: UUID, account_id: UUID, rows: Iterable[tuple[Any, ...]]) -> None:
    raw = db.connection().connection.driver_connection
    assert isinstance(raw, psycopg.Connection)
    with raw.cursor() as cursor, cursor.copy(COPY) as copy:
        for row in rows:
            copy.write_row((*row, job_id, account_id))
