"""The ledger: what was used, and counts folded without anybody noticing."""

import threading
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from sqlalchemy import text

from farm import accounts, events, ids, ledger, pricing, statements
from farm.accounts import Caller
from farm.catalog import Catalog
from farm.db import sql, transaction
from farm.errors import Conflict, Invalid, NotFound, StorageAway
from farm.storage import open_store
from tests.factories import (
    FRAME,
    account,
    ask,
    back_date,
    claim,
    model,
    must_claim,
    one,
    settle,
    statuses,
    stored,
    submit,
    until_blocked,
    view,
    violations,
)


def lines(caller: Caller, **within: Any) -> list[ledger.UsageLine]:
    with transaction() as db:
        return ledger.usage_lines(db, caller.account_id, **within)


def test_usage_is_one_line_for_each_model_and_rate(books: str) -> None:
    # given frames of two models, and a price that rose in between
    caller = account()
    submit(caller, 3)
    submit(caller, 2, model="flat")
    settle(must_claim())
    settle(must_claim(models=["flat"]))
    dearer = model("alpha", price={"method": "mpx_step", "rate": "0.0064", "currency": "USD"})
    with transaction() as db:
        pricing.sync(db, Catalog([dearer]))
    submit(caller, 1)
    settle(must_claim())

    # when
    found = [(x.model, x.method, x.rate, x.frames, x.quantity, x.amount) for x in lines(caller)]

    # then
    size = 512 * 512 * 4
    assert found == [
        ("alpha", "mpx_step", Decimal("0.0032"), 3, 3 * size, 3 * FRAME),
        ("alpha", "mpx_step", Decimal("0.0064"), 1, size, 2 * FRAME),
        ("flat", "image", Decimal("0.37"), 2, 2, Decimal("0.74")),
    ]


def test_usage_is_an_accounts_own_and_of_the_time_asked_for(books: str) -> None:
    # given
    mine, other = account("mine"), account("other")
    job = submit(mine, 2)
    settle(must_claim())
    now = datetime.now(UTC)
    hour = timedelta(hours=1)

    # then
    assert [x.frames for x in lines(mine)] == [2]
    assert lines(other) == []
    assert lines(mine, since=now + hour) == []
    assert lines(mine, until=now - hour) == []
    assert [x.frames for x in lines(mine, since=now - hour, until=now + hour, job_id=job)] == [2]
    assert lines(mine, job_id=submit(mine)) == []


# ------------------------------------------------------------------------------------------------ reversals


def reverse(frame: UUID, reason: str = "the wrong picture") -> ledger.Reversed:
    with transaction() as db:
        return ledger.reverse(db, frame, reason=reason)


def test_a_reversed_charge_is_taken_off_and_the_frame_stays_done(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 2)
    settle(must_claim())
    frame = ids.frame_id(job, 1)

    # when
    done = reverse(frame, " the wrong picture ")

    # then
    (line,) = lines(caller)
    assert (line.frames, line.quantity, line.amount) == (2, 512 * 512 * 4, FRAME)
    assert (done.frame_id, done.currency, done.amount) == (frame, "USD", FRAME)
    assert statuses(job) == ["done", "done"]
    assert view(caller, job).charged == FRAME
    assert one("SELECT reason FROM reversals") == "the wrong picture"
    with transaction() as db:
        ledger.fold_counts(db)
    assert (view(caller, job).charged, view(caller, job).held) == (FRAME, 0)


def test_a_charge_is_reversed_once_and_only_if_there_was_one(books: str) -> None:
    caller = account()
    job = submit(caller, 6)
    settle(must_claim())
    reverse(ids.frame_id(job, 0))

    with pytest.raises(Conflict, match="before"):
        reverse(ids.frame_id(job, 0))
    with pytest.raises(NotFound):
        reverse(ids.frame_id(job, 5))
    for reason in ("", "  ", "x" * 501, "a\0b"):
        with pytest.raises(Invalid, match="reason"):
            reverse(ids.frame_id(job, 1), reason)
    assert one("SELECT count(*) FROM usage WHERE entry = 1") == 1


