"""Lanes of jobs that have work again: made active, and kept so against who retires empty ones."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from farm.db import array, hot


def opening(jobs: Sequence[UUID]) -> list[tuple[str, Mapping[str, Any]]]:
    """The last two statements of a transaction that gives jobs something to claim, as db.together() takes them."""
    facts = {"jobs": array(jobs)}
    return [("hold_lanes", facts), ("open_lanes", facts)]


def open_for(db: Session, jobs: Sequence[UUID]) -> list[str]:
    """Make the lanes of these jobs active, at the end of the transaction. Returns the models to wake after it."""
    facts = {"jobs": array(jobs)}
    hot(db, "hold_lanes", facts)
    return sorted({r.model for r in hot(db, "open_lanes", facts)})
