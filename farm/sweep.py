"""The repair that runs every few seconds. Run it twice: a lock a round lets one of them work.

Each chore is a transaction of its own, and one that fails does not keep the others from their turn. Whatever a
crash, a lost message or a wrong moment left behind is put right here; nothing else waits for it to be in time.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from farm import (
    budgets,
    calls,
    control,
    events,
    files,
    inputs,
    ledger,
    once,
    outcomes,
    queue,
    quotes,
    retention,
    reuse,
    tokens,
    webhooks,
)
from farm.bulk import uploads
from farm.db import engine, transaction
from farm.errors import Away, DatabaseAway
from farm.settings import settings

log = logging.getLogger(__name__)

# what found something looks again at once
MORE = (
    "relay", "cancel", "late", "late packs", "release", "refill", "reclaim", "answer", "expire", "clear", "purge",
    "delivered", "clear uploads",
)  # fmt: skip
LOCK = 0x73776570  # "swep": one key, a chore's number beside it


@dataclass(frozen=True, slots=True)
class Chore:
    """Something to put right, how often, and under which number of the lock."""

    name: str
    number: int
    every_s: float
    work: Callable[..., int]  # of the transaction with the lock
    alone: bool = False  # or of nothing: it makes transactions of its own


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
    """Drop what is kept for repeated requests and expired quotes, and mark workers gone that were not heard of."""
    return (
        quotes.forget(db)
        + once.forget(db)
        + sum(
            getattr(db.execute(text(statement), {"lost_s": settings().worker_lost_s}), "rowcount", 0)
            for statement in (
                "DELETE FROM idempotency_keys WHERE created_at < now() - interval '2 days'",
                "UPDATE workers SET state = 'gone' WHERE state <> 'gone'"
                " AND seen_at < clock_timestamp() - make_interval(secs => :lost_s)",
            )
        )
    )


def partition(db: Session) -> int:
    """Make the next months' partitions, and the next of events."""
    db.execute(
        text(
            "SELECT ensure_names(now()::date, (now() + interval '2 months')::date),"
            " ensure_partitions(now()::date, (now() + interval '2 months')::date,"
            " (SELECT coalesce(max(number), 0) + 10000000 FROM events))"
        )
    )
    return 0


ORPHANS = retention.Orphans()
LOOK_S = 0.05  # between two looks into the outbox
RELAY_ENDS_S = 5.0
SOMETHING = text("SELECT EXISTS (SELECT FROM outbox)")
RELAY = Chore("relay", 1, 1, events.relay)

CHORES = (
    RELAY,  # here for the day that its own thread is stuck
    Chore("reclaim", 2, 1, reclaim),
    Chore("answer", 15, 0.2, reuse.answer_waiters),
    Chore("fold", 3, 1, fold),
    Chore("late", 51, 1, control.note_late),
    Chore("late packs", 52, 1, queue.release_late),
    Chore("cancel", 4, 1, queue.cancel_queued),
    Chore("release", 53, 1, control.release),
    Chore("refill", 54, 0.2, queue.refill),
    Chore("give up", 91, 1, outcomes.give_up),
    Chore("top up", 5, 1, tokens.top_up),
    Chore("retire", 10, 1, queue.retire_lanes),
    Chore("reopen", 6, 10, queue.reopen_lanes),
    Chore("tallies", 21, 1, budgets.fold),
    Chore("budgets", 22, 1, budgets.enforce),
    Chore("delivered", 23, 5, ledger.count_delivered),
    Chore("forget", 7, 10, forget),
    Chore("partition", 8, 3600, partition),
    Chore("expire", 11, 60, retention.expire),
    Chore("clear", 12, 1, retention.clear),
    Chore("orphans", 9, 600, ORPHANS.turn, alone=True),
    Chore("purge", 13, 5, retention.purge, alone=True),
    Chore("expire inputs", 41, 60, inputs.expire),
    Chore("purge inputs", 42, 10, inputs.purge, alone=True),
    Chore("forget tombstones", 14, 3600, retention.forget),
    Chore("expire files", 81, 60, files.expire),
    Chore("purge files", 82, 10, files.purge, alone=True),
    Chore("forget calls", 83, 600, calls.forget),
    Chore("forget deliveries", 71, 600, webhooks.forget),
    Chore("expire uploads", 61, 60, uploads.expire),
    Chore("clear uploads", 62, 1, uploads.clear),
    Chore("forget uploads", 63, 600, uploads.forget),
)


def do(chore: Chore) -> int:
    """Do one chore, unless another sweep is at it. Returns how much it put right."""
    if chore.alone:
        with _held(chore) as free:
            return chore.work() if free else 0
    with transaction() as db:
        free = db.scalar(
            text("SELECT pg_try_advisory_xact_lock(:lock, :number)"), {"lock": LOCK, "number": chore.number}
        )
        return chore.work(db) if free else 0


@contextmanager
def _held(chore: Chore) -> Iterator[bool]:
    """Hold a chore's lock as long as a connection, outside any transaction: one that froze would be cut off."""
    facts = {"lock": LOCK, "number": chore.number}
    try:
        with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            free = bool(connection.scalar(text("SELECT pg_try_advisory_lock(:lock, :number)"), facts))
            try:
                yield free
            finally:
                if free:
                    connection.execute(text("SELECT pg_advisory_unlock(:lock, :number)"), facts)
    except OperationalError as e:
        raise DatabaseAway from e


def tidy() -> int:
    """Do every chore once, now. Returns how much was put right."""
    return sum(do(chore) for chore in CHORES)


def relay(stop: threading.Event) -> None:
    """Number what happened as soon as it is committed, until told to stop; other chores may take their time.

    To look whether there is something is one statement; a NOTIFY in the transactions would cost far more.
    """
    pause_s = LOOK_S * settings().sweep_s
    while not stop.wait(pause_s):
        try:
            with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                while not stop.wait(pause_s):
                    if connection.scalar(SOMETHING):
                        do(RELAY)
                        stop.wait(pause_s)  # under load many are numbered at once
        except (Away, OperationalError, PoolTimeout) as e:
            log.warning("relay: %s", e)
            stop.wait(settings().sweep_s)
        except Exception:
            log.exception("relay failed")
            stop.wait(settings().sweep_s)


def run(stop: threading.Event, *, beat: Callable[[], None] = lambda: None) -> None:
    """Sweep until told to stop. beat is called each round: a health check watches it."""
    relaying = threading.Thread(target=relay, args=(stop,), name="relay", daemon=True)
    relaying.start()
    try:
        _sweep(stop, beat)
    finally:
        relaying.join(RELAY_ENDS_S)


def _sweep(stop: threading.Event, beat: Callable[[], None]) -> None:
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
                    due[chore] = 0.0 if chore.name in MORE else due[chore]
                if chore.name == "orphans" and ORPHANS.unfinished:
                    due[chore] = 0.0
            except Away as e:
                log.warning("%s: %s", chore.name, e)
            except Exception:
                log.exception("%s failed", chore.name)
        stop.wait(0.1 * pace)