def test_of_two_reversals_at_once_one_is_made(books: str) -> None:
    # given
    job = submit(account(), 1)
    settle(must_claim())
    frame, refused = ids.frame_id(job, 0), []

    def again() -> None:
        with pytest.raises(Conflict) as conflict:
            reverse(frame)
        refused.append(conflict)

    # when
    other = threading.Thread(target=again)
    with transaction() as db:
        ledger.reverse(db, frame, reason="first")
        other.start()
        until_blocked()
    other.join()

    # then
    assert len(refused) == 1
    assert [r.reason for r in ask("SELECT reason FROM reversals")] == ["first"]


def test_the_charge_of_a_reused_image_is_exported_and_taken_back_too(books: str) -> None:
    # given an image that was rendered, and reused at a price of its own
    price = {"method": "mpx_step", "rate": "0.0032", "currency": "USD", "reuse": "0.001"}
    models = Catalog([model("alpha", price=price)])
    with transaction() as db:
        pricing.sync(db, models)
    caller = account()
    submit(caller, 1, seed=7, reuse=True, models=models)
    settle(must_claim())
    second = submit(caller, 1, seed=7, reuse=True, models=models)
    assert statuses(second) == ["done"]

    # when
    done = reverse(ids.frame_id(second, 0))
    relay()

    # then
    assert done.amount == Decimal("0.001")
    entries, _, _ = exported(caller)
    assert [(e.method, e.amount) for e in entries if e.job_id == second] == [
        ("reuse", Decimal("0.001")),
        ("reuse", Decimal("-0.001")),
    ]
    assert view(caller, second).charged == 0


# ------------------------------------------------------------------------------------------------ export


def relay() -> None:
    with transaction() as db:
        events.relay(db)


def exported(caller: Caller, cursor: int = 0, limit: int = 1000) -> tuple[list[ledger.Entry], int, bool]:
    with transaction() as db:
        return ledger.export(db, caller.account_id, cursor=cursor, limit=limit)


def test_every_charge_and_reversal_is_exported_once_however_it_is_paged(books: str) -> None:
    # given two accounts' frames, done, failed and taken back
    caller, other = account(), account("other")
    job = submit(caller, 5)
    submit(other, 3)
    for _ in range(8):
        settle(must_claim(frames=1))
    reverse(ids.frame_id(job, 2))
    relay()

    # when
    found: list[ledger.Entry] = []
    cursor, more = 0, True
    while more:
        page, cursor, more = exported(caller, cursor, limit=2)
        found += page

    # then
    charged = [e.frame_id for e in found if not e.reversal]
    assert sorted(charged) == [ids.frame_id(job, k) for k in range(5)]
    assert [(e.frame_id, e.amount) for e in found if e.reversal] == [(ids.frame_id(job, 2), -FRAME)]
    assert [e.number for e in found] == sorted({e.number for e in found})
    assert exported(caller, cursor) == ([], cursor, False)


def test_an_export_does_not_pass_over_what_commits_late(books: str) -> None:
    # given a charge whose transaction began first and is still open
    caller = account()
    submit(caller, 2)
    early, late = must_claim(frames=1), must_claim(frames=1)
    with transaction() as db:
        settle(early, db=db)
        settle(late)
        relay()

        # when the export is taken up to now
        first, cursor, _ = exported(caller)
    relay()

    # then
    second, _, _ = exported(caller, cursor)
    assert [e.frame_id for e in first] == [late.frames[0].id]
    assert [e.frame_id for e in second] == [early.frames[0].id]


# ------------------------------------------------------------------------------------------------ hours


def hours(caller: Caller, **shift: float) -> list[ledger.HourlyLine]:
    now = datetime.now(UTC)
    with transaction() as db:
        return ledger.hourly(
            db, caller.account_id, since=now - timedelta(days=2), until=now + timedelta(hours=1)
        )


