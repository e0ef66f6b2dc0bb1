"""The way to Postgres: statements that psycopg runs itself, and connections that are lost under them."""

import signal
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from farm.db import direct, engine, hot, sql, together, transaction
from farm.errors import DatabaseAway
from farm.roundtrip import MOST, exchange
from tests.factories import account, ask, submit

NOBODY = {"lock": 1, "account_id": "01920000-0000-7000-8000-000000000001"}
HEAD = {"models": ["alpha"], "currency": "USD", "account_id": NOBODY["account_id"]}


def calls(name: str) -> Any:
    return {
        "hot": lambda db: hot(db, "prices", HEAD),
        "together": lambda db: together(db, [("budget_lock", NOBODY), ("prices", HEAD)]),
        "sqlalchemy": lambda db: db.execute(sql("prices"), HEAD).all(),
    }[name]


@pytest.mark.parametrize("name", ["hot", "together", "sqlalchemy"])
def test_a_connection_lost_in_the_middle_is_a_database_away_and_the_next_call_works(
    books: str, name: str
) -> None:
    # given a transaction whose backend is ended
    call = calls(name)

    def lose_it_in_the_middle() -> None:
        with transaction() as db:
            call(db)
            backend = db.scalar(text("SELECT pg_backend_pid()"))
            ask("SELECT pg_terminate_backend(:pid, 5000)", pid=backend)
            call(db)

    # then
    with pytest.raises(DatabaseAway):
        lose_it_in_the_middle()
    with transaction() as db:
        assert call(db)


def test_so_is_one_lost_under_direct(books: str) -> None:
    def lose_it_in_the_middle() -> None:
        with direct() as db:
            hot(db, "prices", HEAD)
            ask("SELECT pg_terminate_backend(:pid, 5000)", pid=db.info.backend_pid)
            hot(db, "prices", HEAD)

    with pytest.raises(DatabaseAway):
        lose_it_in_the_middle()
    with direct() as db:
        assert hot(db, "prices", HEAD)


def test_direct_commits_what_the_block_did_or_nothing_of_it(books: str) -> None:
    job = submit(account())

    def note(fail: bool) -> None:
        with direct() as db:
            db.execute("UPDATE jobs SET name = %s WHERE id = %s", ["failed" if fail else "done", job])
            if fail:
                raise KeyError

    with pytest.raises(KeyError):
        note(fail=True)
    assert ask("SELECT name FROM jobs")[0].name is None
    note(fail=False)

    assert ask("SELECT name FROM jobs")[0].name == "done"
    assert engine().pool.checkedout() == 0  # type: ignore[attr-defined]


def test_direct_raises_what_sqlalchemy_would_raise(books: str) -> None:
    job = submit(account())

    with pytest.raises(IntegrityError, match="duplicate key") as refused, direct() as db:
        db.execute("INSERT INTO jobs SELECT * FROM jobs WHERE id = %s", [job])

    assert refused.value.orig.sqlstate == "23505"


def test_what_is_sent_together_is_undone_together_and_says_what_was_wrong(books: str) -> None:
    job = submit(account())

    with pytest.raises(Exception, match="duplicate key"), transaction() as db:
        together(db, [("open_lanes", {"jobs": [job]}), ("insert_frames", _again(db, job)), ("prices", HEAD)])

    assert len(ask("SELECT FROM frames")) == 1


