"""Bulk uploads: a file of lines that becomes one job, sent at once or bit by bit.

    open ──▶ accepted    the job is there, all of it claimable in one step
      ├────▶ refused     all or nothing, and a line was bad; or none was good: nothing of it stays
      └────▶ discarded   by its owner, or because nobody went on with it

Frames are stored as lines come, under a job of status staged: not runnable, seen by nobody, and held against budget and
quota as far as it has come. A chunk is one transaction: its frames, names and errors, and the offset up to which the
file is in. Whatever is cut or killed leaves either an upload that goes on from its offset, or an accepted job. The
offset is also the fence: of two who send the same part the later is told where the upload is by now.

Accepting touches the job alone. What a refused or discarded upload has stored is removed by the sweep, bit by bit.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import ConfigDict, Field
from sqlalchemy import func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from farm import budgets, control, events, ids, lanes, pricing, webhooks
from farm.accounts import Caller
from farm.bulk.lines import Template
from farm.db import sql
from farm.errors import Conflict, Fault, Invalid, NotFound
from farm.settings import settings
from farm.spec import PRIORITIES, Asked, Priority, PriorityNumber, Text, quantity
from farm.tables import BulkChunk, BulkError, BulkUpload, IdempotencyKey, Job

REMOVED = 20_000  # frames at a time
PAGE = 1000  # errors at a time
MAX_PROOF = ids.MAX_FRAMES


class Mode(StrEnum):
    """What becomes of good lines where others are bad."""

    ALL_OR_NOTHING = "all_or_nothing"
    ACCEPT_GOOD = "accept_good"


class Form(StrEnum):
    NDJSON = "ndjson"
    CSV = "csv"
    MATRIX = "matrix"


class Status(StrEnum):
    OPEN = "open"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    DISCARDED = "discarded"


class Defaults(Asked):
    """Fields of a spec, for lines that leave them out."""

    prompt: Annotated[Text, Field(min_length=1)] | None = None  # type: ignore[assignment]


class Facts(control.Timing):
    """What an upload says of the job it becomes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(strict=True, min_length=1, max_length=200, pattern=r"^[^\x00]*$")] | None = (
        None
    )
    priority: PriorityNumber = Field(
        PRIORITIES[Priority.BULK],
        description="0 to 9, 9 most urgent; or urgent (9), standard (5), bulk (1)",
        examples=["bulk"],
    )
    mode: Mode = Field(
        Mode.ALL_OR_NOTHING,
        description="all_or_nothing: one bad line refuses the file; accept_good: the good lines become the job",
    )
    budget: pricing.Amount | None = Field(None, description="the most the job may cost, as text")
    reuse: Annotated[bool, Field(strict=True)] = Field(
        True, description="answer lines whose seed is given with an image of the same spec and seed"
    )
    proof: Annotated[int, Field(strict=True, ge=1, le=MAX_PROOF)] | None = Field(
        None, description="render so many frames, the first ones; the rest waits until the job is approved"
    )
    webhook: webhooks.Callback | None = Field(None, description="tell this URL how the job ends")
    spec: Defaults | None = Field(None, description="fields for lines that leave them out")
    format: Literal[Form.NDJSON, Form.CSV] | None = Field(None, description="of the file; ndjson if left out")
    matrix: dict[str, Any] | None = Field(
        None, description="a spec whose fields may be lists: every combination is an image. See docs/bulk.md"
    )

    def defaults(self) -> dict[str, Any]:
        return {} if self.spec is None else self.spec.model_dump(mode="json", exclude_unset=True)


# ------------------------------------------------------------------------------------------------ uploads