def test_hours_have_the_same_ids_whoever_asks_and_differ_by_what_they_count(books: str) -> None:
    # given charges of two models in one hour, and of one in the hour before
    caller, other = account(), account("other")
    hour = (datetime.now(UTC) - timedelta(hours=5)).replace(minute=0, second=0, microsecond=0)
    for owner, model_name, at in (
        (caller, "alpha", hour),
        (caller, "alpha", hour + timedelta(minutes=59)),
        (caller, "flat", hour),
        (caller, "alpha", hour - timedelta(minutes=1)),
        (other, "alpha", hour),
    ):
        job = submit(owner, 1, model=model_name)
        settle(must_claim(models=[model_name]))
        back_date(at, job=job)

    # then
    found = hours(caller)
    assert [(x.hour, x.model, x.frames, x.amount) for x in found] == [
        (hour - timedelta(hours=1), "alpha", 1, FRAME),
        (hour, "alpha", 2, 2 * FRAME),
        (hour, "flat", 1, Decimal("0.37")),
    ]
    assert [x.id for x in hours(caller)] == [x.id for x in found]
    assert len({x.id for x in (*found, *hours(other))}) == 4
    assert {x.id.version for x in found} == {5}


def test_an_hour_is_final_only_when_nothing_of_it_can_commit_any_more(books: str) -> None:
    # given a charge five hours ago, and one of now
    caller = account()
    job = submit(caller, 1)
    settle(must_claim())
    back_date(datetime.now(UTC) - timedelta(hours=5), job=job)
    submit(caller, 1)
    settle(must_claim())

    # then
    assert [x.final for x in hours(caller)] == [True, False]


def test_times_within_an_hour_cut_no_hour(books: str) -> None:
    # given charges at the start and at the end of an hour
    caller = account()
    hour = ledger.hour_of(datetime.now(UTC)) - timedelta(hours=5)
    for minute in (1, 59):
        job = submit(caller, 1)
        settle(must_claim())
        back_date(hour + timedelta(minutes=minute), job=job)
    half = timedelta(minutes=30)

    # when
    with transaction() as db:
        windows = [
            ledger.hourly(db, caller.account_id, since=since, until=until)
            for since, until in (
                (hour - half, hour + half),
                (hour + half, hour + 3 * half),
                (hour + half, hour + half),
            )
        ]

    # then calls that meet give it once, and whole
    assert [[(x.hour, x.frames, x.final) for x in lines] for lines in windows] == [[], [(hour, 2, True)], []]


def test_what_is_settled_reaches_no_further_than_the_oldest_open_transaction(books: str) -> None:
    with transaction() as db:
        began = db.scalars(text("SELECT now()")).one()
        with transaction() as other:
            settled_until = other.scalars(sql("settled_until")).one()

    assert settled_until == began - timedelta(minutes=1)


# ------------------------------------------------------------------------------------------------ counts


def test_folding_lowers_the_hold_and_changes_nothing_that_is_shown(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 6)
    for _ in range(3):
        settle(must_claim(frames=1))
    before = view(caller, job)
    assert one("SELECT count(*) FROM counts") == 3
    assert one("SELECT held FROM jobs") == 6 * FRAME

    # when
    with transaction() as db:
        folded = ledger.fold_counts(db)

    # then
    assert list(folded) == [job]
    assert one("SELECT count(*) FROM counts") == 1
    assert one("SELECT held FROM jobs") == 3 * FRAME
    assert view(caller, job) == before
    with transaction() as db:
        assert list(ledger.fold_counts(db)) == []


def test_a_fold_leaves_out_what_is_not_committed_and_loses_none_of_it(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 2)
    first, second = must_claim(frames=1), must_claim(frames=1)
    settle(first)

    # when
    with transaction() as db:
        settle(second, db=db)
        with transaction() as other:
            ledger.fold_counts(other)
        assert view(caller, job).done == 1

    # then
    assert (view(caller, job).done, view(caller, job).held) == (2, 0)
    with transaction() as db:
        ledger.fold_counts(db)
    assert (view(caller, job).done, one("SELECT held FROM jobs")) == (2, 0)


