"""The way to Postgres: one engine a process, transaction(), and the named statements of farm/sql."""

import os
import re
import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import Engine, TextClause, create_engine, event, text
from sqlalchemy.exc import DBAPIError, DisconnectionError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from farm.errors import DatabaseAway, Misconfigured
from farm.roundtrip import Rows, exchange
from farm.settings import settings

IDLE_S = 1.0
OPTIONS = (
    "timezone=UTC",
    "plan_cache_mode=force_generic_plan",  # planning claim.sql takes longer than running it
    # A plan or a foreign key's check made while a table was empty would read it from end to end ever after.
    "enable_seqscan=off",
    "idle_in_transaction_session_timeout=10000",  # a worker that froze in a claim holds up its lane this long
)
SQL = Path(__file__).parent / "sql"

Db = Session | psycopg.Connection[Any]  # what hot() takes: of transaction(), or of direct()
NOTHING: Mapping[str, Any] = {}
_ROWS: dict[str, Callable[[Sequence[Any]], Any]] = {}


@cache
def sql(name: str) -> TextClause:
    """The statement in farm/sql/{name}.sql, without comments."""
    lines = (line.split("--")[0].strip() for line in (SQL / f"{name}.sql").read_text().splitlines())
    return text("\n".join(line for line in lines if line))


@cache
def _native(name: str, change: tuple[str, str] | None) -> tuple[bytes, tuple[str, ...]]:
    """The statement as the server takes it, and which value is $1, $2 and so on."""
    names: list[str] = []

    def number(match: re.Match[str]) -> str:
        if match[1] not in names:
            names.append(match[1])
        return f"${names.index(match[1]) + 1}"

    statement = sql(name).text.replace(*change) if change else sql(name).text
    return re.sub(r"(?<![\w:]):(\w+)", number, statement).encode(), tuple(names)


def hot(
    db: Db,
    name: str,
    values: Mapping[str, Any] = NOTHING,
    *,
    change: tuple[str, str] | None = None,
    commit: bool = False,
) -> Sequence[Any]:
    """The rows, as named tuples, of the statement in farm/sql/{name}.sql, run by psycopg itself.

    For what is run for every pack: what SQLAlchemy does about a statement cost a claim a third of its time.
    change: words of it, and what stands in their place; as often as they occur. commit: as in together().
    Raises the errors that SQLAlchemy would raise.
    """
    with _raw(db, name) as raw:
        (rows,) = _exchange(raw, [(name, change, values)], commit=commit)
    return rows


def scalar(db: Db, name: str, values: Mapping[str, Any] = NOTHING) -> Any:
    """The first column of the first row as of hot(); None if there is no row."""
    rows = hot(db, name, values)
    return rows[0][0] if rows else None


def together(
    db: Session, statements: Sequence[tuple[str, Mapping[str, Any]]], *, commit: bool = False
) -> list[Sequence[Any]]:
    """The rows of several statements as hot() takes them, sent at once: one round trip, and each sees the one before.

    What they lock is not held for as long as this process takes to get its turn between two of them.
    commit: they are the transaction's last, and it ends with them; nothing can be undone after that.
    """
    with _raw(db, "together") as raw:
        return _exchange(raw, [(name, None, values) for name, values in statements], commit=commit)


def _exchange(
    raw: psycopg.Connection[Any],
    statements: Sequence[tuple[str, tuple[str, str] | None, Mapping[str, Any]]],
    *,
    commit: bool = False,
) -> list[Sequence[Any]]:
    sent = []
    for name, change, values in statements:
        statement, order = _native(name, change)
        sent.append((statement, [values[key] for key in order]))
    return [
        rows.load(_row(name, rows)) if rows.count else []
        for (name, *_), rows in zip(statements, exchange(raw, sent, commit=commit), strict=True)
    ]


def _row(name: str, rows: Rows) -> Callable[[Sequence[Any]], Any]:
    """What makes a named tuple of a statement's row. Its columns are read once."""
    found = _ROWS.get(name)
    if found is None:
        kind: Any = namedtuple("Row", rows.columns(), rename=True)  # type: ignore[misc]
        found = _ROWS[name] = kind._make
    return found


def array(values: Iterable[Any]) -> str:
    """An array as Postgres writes it, of numbers, truth values, ids, bytes and text; the statement casts it.

    For statements that are run for every request: what psycopg does about a list costs ten times as much.
    """
    return "{" + ",".join(map(_item, values)) + "}"