def _again(db: Any, job: Any) -> dict[str, Any]:
    """The frame that is there, to be stored once more."""
    f = db.execute(text("SELECT * FROM frames")).one()
    return {
        "job_id": job, "account_id": f.account_id, "ids": [f.id], "indices": [0], "key_nos": [0],
        "statuses": ["queued"], "seeds": [1], "works": [1], "quantities": [1], "price_ids": [f.price_id],
        "fingerprints": [f.fingerprint], "specs": ["{}"], "seededs": [False],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ one round trip


def test_a_commit_goes_along_with_the_last_statements(books: str) -> None:
    job = submit(account())

    with transaction() as db:
        db.execute(text("UPDATE jobs SET name = 'before'"))
        together(db, [("hold_lanes", {"jobs": [job]}), ("open_lanes", {"jobs": [job]})], commit=True)
        # then others see it before the block has ended
        assert ask("SELECT name FROM jobs")[0].name == "before"


def test_nothing_is_committed_where_a_statement_is_refused(books: str) -> None:
    job = submit(account())

    def refused() -> None:
        with transaction() as db:
            db.execute(text("UPDATE jobs SET name = 'before'"))
            together(db, [("insert_frames", _again(db, job)), ("prices", HEAD)], commit=True)

    with pytest.raises(IntegrityError, match="duplicate key"):
        refused()
    assert ask("SELECT name FROM jobs")[0].name is None
    with transaction() as db:
        assert together(db, [("prices", HEAD), ("prices", HEAD)]) == [hot(db, "prices", HEAD)] * 2


def test_what_was_not_prepared_because_another_was_refused_is_prepared_later(books: str) -> None:
    with direct() as db:
        with pytest.raises(psycopg.errors.DivisionByZero):
            exchange(db, [(b"SELECT 1 / $1", [0]), (b"SELECT $1 AS second", [2])])
        db.rollback()
        with pytest.raises(psycopg.errors.SyntaxError):
            exchange(db, [(b"SELECT nothing FROM", []), (b"SELECT $1 AS second", [2])])
        db.rollback()

        rows = exchange(db, [(b"SELECT 4 / $1", [2]), (b"SELECT $1 AS second", [2])])

        assert [r.load(tuple) for r in rows] == [[(2,)], [(2,)]]
        assert rows[1].columns() == ["second"]


def test_more_statements_than_are_prepared_are_run_all_the_same(books: str) -> None:
    statements = [(f"SELECT $1 + {k}".encode(), [1]) for k in range(MOST + 20)]

    with direct() as db:
        for _ in range(2):
            assert [r.load(tuple) for r in exchange(db, statements)] == [[(1 + k,)] for k in range(MOST + 20)]
        ours = b"SELECT count(*) FROM pg_prepared_statements WHERE starts_with(name, 'farm_')"
        (prepared,) = exchange(db, [(ours, [])])
        assert prepared.load(tuple) == [(MOST,)]


def test_more_than_a_socket_takes_goes_both_ways(books: str) -> None:
    long = "x" * (8 << 20)

    with direct() as db:
        rows = exchange(db, [(b"SELECT $1::text", [long])] * 3)

        assert all(r.load(tuple) == [(long,)] for r in rows)


def test_a_value_that_cannot_be_sent_leaves_the_connection_as_it_was(books: str) -> None:
    with direct() as db:
        backend = db.info.backend_pid
        with pytest.raises(psycopg.DataError, match="NUL"):
            exchange(db, [(b"SELECT 1", []), (b"SELECT $1::text", ["\0"])])
        assert exchange(db, [(b"SELECT 1", [])])[0].load(tuple) == [(1,)]
        assert db.info.backend_pid == backend


@pytest.mark.parametrize("change", ["ALTER TABLE changing ALTER it TYPE text", "DEALLOCATE ALL"])
def test_statements_that_serve_no_longer_are_prepared_anew(books: str, change: str) -> None:
    def read() -> list[tuple[Any, ...]]:
        with direct() as db:
            return exchange(db, [(b"SELECT it FROM changing", [])])[0].load(tuple)

    def change_it() -> None:
        with direct() as db:
            db.execute(change.encode())

    ask("CREATE TABLE changing (it integer)")
    ask("INSERT INTO changing VALUES (7)")
    assert read() == [(7,)]
    change_it()

    with pytest.raises(DatabaseAway):
        read()
    assert [str(*row) for row in read()] == ["7"]


@pytest.mark.parametrize("begin", [transaction, direct])
def test_ctrl_c_in_the_middle_closes_the_connection_and_the_next_is_another(books: str, begin: Any) -> None:
    def interrupt(_signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    def be_interrupted() -> None:
        with transaction() as other, begin() as db:
            hot(other, "turn", {"name": "this"})
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            hot(db, "turn", {"name": "this"})  # waits for the other, five seconds at most

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            be_interrupted()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    with begin() as db:
        assert hot(db, "prices", HEAD)
    assert engine().pool.checkedout() == 0  # type: ignore[attr-defined]
