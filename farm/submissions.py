"""Submissions: what a job is asked for with, what it costs, and accepting it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Self
from uuid import UUID

import psycopg
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from farm import budgets, drafts, ids, inputs, pricing, quotes, reuse
from farm.accounts import Caller
from farm.catalog import Catalog, catalog
from farm.db import together
from farm.drafts import Draft
from farm.errors import Conflict, Fault, Invalid
from farm.features import refs_of
from farm.queue import FrameStatus
from farm.spec import PRIORITIES, Asked, Priority, PriorityNumber, quantity, work
from farm.tables import Count, IdempotencyKey, Quote

MAX_SPECS = 1000
AT_ONCE = 100  # frames sent along with the job; more go by COPY
FORESEEN = 1000  # a larger job is held against the budget before its frames are stored too


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
    BudgetExceeded if a budget does not cover it; NotFound, Gone or Invalid for its quote as quotes.take() does;
    NotFound or Gone for its inputs. They are the account's: URLs were taken in before (farm/api/inputs.py).
    """
    if idempotency_key is not None and (earlier := _earlier(db, caller, idempotency_key, body_sha256)):
        return earlier, False
    draft = drafts.draft(
        submission.asked(), models or catalog(), inputs.known(db, caller.account_id, _refs(submission))
    )
    if (
        len(draft.frames) > FORESEEN
    ):  # a million frames take seconds between two statements; nothing is locked yet
        db.execute(text("SET LOCAL idle_in_transaction_session_timeout = '5min'"))
    quote, rates = _rates(db, caller, submission, draft)
    matched = reuse.match(
        db, caller, draft, priority=submission.priority, wanted=submission.reuse, prices=rates
    )
    costs = pricing.total([draft.quote(rates), *matched.savings])
    budgets.cap(costs, submission.budget, caller.currency)
    if len(draft.frames) > FORESEEN:
        budgets.foresee(db, caller, costs)
    job_id = ids.new_id(ids.clock_ms(db))
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
            **draft.key_columns(),
            "open": [no in matched.open_keys for no in range(len(draft.keys))],
            "reuse_price_ids": [rate and rate.price_id for rate in matched.rates],
        },
    )
    rows = _rows(job_id, draft, rates=rates, matched=matched)
    if len(draft.frames) <= AT_ONCE:
        columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
        together(
            db, [admitted, ("insert_frames", columns | {"job_id": job_id, "account_id": caller.account_id})]
        )
    else:
        together(db, [admitted])
        _copy_frames(db, job_id, caller.account_id, rows)
    inputs.bind(db, caller.account_id, job_id, draft.inputs())
    if matched.waiting:
        db.add(Count(job_id=job_id, waiting=len(matched.waiting)))
        db.flush()
    reuse.answer_known(db, caller, job_id, matched)
    if quote is not None:
        quote.job_id = job_id
        db.flush()
    lanes = [("open_lanes", {"jobs": [job_id]})] if matched.open_keys else []
    budgets.admit(db, caller, costs, then=lanes)
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
    db: Session, caller: Caller, submission: Submission, draft: Draft
) -> tuple[Quote | None, Mapping[str, pricing.Rate]]:
    """The prices of rendering each model: those of the job's quote, or those in force."""
    if submission.quote is not None:
        return quotes.take(db, caller, ids.parse("quo", submission.quote), draft.digest())
    methods = {model.name: model.price.method for _, _, model in draft.keys.values()}
    return None, pricing.current(db, account_id=caller.account_id, currency=caller.currency, models=methods)


def _refs(submission: Submission) -> set[str]:
    return {ref for _, asked in submission.asked() for _, ref in refs_of(asked)}


def came_before(db: Session, caller: Caller, key: str) -> bool:
    """Whether a job was accepted under this idempotency key."""
    return db.get(IdempotencyKey, (caller.account_id, key)) is not None


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
) -> Iterator[tuple[Any, ...]]:
    """The frames as rows of COLUMNS."""
    for index, (spec, as_json, seed, seeded, key_no, model) in enumerate(draft.frames):
        rate = rates[model.name]
        yield (
            ids.frame_id(job_id, index),
            index,
            key_no,
            (FrameStatus.WAITING if index in matched.waiting else FrameStatus.QUEUED).value,
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
