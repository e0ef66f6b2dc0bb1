"""Requests that are sent again: carried out once under an idempotency key, and answered the same.

What was answered is kept in the transaction that did it, for two days. Who sends the same while it is being worked on
waits for it, five seconds at most. Jobs keep their key with the job itself: farm/submissions.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from farm.db import together
from farm.errors import Fault, InProgress, Invalid
from farm.tables import KeptAnswer

KEPT = "2 days"


Statement = tuple[str, Mapping[str, Any]]


def turn(db: Session, name: str, key: str, *, then: Sequence[Statement]) -> list[Sequence[Any]]:
    """Wait until nobody else works on this; then the rows of statements of farm/sql, in the same round trip.

    name: of what is done once, the idempotency key in it. Raises InProgress if somebody works on it for long.
    """
    try:
        return together(db, [("turn", {"name": name}), *then])[1:]
    except OperationalError as e:
        if isinstance(e.orig, psycopg.errors.LockNotAvailable):
            raise InProgress("a request with this Idempotency-Key is being worked on", key=key) from e
        raise


def same(before: bytes, now: bytes, key: str) -> None:
    """Compare the hashes of what came before under the key and of what comes now. Raises Invalid."""
    if before != now:
        raise Invalid([Fault("Idempotency-Key", key, "it came before with another body; use another key")])


def earlier(db: Session, account_id: UUID, operation: str, key: str, body_sha256: bytes) -> Any:
    """What this was answered before: status, headers, answer; None if it comes for the first time.

    Raises InProgress if it is being worked on, Invalid if it came with another body.
    """
    names = {"account_id": account_id, "operation": operation, "key": key}
    (found,) = turn(db, f"{account_id}/{operation}/{key}", key, then=[("kept_answer", names)])
    if not found:
        return None
    same(found[0].body_sha256, body_sha256, key)
    return found[0]


def keep(
    db: Session,
    account_id: UUID,
    operation: str,
    key: str,
    *,
    body_sha256: bytes,
    status: int,
    headers: Mapping[str, str],
    answer: Mapping[str, Any],
) -> None:
    """Keep an answer for who sends the same again: in the transaction that did what it tells of. No secret in it."""
    row = KeptAnswer(
        account_id=account_id, operation=operation, key=key, body_sha256=body_sha256, status=status,
        headers=dict(headers), answer=dict(answer),
    )  # fmt: skip
    db.add(row)
    db.flush()


def forget(db: Session) -> int:
    """Drop answers after two days. Returns how many."""
    gone = db.execute(text(f"DELETE FROM kept_answers WHERE created_at < now() - interval '{KEPT}'"))  # noqa: S608
    return int(getattr(gone, "rowcount", 0))
