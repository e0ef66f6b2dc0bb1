"""What a worker has set aside, kept in the database: admins see it, no token is sent for it, the next process knows."""

from sqlalchemy import text

from farm.db import transaction
from workers.trust import Ailment

NOTE = """
INSERT INTO ailments AS a (worker, model, reason, times, until)
SELECT w.id, :model, :reason, :times, clock_timestamp() + make_interval(secs => :pause_s)
FROM workers AS w WHERE w.id = :worker
ON CONFLICT (worker, model) DO UPDATE
SET reason = excluded.reason, times = excluded.times, since = clock_timestamp(), until = excluded.until
"""
FORGET = "DELETE FROM ailments WHERE worker = :worker AND model = :model"
REMEMBERED = """
SELECT model, reason, times, extract(epoch FROM until - clock_timestamp()) AS left_s
FROM ailments WHERE worker = :worker
"""


def note(worker: str, ailment: Ailment) -> None:
    """Keep what is set aside, or forget it when all is well again. Nothing for a worker that is not registered.

    Raises DatabaseAway.
    """
    facts: dict[str, object] = {"worker": worker, "model": ailment.model}
    with transaction() as db:
        if not ailment.times:
            db.execute(text(FORGET), facts)
            return
        facts |= {"reason": ailment.reason or "unknown", "times": ailment.times, "pause_s": ailment.pause_s}
        db.execute(text(NOTE), facts)


def remembered(worker: str) -> dict[str, tuple[str, int, float]]:
    """What earlier processes of a worker set aside: by model reason, times in a row, seconds still to go."""
    with transaction() as db:
        rows = db.execute(text(REMEMBERED), {"worker": worker}).all()
    return {row.model: (row.reason, row.times, float(row.left_s)) for row in rows}
