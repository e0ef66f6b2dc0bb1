"""The sweep: each chore puts right what it is there for, once, whoever else sweeps."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import psycopg
import pytest
from sqlalchemy import text

from farm import events, jobs, queue, submissions, sweep, tokens
from farm.db import transaction
from farm.embedded.process import free_port
from farm.errors import BrokerAway
from farm.settings import settings
from farm.sweep import CHORES, LOCK, Chore
from tests.factories import (
    CATALOG,
    FRAME,
    account,
    active_lanes,
    add_worker,
    ask,
    expire,
    must_claim,
    one,
    settle,
    statuses,
    submission,
    submit,
    view,
)

CHORE = {chore.name: chore for chore in CHORES}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    tokens.app.cache_clear()
    tokens._sender.cache_clear()
    yield
    tokens._forget()
    tokens.app.cache_clear()


def do(name: str) -> int:
    return sweep.do(CHORE[name])


def numbers() -> list[int]:
    return [r.number for r in ask("SELECT number FROM events ORDER BY number")]


# ------------------------------------------------------------------------------------------------ chores


def test_frames_of_lost_workers_come_back(books: str) -> None:
    # given
    job = submit(account(), 6)
    lost, kept = must_claim("lost"), must_claim("kept")
    expire(lost)

    # when
    assert do("reclaim") == 1

    # then
    assert statuses(job) == ["queued"] * 4 + ["claimed"] * 2
    assert do("reclaim") == 0
    assert len(settle(kept).done) == 2


def test_counts_are_folded_holds_lowered_and_jobs_ended(books: str) -> None:
    # given a worker that died between settling and finishing
    caller = account()
    job = submit(caller, 2)
    with transaction() as db:
        settle(must_claim(), db=db)
    assert view(caller, job).status == "running"

    # when
    assert do("fold") == 1

    # then
    assert one("SELECT held FROM jobs") == 0
    shown = view(caller, job)
    assert (shown.status, shown.done, shown.charged) == ("finished", 2, 2 * FRAME)


def test_frames_of_a_cancelled_job_are_ended_in_chunks(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 12)
    other = submit(caller, 2, steps=9)
    with transaction() as db:
        jobs.cancel(db, caller.account_id, job)

    # when
    chunks = []
    for _ in range(4):
        with transaction() as db:
            chunks.append(queue.cancel_queued(db, limit=5))
    do("fold")

    # then
    assert chunks == [5, 5, 2, 0]
    assert set(statuses(job)) == {"cancelled"}
    assert statuses(other) == ["queued", "queued"]
    assert view(caller, job).ended_at is not None
    assert one("SELECT held FROM jobs WHERE id = :job", job=job) == 0


def test_ending_cancelled_frames_does_not_wait_for_one_that_is_being_claimed(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 3)

    # when it is cancelled while a worker claims of it
    with transaction() as db:
        must_claim(db=db, frames=1)
        with transaction() as other:
            jobs.cancel(other, caller.account_id, job)
        with transaction() as other:
            other.execute(text("SET LOCAL lock_timeout = '1s'"))
            ended = queue.cancel_queued(other)

    # then
    assert ended == 2
    assert statuses(job) == ["claimed", "cancelled", "cancelled"]


def test_events_get_numbers_without_a_gap_in_the_order_of_their_commits(books: str) -> None:
    # given an event written first and committed last
    caller = account()
    first = submit(caller)
    with transaction() as late:
        slow = submit(caller, db=late, model="beta")  # of another lane, or the next would wait for it
        fast = submit(caller)
        assert one("SELECT count(*) FROM outbox") == 2
        do("relay")
        with transaction() as db:
            seen = events.after(db, 0, account_id=caller.account_id)
        assert [e.job_id for e in seen] == [first, fast]
    do("relay")

    # then a reader that goes on from the last number it saw misses nothing
    with transaction() as db:
        rest = events.after(db, seen[-1].number, account_id=caller.account_id)
    assert [e.job_id for e in rest] == [slow]
    assert numbers() == [1, 2, 3]
    assert one("SELECT count(*) FROM outbox") == 0


def test_events_are_relayed_in_portions_in_order(books: str) -> None:
    caller = account()
    made = [submit(caller) for _ in range(7)]

    portions = []
    for _ in range(4):
        with transaction() as db:
            portions.append(events.relay(db, limit=3))

    assert portions == [3, 3, 1, 0]
    assert numbers() == list(range(1, 8))
    assert [r.job_id for r in ask("SELECT job_id FROM events ORDER BY number")] == made


def test_a_transaction_that_is_rolled_back_leaves_no_gap(books: str) -> None:
    caller = account()
    submit(caller)
    with transaction() as db:
        submit(caller, db=db)
        db.rollback()
    submit(caller)

    do("relay")

    assert numbers() == [1, 2]


def test_readers_are_woken_with_the_last_number(books: str) -> None:
    # given
    with psycopg.connect(books, autocommit=True) as reader:
        reader.execute(f"LISTEN {events.CHANNEL}")
        caller = account()
        submit(caller)
        submit(caller)

        # when
        do("relay")
        do("relay")

        # then once
        told = list(reader.notifies(timeout=5, stop_after=1))
        assert [n.payload for n in told] == ["2"]
        assert list(reader.notifies(timeout=0)) == []


def test_an_account_reads_its_own_events(books: str) -> None:
    mine, other = account("mine"), account("other")
    job = submit(mine)
    submit(other)
    submit(mine)
    do("relay")

    with transaction() as db:
        assert {e.account_id for e in events.after(db, 0, account_id=mine.account_id)} == {mine.account_id}
        assert len(events.after(db, 0, account_id=mine.account_id)) == 2
        assert len(events.after(db, 0, account_id=mine.account_id, job_id=job)) == 1
        assert events.after(db, 0, account_id=other.account_id, job_id=job) == []


def test_old_idempotency_keys_and_silent_workers_are_forgotten(books: str) -> None:
    # given
    caller = account()
    for key in ("old", "new"):
        with transaction() as db:
            submissions.submit(
                db, caller, submission(), idempotency_key=key, body_sha256=b"0" * 32, models=CATALOG
            )
    ask("UPDATE idempotency_keys SET created_at = now() - interval '49 hours' WHERE key = 'old'")
    add_worker("silent", "alpha")
    add_worker("here", "alpha")
    ask("UPDATE workers SET seen_at = now() - interval '1 hour' WHERE id = 'silent'")

    # when
    assert do("forget") == 2

    # then
    assert [r.key for r in ask("SELECT key FROM idempotency_keys")] == ["new"]
    assert [tuple(r) for r in ask("SELECT id, state FROM workers ORDER BY id")] == [
        ("here", "up"),
        ("silent", "gone"),
    ]
    assert one("SELECT count(*) FROM jobs") == 2
    assert do("forget") == 0


def test_empty_lanes_are_retired_and_lanes_with_work_reopened(books: str) -> None:
    # given
    first, second = account("first"), account("second")
    submit(first, 1, steps=5)
    submit(second, 1)
    settle(must_claim())
    left = one("SELECT account_id FROM frames WHERE status = 'queued'")

    # then
    assert do("retire") == 1
    assert active_lanes() == [("alpha", 5, left)]
    ask("UPDATE lanes SET active = false")
    assert do("reopen") == 1
    assert active_lanes() == [("alpha", 5, left)]


def test_partitions_are_made_ahead_of_months_and_of_numbers(books: str) -> None:
    # given a farm that stood still for months, and one that wrote many events
    for table in ("frames", "usage"):
        for name in ask(
            f"SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = '{table}'::regclass"
        ):
            ask(f"DROP TABLE {name.name}")
    ask(
        "INSERT INTO events (number, account_id, job_id, kind, data, at)"
        " SELECT 9999999, gen_random_uuid(), gen_random_uuid(), 'x', '{}', now()"
    )

    # when
    do("partition")
    do("partition")

    # then
    months = ask(
        "SELECT to_char(now() + make_interval(months => n), 'YYYY_MM') AS month FROM generate_series(0, 2) AS n"
    )
    for table in ("frames", "usage"):
        found = ask(
            f"SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = '{table}'::regclass ORDER BY 1"
        )
        assert [r.name for r in found] == [f"{table}_{m.month}" for m in months]
    ask("INSERT INTO events (number, account_id, job_id, kind, data, at) SELECT 15000000, gen_random_uuid(),"
        " gen_random_uuid(), 'x', '{}', now()")  # fmt: skip
    submit(account())


# ------------------------------------------------------------------------------------------------ two sweeps


@pytest.mark.parametrize("chore", CHORES, ids=lambda c: c.name)
def test_two_sweeps_at_once_do_a_chore_once(books: str, chore: Chore) -> None:
    # given another sweep that is at it
    done: list[int] = []
    counted = Chore(chore.name, chore.number, chore.every_s, lambda db: done.append(1) or 1)

    # when
    with transaction() as db:
        assert db.scalar(text("SELECT pg_try_advisory_xact_lock(:l, :n)"), {"l": LOCK, "n": chore.number})
        assert sweep.do(counted) == 0
    assert sweep.do(counted) == 1

    # then
    assert done == [1]


def test_every_chore_has_a_number_of_its_own() -> None:
    assert len({c.number for c in CHORES}) == len(CHORES)


def test_two_sweeps_that_relay_at_once_give_no_number_twice(books: str) -> None:
    # given
    caller = account()
    for _ in range(30):
        submit(caller)

    # when
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: do("relay"), range(12)))
    do("relay")

    # then
    assert numbers() == list(range(1, 31))


def test_a_chore_that_fails_keeps_no_other_from_its_turn(books: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # given
    done: list[str] = []
    stop = Event()

    def fails(_db: object) -> int:
        done.append("fails")
        raise ZeroDivisionError

    def is_away(_db: object) -> int:
        done.append("away")
        raise BrokerAway

    def works(_db: object) -> int:
        done.append("works")
        stop.set()
        return 0

    chores = tuple(Chore(w.__name__, 100 + n, 1, w) for n, w in enumerate((fails, is_away, works)))
    monkeypatch.setattr(sweep, "CHORES", chores)

    # when
    beats: list[int] = []
    sweep.run(stop, beat=lambda: beats.append(1))

    # then
    assert done == ["fails", "away", "works"]
    assert beats == [1]


def test_a_broker_that_is_away_keeps_no_lease_from_being_reclaimed(
    books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    job = submit(account(), 2)
    add_worker("idle", "alpha")
    expire(must_claim())
    monkeypatch.setenv("FARM_BROKER_URL", f"redis://127.0.0.1:{free_port()}/0")
    settings.cache_clear()
    stop = Event()
    monkeypatch.setattr(
        sweep, "CHORES", (CHORE["top up"], CHORE["reclaim"], Chore("stop", 99, 1, lambda _: stop.set() or 0))
    )

    # when
    sweep.run(stop)

    # then
    assert statuses(job) == ["queued", "queued"]


def test_a_tidy_farm_stays_as_it_is(books: str) -> None:
    submit(account(), 3)
    sweep.tidy()

    assert sweep.tidy() == 0
