"""Migrations: up, down, up; no drift; and a month that leaves."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from alembic import command

import migrations
from farm import ids
from farm.db import transaction
from farm.embedded.postgres import Postgres
from tests.factories import account, ask, claim, must_claim, one, settle, statuses, submit, view

SHAPE = (
    "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns"
    " WHERE table_schema = 'public' ORDER BY 1, 2",
    "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
    " WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2",
    "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1, 2",
    "SELECT tgrelid::regclass::text, tgname FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1, 2",
    "SELECT proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1",
)


@pytest.fixture
def empty(postgres: Postgres) -> Iterator[str]:
    """The URL of a database with nothing in it."""
    yield postgres.create_database("unmigrated")
    postgres.drop_database("unmigrated")


def shape(url: str) -> list[list[tuple[object, ...]]]:
    with psycopg.connect(url) as db:
        return [db.execute(query).fetchall() for query in SHAPE]


def test_migrations_go_up_down_and_up_again(empty: str) -> None:
    # when
    migrations.upgrade(empty)
    first = shape(empty)
    migrations.downgrade(empty, "base")
    nothing = shape(empty)
    migrations.upgrade(empty)

    # then
    assert {row[0] for row in nothing[0]} <= {"alembic_version"}
    assert nothing[3] == nothing[4] == []
    assert shape(empty) == first
    assert len(first[0]) > 100


def test_migrating_what_is_migrated_changes_nothing(database: str) -> None:
    before = shape(database)

    migrations.upgrade(database)

    assert shape(database) == before


def test_the_tables_of_the_orm_are_those_of_the_migrations(database: str) -> None:
    command.check(migrations.config(database))  # raises if a migration is missing


def test_partitions_are_there_for_this_month_and_the_next_two(database: str) -> None:
    months = one("SELECT count(*) FROM pg_inherits WHERE inhparent = 'frames'::regclass")
    usage = one("SELECT count(*) FROM pg_inherits WHERE inhparent = 'usage'::regclass")

    assert months == usage == 3


def test_a_month_begins_where_the_one_before_ends(database: str) -> None:
    # given a job of the last millisecond of a month, and one of the first of the next
    ask("SELECT ensure_partitions('2031-01-01', '2031-03-01', 0)")
    edge = int(datetime(2031, 2, 1, tzinfo=UTC).timestamp() * 1000)

    def month(ms: int, index: int) -> str:
        frame = ids.frame_id(ids.new_id(ms), index)
        last, first, end = (f"2031-0{n}-01" for n in (1, 2, 3))
        floors = [
            one("SELECT uuid_floor(CAST(:m AS timestamptz))", m=f"{m} 00:00+00") for m in (last, first, end)
        ]
        return (
            "first"
            if floors[0] <= frame < floors[1]
            else "second"
            if floors[1] <= frame < floors[2]
            else "none"
        )

    # then all frames of a job stand in one month
    assert month(edge - 1, 0) == month(edge - 1, ids.MAX_FRAMES - 1) == "first"
    assert month(edge, 0) == month(edge, ids.MAX_FRAMES - 1) == "second"


def test_ids_in_python_and_in_the_database_are_alike(database: str) -> None:
    job = ids.new_id(1_900_000_000_000)

    assert one("SELECT last_frame_id(:job)", job=job) == ids.last_frame_id(job)
    assert ids.frame_id(job, ids.MAX_FRAMES - 1) == ids.last_frame_id(job)
    assert ids.job_of(ids.frame_id(job, 12_345)) == job


@pytest.mark.parametrize("how", ["", " CONCURRENTLY"])
def test_a_month_is_detached_while_other_months_go_on_working(
    books: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a finished job two months from now, and one of today of which a pack is being rendered
    caller = account()
    today = submit(caller, 6)
    pack = must_claim()
    later = datetime.now(UTC).replace(day=15) + timedelta(days=61)
    made = ids.new_id
    monkeypatch.setattr(ids, "new_id", lambda _ms: made(int(later.timestamp() * 1000)))
    other = submit(caller, 2)
    monkeypatch.undo()
    rest = must_claim()
    mixed = {f.job_id for f in rest.frames}
    settle(rest)
    while (more := claim()) is not None:
        settle(more)
    assert statuses(other) == ["done", "done"]
    assert other in mixed

    # when
    month = f"{later:%Y_%m}"
    with psycopg.connect(books, autocommit=True) as db:
        db.execute(f"ALTER TABLE frames DETACH PARTITION frames_{month}{how}")
        db.execute(f"ALTER TABLE usage DETACH PARTITION usage_{month}{how}")

    # then
    assert len(settle(pack).done) == 4
    assert view(caller, today).status == "finished"
    new = submit(caller, 2)
    settle(must_claim())
    assert statuses(new) == ["done", "done"]
    assert view(caller, other).done == 2  # its job and its counts stay
    assert one(f"SELECT count(*) FROM frames_{month}") == one(f"SELECT count(*) FROM usage_{month}") == 2

    # and it can come back
    with transaction() as session:
        raw = session.connection().connection.driver_connection
        assert raw is not None
        bounds = [
            one(
                "SELECT uuid_floor(date_trunc('month', CAST(:m AS timestamptz)) + CAST(:n AS interval))",
                m=later,
                n=n,
            )
            for n in ("0", "1 month")
        ]
        for table in ("frames", "usage"):
            raw.execute(
                f"ALTER TABLE {table} ATTACH PARTITION {table}_{month}"
                f" FOR VALUES FROM ('{bounds[0]}') TO ('{bounds[1]}')"
            )
    assert statuses(other) == ["done", "done"]
