"""The way to Postgres: statements that psycopg runs itself, and connections that are lost under them."""

from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from farm.db import direct, engine, hot, sql, together, transaction
from farm.errors import DatabaseAway
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
