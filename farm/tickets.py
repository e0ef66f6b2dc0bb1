"""Tickets: what a client of another API holds of a job, and what it asked for, to be answered in its own words.

They stand in the database beside the job: an id is known after a restart, by every process, to its account alone.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import Select, delete, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from farm import ids
from farm.errors import Conflict, Fault, Gone, Invalid, NotFound
from farm.tables import Input, InputName, Job, Ticket

OPEN = (Job.ended_at.is_(None), Job.status != "cancelled")


class Dialect(StrEnum):
    """The APIs whose clients come back for a job."""

    REPLICATE = "replicate"
    FAL = "fal"
    AUTOMATIC1111 = "automatic1111"
    COMFYUI = "comfyui"
    PLAIN = "plain"


def write(
    db: Session,
    account_id: UUID,
    job_id: UUID,
    *,
    dialect: Dialect,
    name: str,
    asked: Mapping[str, Any],
    client: str = "",
    start_by: datetime | None = None,
) -> None:
    """Keep a ticket, in the transaction that submits the job. start_by: cancel it if nobody has begun by then.
    client: which of the account's clients asked.

    Raises Conflict if the account has one of that name, Invalid for numbers that JSON has not.
    """
    facts = {"job_id": job_id, "account_id": account_id, "dialect": dialect, "name": name}
    try:
        said = json.dumps(asked, allow_nan=False)
    except ValueError:
        raise Invalid([Fault("body", None, "NaN and Infinity are no JSON")]) from None
    added = insert(Ticket).values(**facts, asked=said, client=client, start_by=start_by)
    row = db.execute(added.on_conflict_do_nothing().returning(Ticket.job_id)).one_or_none()
    if row is None:
        raise Conflict("there is a request of this id already", id=name)


def asked(ticket: Ticket) -> dict[str, Any]:
    """What was asked for, as it came."""
    found: dict[str, Any] = json.loads(ticket.asked)
    return found


def find(db: Session, account_id: UUID, dialect: Dialect, name: str) -> Ticket:
    """One of the account's tickets.

    Raises NotFound for another account's as for one that does not exist.
    """
    found = None
    if is_text(name):
        found = db.scalar(_of(account_id, dialect).where(Ticket.name == name))
    if found is None:
        raise NotFound("there is no request of this id", id=name)
    return found


def is_text(name: str) -> bool:
    """Whether the database can have it: no NUL, no half of a surrogate pair."""
    return "\0" not in name and not any("\ud800" <= c <= "\udfff" for c in name)


def every(
    db: Session,
    account_id: UUID,
    dialect: Dialect,
    *,
    before: UUID | None = None,
    after: UUID | None = None,
    limit: int = 100,
) -> Sequence[Ticket]:
    """The account's tickets, newest first: those of jobs older than `before`, or the next newer than `after`."""
    query = _of(account_id, dialect)
    if after is not None:
        newer = query.where(Ticket.job_id > after).order_by(Ticket.job_id).limit(limit)
        return db.scalars(newer).all()[::-1]
    if before is not None:
        query = query.where(Ticket.job_id < before)
    return db.scalars(query.order_by(Ticket.job_id.desc()).limit(limit)).all()


def still_open(
    db: Session, account_id: UUID, dialect: Dialect, *, client: str | None = None, limit: int = 100
) -> Sequence[Ticket]:
    """The account's tickets whose jobs have not ended, oldest first; those of one client."""
    query = _of(account_id, dialect).join(Job, Job.id == Ticket.job_id).where(*OPEN)
    if client is not None:
        query = query.where(Ticket.client == client)
    return db.scalars(query.order_by(Ticket.job_id).limit(limit)).all()


def count_open(db: Session, account_id: UUID, dialect: Dialect) -> int:
    """How many of the account's tickets are of jobs that have not ended."""
    mine = select(func.count()).select_from(Ticket).join(Job, Job.id == Ticket.job_id)
    counted = mine.where(Ticket.account_id == account_id, Ticket.dialect == dialect, *OPEN)
    return int(db.scalar(counted) or 0)


def ended(db: Session, account_id: UUID, dialect: Dialect, *, limit: int = 100) -> Sequence[Ticket]:
    """The account's tickets whose jobs have ended, newest first."""
    query = _of(account_id, dialect).join(Job, Job.id == Ticket.job_id)
    over = query.where(or_(Job.ended_at.is_not(None), Job.status == "cancelled"))
    return db.scalars(over.order_by(Ticket.job_id.desc()).limit(limit)).all()


def of_jobs(db: Session, account_id: UUID, dialect: Dialect, job_ids: Collection[UUID]) -> dict[UUID, Ticket]:
    """The tickets of those of these jobs that came by one, by their job."""
    rows = db.scalars(_of(account_id, dialect).where(Ticket.job_id.in_(job_ids)))
    return {row.job_id: row for row in rows}


def of_job(db: Session, account_id: UUID, job_id: UUID) -> Ticket | None:
    """The ticket of one of the account's jobs, if it came by one."""
    return db.scalar(select(Ticket).where(Ticket.job_id == job_id, Ticket.account_id == account_id))


def forget(db: Session, account_id: UUID, dialect: Dialect, names: Collection[str] | None = None) -> None:
    """Remove tickets of jobs that have ended: those of these names, or all."""
    ended = select(Job.id).where(Job.id == Ticket.job_id, Job.ended_at.is_not(None))
    gone = delete(Ticket).where(Ticket.account_id == account_id, Ticket.dialect == dialect, ended.exists())
    if names is not None:
        gone = gone.where(Ticket.name.in_([n for n in names if is_text(n)]))
    db.execute(gone.execution_options(synchronize_session=False))


def _of(account_id: UUID, dialect: Dialect) -> Select[Ticket]:
    return select(Ticket).where(Ticket.account_id == account_id, Ticket.dialect == dialect)


# ------------------------------------------------------------------------------------------------ uploads by name


def name_input(db: Session, account_id: UUID, name: str, input_id: UUID, *, overwrite: bool) -> bool:
    """Call an input so. False if another one has the name, and it may not be overwritten."""
    facts = {"account_id": account_id, "name": name, "input_id": input_id}
    added = insert(InputName).values(facts)
    keys = ["account_id", "name"]
    if overwrite:
        db.execute(added.on_conflict_do_update(index_elements=keys, set_={"input_id": input_id}))
        return True
    db.execute(added.on_conflict_do_nothing(index_elements=keys))
    there = select(InputName.input_id).where(InputName.account_id == account_id, InputName.name == name)
    return db.scalar(there) == input_id


def input_named(db: Session, account_id: UUID, name: str) -> Input:
    """The input the account calls so.

    Raises NotFound if there is none, Gone if it was removed.
    """
    row = None
    if is_text(name):
        query = select(Input).join(InputName, InputName.input_id == Input.id)
        row = db.scalar(query.where(InputName.account_id == account_id, InputName.name == name))
    if row is None:
        raise NotFound("there is no upload of this name", name=name)
    if row.deleted_at is not None:
        raise Gone("this upload was removed; send it again", name=name, input=ids.public("inp", row.id))
    return row


def input_names(db: Session, account_id: UUID, *, limit: int = 1000) -> Sequence[str]:
    """What the account calls its inputs, in order."""
    query = select(InputName.name).join(Input, Input.id == InputName.input_id)
    mine = query.where(InputName.account_id == account_id, Input.deleted_at.is_(None))
    return db.scalars(mine.order_by(InputName.name).limit(limit)).all()