def test_a_settle_does_not_wait_for_a_fold(books: str) -> None:
    # given
    submit(account(), 3)
    first, second = must_claim(frames=1), must_claim(frames=1)
    settle(first)

    # when
    with transaction() as db, transaction() as other:
        ledger.fold_counts(db)
        other.execute(text("SET LOCAL lock_timeout = '1ms'"))
        settled = settle(second, db=other)

    # then
    assert len(settled.done) == 1


def test_two_folds_at_once_count_nothing_twice(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 4)
    settle(must_claim(frames=2))

    # when
    with transaction() as db, transaction() as other:
        ledger.fold_counts(db)
        settle(must_claim(frames=1))
        assert list(ledger.fold_counts(other)) == []

    # then
    with transaction() as db:
        ledger.fold_counts(db)
    assert (view(caller, job).done, one("SELECT held FROM jobs")) == (3, FRAME)


def test_two_that_settle_the_last_frames_of_a_job_at_once_each_free_their_part(books: str) -> None:
    caller = account()
    job = submit(caller, 2)
    first, second = must_claim(frames=1), must_claim(frames=1)

    with transaction() as db, transaction() as other:
        settle(first, db=db)
        settle(second, db=other)
    with transaction() as db:
        ledger.fold_counts(db)

    assert (view(caller, job).held, one("SELECT held FROM jobs")) == (0, 0)


def test_the_audit_finds_nothing_at_any_stage(books: str) -> None:
    caller = account()
    submit(caller, 5)
    assert violations() == []
    pack = must_claim()
    assert violations() == []
    settle(pack, pack.frames[:2])
    assert violations() == []
    with transaction() as db:
        ledger.fold_counts(db)
    assert violations() == []


@pytest.mark.parametrize("kept_in", ["outbox", "events"])
def test_the_audit_wants_one_event_for_each_charge_and_reversal_and_none_else(
    books: str, kept_in: str
) -> None:
    # given two charges, one of them taken back
    job = submit(account(), 3)
    pack = must_claim()
    settle(pack, pack.frames[:2])
    reverse(ids.frame_id(job, 0))
    if kept_in == "events":
        relay()
    numbers = "SELECT coalesce(max(number), 0) + 1 FROM events"
    copy = (
        "INSERT INTO outbox (account_id, job_id, frame_id, kind) SELECT account_id, job_id, frame_id, kind FROM outbox"
        if kept_in == "outbox"
        else f"INSERT INTO events SELECT ({numbers}), account_id, job_id, frame_id, kind, data, at FROM events"
    )
    first, open_one = ids.frame_id(job, 0), ids.frame_id(job, 2)
    breaks = {
        f"DELETE FROM {kept_in} WHERE kind = 'frame.done' AND frame_id = '{first}'": "charge without its event",
        f"DELETE FROM {kept_in} WHERE kind = 'usage.reversed'": "charge without its event",
        f"{copy} WHERE kind = 'frame.done' AND frame_id = '{first}'": "charge told of more than once",
        f"UPDATE {kept_in} SET frame_id = '{open_one}' WHERE frame_id = '{first}' AND kind = 'frame.done'":
            "event of a charge that was not made",
    }  # fmt: skip

    # then
    for statement, expected in breaks.items():
        with transaction() as db:
            db.execute(text(statement))
            assert expected in {v.violation for v in ledger.audit(db)}, statement
            db.rollback()


def test_what_was_detached_is_named_and_is_no_violation(books: str) -> None:
    # given a month of work on a statement that was closed, and some of it taken back later
    caller = account()
    for _ in range(2):
        job = submit(caller, 3)
        pack = must_claim()
        settle(pack)
    last_month = datetime.now(UTC).replace(day=1) - timedelta(days=3)
    back_date(last_month)
    ask("UPDATE jobs SET created_at = :at", at=last_month)
    with transaction() as db:
        statements.close_further(db, accounts.find(db, "acme"), last_month.date().replace(day=1))
    reverse(ids.frame_id(job, 0))
    with transaction() as db:
        ledger.fold_counts(db)
        events.relay(db)
    month = one("SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM')")
    with transaction() as db:
        assert (ledger.audit(db), ledger.unseen(db)) == ([], [])

    for tables in (["frames"], ["usage"], ["frames", "usage"]):
        with transaction() as db:
            for table in tables:
                db.execute(text(f"ALTER TABLE {table} DETACH PARTITION {table}_{month.replace('-', '_')}"))

            # when
            found, unseen = ledger.audit(db), ledger.unseen(db)
            db.rollback()

        # then
        assert found == []
        assert [u.what for u in unseen] == [f"{table} of {month}" for table in tables]
        assert all("2 jobs with 6 done frames" in u.detail for u in unseen)