def create(
    db: Session, caller: Caller, facts: Facts, form: Form, *, key: str | None = None
) -> tuple[BulkUpload, bool]:
    """Start an upload. Returns it, and False if it is there already under this idempotency key.

    Raises Invalid if the key came with other facts or for a job, or a fact is not allowed; NotFound for a job to come
    after that is not the account's.
    """
    control.admit(db, caller.account_id, facts)
    stored = facts.model_dump(mode="json", exclude_unset=True)
    digest = hashlib.sha256(json.dumps([form, stored], sort_keys=True).encode()).digest()
    made = ids.new_id(ids.clock_ms(db))
    row = {
        "id": made,
        "account_id": caller.account_id,
        "currency": caller.currency,
        "api_key_id": caller.key_id,
        "idempotency_key": key,
        "asked_sha256": digest if key is not None else None,
        "mode": facts.mode.value,
        "format": form.value,
        "facts": stored,
    }
    # who sends the same at the same moment waits here for the first
    new = insert(BulkUpload).values(row).on_conflict_do_nothing(
        index_elements=["account_id", "idempotency_key"], index_where=text("idempotency_key IS NOT NULL")
    )  # fmt: skip
    if db.execute(new.returning(BulkUpload.id)).first() is not None:
        if key is not None and db.get(IdempotencyKey, (caller.account_id, key)) is not None:
            raise Invalid([Fault("Idempotency-Key", key, "it came before for another job; use another key")])
        return db.get_one(BulkUpload, made), True
    found = db.scalars(
        select(BulkUpload).where(
            BulkUpload.account_id == caller.account_id, BulkUpload.idempotency_key == key
        )
    ).one()
    if found.asked_sha256 != digest:
        raise Invalid([Fault("Idempotency-Key", key, "it came before with another request; use another key")])
    return found, False


def find(db: Session, account_id: UUID, upload_id: UUID, *, lock: bool = False) -> BulkUpload:
    """One of the account's uploads.

    Raises NotFound for another account's as for one that does not exist.
    """
    query = select(BulkUpload).where(BulkUpload.id == upload_id, BulkUpload.account_id == account_id)
    found = db.scalar(query.with_for_update() if lock else query)
    if found is None:
        raise NotFound(upload=ids.public("blk", upload_id))
    return found


def every(
    db: Session, account_id: UUID, *, before: UUID | None = None, limit: int = 50
) -> Sequence[BulkUpload]:
    """An account's uploads, newest first; those older than `before`."""
    query = select(BulkUpload).where(BulkUpload.account_id == account_id)
    if before is not None:
        query = query.where(BulkUpload.id < before)
    return db.scalars(query.order_by(BulkUpload.id.desc()).limit(limit)).all()


def errors_of(
    db: Session, upload_id: UUID, *, after: tuple[int, int] = (0, -1), limit: int = PAGE
) -> Sequence[BulkError]:
    """What is wrong with which line, in order. Find the upload first: this looks at no account."""
    rows = select(BulkError).where(
        BulkError.upload_id == upload_id, func.row(BulkError.line, BulkError.no) > func.row(*after)
    )
    return db.scalars(rows.order_by(BulkError.line, BulkError.no).limit(limit)).all()


def chunks_of(db: Session, upload_id: UUID) -> list[tuple[int, bytes]]:
    """Up to which byte an upload was taken in, time after time, and the hash of each part."""
    rows = select(BulkChunk.upto, BulkChunk.sha256).where(BulkChunk.upload_id == upload_id)
    return list(db.execute(rows.order_by(BulkChunk.upto)).tuples())


def billed(template: Template, rate: pricing.Rate) -> int:
    """What is counted of one frame of a template."""
    return quantity(template.spec, rate.method)


def facts_of(upload: BulkUpload) -> Facts:
    return Facts.model_validate_json(json.dumps(upload.facts))


# ------------------------------------------------------------------------------------------------ to end


@dataclass(frozen=True, slots=True)
class Ended:
    """How an upload ended. models: to wake after the commit."""

    upload: BulkUpload
    models: Sequence[str] = ()
    is_new: bool = True


def finish(db: Session, caller: Caller, upload_id: UUID, *, received: int | None = None) -> Ended:
    """Make the upload a job, or refuse it: see the answer's status.

    received: Conflict if it has not so many bytes. An upload that was accepted before stays so.
    Raises Conflict if it was discarded or refused before, BudgetExceeded, NotFound or Invalid if a fact of the job is
    no more allowed.
    """
    upload = find(db, caller.account_id, upload_id, lock=True)
    if upload.status == Status.ACCEPTED:
        return Ended(upload, is_new=False)
    if upload.status != Status.OPEN:
        raise Conflict(
            f"this upload is {upload.status}", upload=ids.public("blk", upload_id), status=upload.status
        )
    if received is not None and upload.received != received:
        raise Conflict(
            f"this upload has {upload.received} bytes, not {received}; go on from there",
            upload=ids.public("blk", upload_id), offset=upload.received,
        )  # fmt: skip
    facts = facts_of(upload)
    if not upload.good or (upload.bad and facts.mode is Mode.ALL_OR_NOTHING):
        _end(db, upload, Status.REFUSED)
        upload.problem = {"refused": "no line is good" if not upload.good else "a line is bad"}
        return Ended(upload)
    _end(db, upload, Status.ACCEPTED)
    return Ended(upload, _accept(db, caller, upload, facts))


