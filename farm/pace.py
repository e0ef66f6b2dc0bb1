"""How fast jobs went of late."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy.orm import Session

from farm.db import hot


@dataclass(frozen=True, slots=True)
class Pace:
    """How many frames a second were done of a job of late, as seen at a moment."""

    per_s: float
    at: datetime


def of(db: Session, jobs: Sequence[UUID]) -> dict[UUID, Pace]:
    """The paces of those of these jobs of which frames were done in the last minute."""
    rows = hot(db, "job_pace", {"jobs": list(jobs)}) if jobs else ()
    return {r.job_id: Pace(float(r.frames / r.seconds), r.at) for r in rows}
