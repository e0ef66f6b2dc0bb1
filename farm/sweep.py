"""The repair that runs every few seconds. Run it twice: a lock a round lets one of them work.

Each chore is a transaction of its own, and one that fails does not keep the others from their turn. Whatever a
crash, a lost message or a wrong moment left behind is put right here; nothing else waits for it to be in time.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import text
from sqlalchemy.orm import Session

from farm import events, ledger, queue, tokens
from farm.db import sql, transaction
from farm.errors import Away
from farm.settings import settings
from farm.storage import open_store

log = logging.getLogger(__name__)

LOCK = 0x73776570  # "swep": one key, a chore's number beside it


@dataclass(frozen=True, slots=True)
class Chore:
    """Something to put right, how often, and under which number of the lock."""

    name: str
    number: int
    every_s: float
    work: Callable[[Session], int]


def reclaim(db: Session) -> int:
    """Take back the frames of workers that were lost."""
    return queue.reclaim(db)


def fold(db: Session) -> int:
    """Fold counts, lower holds, and end the jobs whose frames have all ended."""
    jobs = ledger.fold_counts(db)
    if jobs:
        queue.finish(db, jobs)
    return len(jobs)


def forget(db: Session) -> int:
    """Drop idempotency keys after two days and mark workers gone that were not heard of."""
    return sum(
        getattr(db.execute(text(statement), {"lost_s": settings().worker_lost_s}), "rowcount", 0)
        for statement in (
            "DELETE FROM idempotency_keys WHERE created_at < now() - interval '2 days'",
            "UPDATE workers SET state = 'gone' WHERE state <> 'gone'"
            " AND seen_at < clock_timestamp() - make_interval(secs => :lost_s)",
        )
    )


def partition(db: Session) -> int:
    """Make the next months' partitions, and the next of events."""
    db.execute(
        text(
            "SELECT ensure_partitions(now()::date, (now() + interval '2 months')::date,"
            " (SELECT coalesce(max(number), 0) + 10000000 FROM events))"
        )
    )
    return 0


def clear_orphans(db: Session) -> int:
    """Remove files that no image points to, after a grace longer than any lease plus upload.

    A file is written before its row commits, so a young one may be about to get its row.
    """
    # the store may list for minutes between two statements; no row is locked meanwhile
    db.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
    store, removed = open_store(settings().storage_url.get_secret_value()), 0
    old = datetime.now(UTC) - timedelta(seconds=settings().orphan_grace_s)
    batch: list[str] = []
    for stored in store.list("v1/"):
        if stored.modified < old:
            batch.append(stored.key)
        if len(batch) == 1000:
            removed += _remove_orphans(db, batch, old=old)
            batch = []
    return removed + _remove_orphans(db, batch, old=old)


def _remove_orphans(db: Session, keys: list[str], *, old: datetime) -> int:
    orphans = db.scalars(sql("orphans"), {"keys": keys}).all()
    store = open_store(settings().storage_url.get_secret_value())
    for key in orphans:
        # stored again since it was listed, it may be about to get its row
        if any(stored.modified >= old for stored in store.list(key)):
            continue
        log.info("removing %s, which no image points to", key)
        store.delete(key)
    return len(orphans)


CHORES = (
    Chore("relay", 1, 0.2, events.relay),
    Chore("reclaim", 2, 1, reclaim),
    Chore("fold", 3, 1, fold),
    Chore("cancel", 4, 1, queue.cancel_queued),
    Chore("top up", 5, 1, tokens.top_up),
    Chore("retire", 10, 1, queue.retire_lanes),
    Chore("reopen", 6, 10, queue.reopen_lanes),
    Chore("forget", 7, 10, forget),
    Chore("partition", 8, 3600, partition),
    Chore("orphans", 9, 600, clear_orphans),
)


def do(chore: Chore) -> int:
    """Do one chore, unless another sweep is at it. Returns how much it put right."""
    with transaction() as db:
        free = db.scalar(
            text("SELECT pg_try_advisory_xact_lock(:lock, :number)"), {"lock": LOCK, "number": chore.number}
        )
        return chore.work(db) if free else 0


def tidy() -> int:
    """Do every chore once, now. Returns how much was put right."""
    return sum(do(chore) for chore in CHORES)


def run(stop: threading.Event, *, beat: Callable[[], None] = lambda: None) -> None:
    """Sweep until told to stop. beat is called each round: a health check watches it."""
    due = dict.fromkeys(CHORES, 0.0)
    pace = settings().sweep_s
    while not stop.is_set():
        beat()
        for chore in CHORES:
            now = time.monotonic()
            if now < due[chore] or stop.is_set():
                continue
            due[chore] = now + chore.every_s * pace
            try:
                if do(chore):
                    due[chore] = 0.0 if chore.name in ("relay", "cancel", "reclaim") else due[chore]
            except Away as e:
                log.warning("%s: %s", chore.name, e)
            except Exception:
                log.exception("%s failed", chore.name)
        stop.wait(0.1 * pace)