def _item(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f'"\\\\x{value.hex()}"'
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


def copy(db: Session, statement: str, data: bytes) -> None:
    """Send the data of a COPY … FROM STDIN. Raises the errors that SQLAlchemy would raise."""
    with _raw(db, "copy") as raw, raw.cursor() as cursor, cursor.copy(statement.encode()) as into:
        into.write(data)


@contextmanager
def _raw(db: Db, name: str) -> Iterator[psycopg.Connection[Any]]:
    """psycopg's connection; of a Session, its errors become those that SQLAlchemy would raise."""
    if isinstance(db, psycopg.Connection):
        yield db
        return
    connection = db.connection()
    raw = connection.connection.driver_connection
    assert isinstance(raw, psycopg.Connection)
    try:
        yield raw
    except psycopg.Error as e:
        if lost := _is_lost(raw):
            connection.invalidate(e)
        raise _as_theirs(e, name, lost) from e
    except BaseException:  # Ctrl-C in the middle of a round trip
        if _is_lost(raw):
            connection.invalidate()
        raise


def _is_lost(raw: psycopg.Connection[Any]) -> bool:
    return raw.broken or raw.closed


def _as_theirs(error: psycopg.Error, statement: str, lost: bool) -> DBAPIError:
    """The error as SQLAlchemy would raise it."""
    dialect = engine().dialect
    made = DBAPIError.instance(
        statement, None, error, psycopg.Error, connection_invalidated=lost, dialect=dialect
    )
    assert isinstance(made, DBAPIError)
    return made


def engine() -> Engine:
    """This process's engine: a child of a fork gets its own, sockets are not shared."""
    return _engine(os.getpid(), settings().database_url.get_secret_value())


@cache
def _engine(pid: int, url: str) -> Engine:
    del pid
    if not url:
        raise Misconfigured("FARM_DATABASE_URL is not set", setting="FARM_DATABASE_URL")
    made = create_engine(
        url.replace("postgresql://", "postgresql+psycopg://", 1),
        pool_size=settings().pool_size,
        max_overflow=0,
        pool_timeout=5,
        connect_args={
            "connect_timeout": 3,
            # farm/roundtrip.py prepares: where psycopg does it too, it drops what it did not prepare
            "prepare_threshold": None,
            "options": " ".join(f"-c {option}" for option in OPTIONS),
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 15000,
        },
    )
    event.listen(made, "checkin", _note_use)
    event.listen(made, "checkout", _try_idle)
    return made


def _note_use(_connection: Any, record: ConnectionPoolEntry) -> None:
    record.info["used"] = time.monotonic()


def _try_idle(connection: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
    """Try a connection that lay idle before it is used; before each use it would cost two round trips of five."""
    if time.monotonic() - record.info.get("used", time.monotonic()) < IDLE_S:
        return
    try:
        connection.execute("SELECT 1")
        connection.rollback()
    except psycopg.OperationalError as e:
        raise DisconnectionError from e


@contextmanager
def transaction() -> Iterator[Session]:
    """Commit what the block did, or nothing of it.

    Raises DatabaseAway if Postgres cannot be reached or went away in the middle.
    """
    with _away(), Session(engine(), expire_on_commit=False) as db, db.begin():
        yield db


@contextmanager
def direct() -> Iterator[psycopg.Connection[Any]]:
    """A transaction as transaction() gives it, on psycopg's own connection of the same pool: for hot() alone.

    For what is run for every pack: a Session costs a claim a tenth of its time.
    """
    with _away():
        try:
            connection = engine().raw_connection()
        except psycopg.Error as e:
            raise _as_theirs(e, "connect", lost=False) from e
        raw = connection.driver_connection
        assert isinstance(raw, psycopg.Connection)
        try:
            yield raw
            raw.commit()
        except psycopg.Error as e:
            if lost := _is_lost(raw):
                connection.invalidate(e)
            raise _as_theirs(e, "direct", lost) from e
        except BaseException:
            if _is_lost(raw):
                connection.invalidate()
            raise
        finally:
            connection.close()  # which rolls back what was not committed


@contextmanager
def _away() -> Iterator[None]:
    """DatabaseAway for those errors that say so."""
    try:
        yield
    except PoolTimeout as e:
        raise DatabaseAway("all database connections are busy") from e
    except DBAPIError as e:
        if e.connection_invalidated or (isinstance(e, OperationalError) and _is_away(e)):
            raise DatabaseAway from e
        raise


def _is_away(error: OperationalError) -> bool:
    state = getattr(error.orig, "sqlstate", None)
    # no state: never connected; 08: connection; 57P: shutting down or starting; 53300: too many connections
    return state is None or state.startswith(("08", "57P")) or state == "53300"