def _accept(db: Session, caller: Caller, upload: BulkUpload, facts: Facts) -> list[str]:
    """One step for all frames: the job may be handed out."""
    timing, now = control.admit(db, caller.account_id, facts), control.now(db)
    job = db.get_one(Job, upload.id)
    for name, value in timing.columns.items():
        setattr(job, name, value)
    job.status, job.runnable, job.created_at = "active", not job.waits, now
    job.proof = facts.proof if facts.proof is not None and facts.proof < job.frames else None
    if upload.idempotency_key is not None:
        _keep_key(db, upload, upload.idempotency_key)
    if facts.webhook is not None:
        webhooks.bind(db, caller.account_id, job.id, facts.webhook)
    control.bind(db, caller.account_id, job.id, timing.after)
    events.record(
        db, "job.accepted", account_id=upload.account_id, job_id=job.id,
        data={"frames": job.frames, "priority": job.priority},
    )  # fmt: skip
    db.flush()
    budgets.cap(job.quoted, facts.budget, caller.currency)
    budgets.admit(db, caller, job.quoted)
    if job.waits:
        return []
    return lanes.open_for(db, [job.id])


def _keep_key(db: Session, upload: BulkUpload, key: str) -> None:
    """No other job is accepted under this key from now on. Raises Invalid if one was, since the upload was started."""
    row = {
        "account_id": upload.account_id,
        "key": key,
        "job_id": upload.id,
        "body_sha256": upload.asked_sha256,
    }
    kept = insert(IdempotencyKey).values(row).on_conflict_do_nothing().returning(IdempotencyKey.key)
    if db.execute(kept).first() is None:
        raise Invalid([Fault("Idempotency-Key", key, "it came for another job meanwhile; use another key")])


def discard(db: Session, account_id: UUID, upload_id: UUID) -> None:
    """Give up an upload: what it stored goes with the next sweeps.

    Raises Conflict if it is a job by now.
    """
    upload = find(db, account_id, upload_id, lock=True)
    if upload.status == Status.ACCEPTED:
        name = ids.public("job", upload_id)
        raise Conflict("this upload is a job by now; cancel that", job=name)
    if upload.status == Status.OPEN:
        _end(db, upload, Status.DISCARDED)


def _end(db: Session, upload: BulkUpload, status: Status) -> None:
    now = control.now(db)
    upload.status, upload.ended_at = status.value, now
    if status is not Status.ACCEPTED:  # corrected, the file may come again under its key
        upload.idempotency_key = upload.asked_sha256 = None
    db.flush()


# ------------------------------------------------------------------------------------------------ the sweep's


def expire(db: Session, *, limit: int = 100) -> int:
    """Discard uploads nobody went on with. Returns how many."""
    old = select(BulkUpload).where(
        BulkUpload.status == Status.OPEN,
        BulkUpload.touched_at
        < func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, settings().bulk_s),
    )
    rows = db.scalars(old.limit(limit).with_for_update(skip_locked=True)).all()
    for row in rows:
        _end(db, row, Status.DISCARDED)
    return len(rows)


def clear(db: Session) -> int:
    """Remove some frames of an upload that was refused or discarded, the last ones first; and at last its job.

    Counts, hold and quota go down with them. Returns how many frames went.
    """
    row = db.execute(sql("bulk_left")).first()
    if row is None:
        return 0
    cleared = db.execute(sql("bulk_clear"), {"job": row.id, "n": REMOVED}).one()
    if cleared.over:
        db.execute(sql("bulk_gone"), {"job": row.id})
        db.execute(update(BulkUpload).where(BulkUpload.id == row.id).values(stored=0))
    return int(cleared.frames)


def forget(db: Session) -> int:
    """Drop key and hashes of an upload two days after its end, and all that is left of it after thirty."""
    return sum(
        getattr(db.execute(text(statement)), "rowcount", 0)
        for statement in (
            "DELETE FROM bulk_chunks AS c USING bulk_uploads AS u WHERE u.id = c.upload_id"
            " AND u.ended_at < now() - interval '2 days'",
            "UPDATE bulk_uploads SET idempotency_key = NULL, asked_sha256 = NULL"
            " WHERE idempotency_key IS NOT NULL AND ended_at < now() - interval '2 days'",
            "DELETE FROM bulk_uploads WHERE ended_at < now() - interval '30 days'"
            " AND (status = 'accepted' OR stored = 0)",
        )
    )