def test_events_that_left_are_not_missed_but_later_ones_are(books: str) -> None:
    # given two charges of long ago and one of now, and that the events of the first left
    caller = account()
    for n in range(3):
        submit(caller, 1, seed=n)
        settle(must_claim())
    with transaction() as db:
        events.relay(db)
        first, second, _ = db.scalars(text("SELECT frame_id FROM usage ORDER BY frame_id")).all()
        db.execute(text("UPDATE events SET at = at - interval '2 hours' WHERE number <= 6"))
        db.execute(text("ALTER TABLE usage DISABLE TRIGGER USER"))
        db.execute(
            text("UPDATE usage SET at = at - interval '2 hours' WHERE frame_id IN (:a, :b)"),
            {"a": first, "b": second},
        )
        numbers = db.execute(
            text("SELECT number, frame_id FROM events WHERE kind = 'frame.done' ORDER BY number")
        ).all()
        db.execute(text("DELETE FROM events WHERE number <= :n"), {"n": numbers[0].number})

        # then
        assert ledger.audit(db) == []
        assert [u.what for u in ledger.unseen(db)] == ["events"]
        db.execute(text("DELETE FROM events WHERE number = :n"), {"n": numbers[2].number})
        assert [v.violation for v in ledger.audit(db)] == ["charge without its event"]
        db.rollback()


# ------------------------------------------------------------------------------------------------ images


def test_an_audit_of_images_finds_what_is_missing_or_other_than_booked(books: str, store_url: str) -> None:
    # given four images, of which one is lost and one was written over
    submit(account(), 4)
    pack = must_claim()
    settle(pack)
    store = open_store(store_url)
    keys = [s.key for s in stored(pack)]
    for frame, key in zip(pack.frames, keys, strict=True):
        store.put(key, frame.id.bytes, content_type="image/png")
    folder = Path(urlsplit(store_url).path)
    (folder / keys[1]).unlink()
    (folder / keys[3]).write_bytes(b"something else")

    # when
    with transaction() as db:
        images = ledger.images_after(db, 0, limit=10)
    found = ledger.audit_images(images, store)

    # then
    assert sorted((v.violation, v.detail) for v in found) == [
        ("image differs from its hash", keys[3]),
        ("image is not in the store", keys[1]),
    ]
    with transaction() as db:
        assert [i.key for i in ledger.images_after(db, images[1].id, limit=1)] == [images[2].key]


@pytest.mark.parametrize("seed", [None, 0, 1, 2**63 - 1])
def test_pages_of_images_have_each_of_them_once_in_whatever_order(books: str, seed: int | None) -> None:
    # given
    submit(account(), 10)
    while (pack := claim()) is not None:
        settle(pack)

    # when
    with transaction() as db:
        pages = [list(ledger.images_after(db, 0, limit=3, seed=seed))]
        while pages[-1]:
            pages.append(list(ledger.images_after(db, pages[-1][-1].id, limit=3, seed=seed)))

    # then
    found = [image.id for page in pages for image in page]
    assert [len(page) for page in pages] == [3, 3, 3, 1, 0]
    assert len(set(found)) == 10
    assert (found == sorted(found)) is (seed is None)


def test_a_store_that_is_away_is_not_taken_for_one_without_images(books: str, store_url: str) -> None:
    submit(account(), 1)
    settle(must_claim())

    class Away:
        def get(self, key: str) -> bytes:
            raise StorageAway(key=key)

    with transaction() as db:
        images = ledger.images_after(db, 0, limit=10)
    with pytest.raises(StorageAway):
        ledger.audit_images(images, Away())  # type: ignore[arg-type]
