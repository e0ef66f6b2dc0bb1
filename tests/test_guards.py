"""What the database refuses, whoever writes it."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from farm import jobs, ledger, queue
from farm.db import transaction
from tests.factories import (
    FRAME,
    account,
    ask,
    must_claim,
    one,
    settle,
    stored,
    submit,
    submit_keys,
)

CHARGE = (
    "INSERT INTO usage (frame_id, account_id, job_id, model, method, currency, price_id, rate, quantity, amount)"
    " SELECT f.id, f.account_id, f.job_id, 'alpha', p.method, p.currency, p.id, p.rate, f.quantity,"
    " f.quantity * p.rate * 0.00000095367431640625 FROM frames AS f JOIN prices AS p ON p.id = f.price_id"
)
IMAGE = (
    "INSERT INTO images (account_id, key, format, sha256, pixel_sha256, bytes, width, height) SELECT id,"
    " 'v1/' || replace(id::text, '-', '') || '/' || repeat('ab', 32) || '.png', 'png', decode(repeat('ab', 32), 'hex'),"
    " decode(repeat('cd', 32), 'hex'), 10, 64, 64 FROM accounts RETURNING id"
)
DONE = "UPDATE frames SET status = 'done', pack_id = NULL, image_id = (SELECT min(id) FROM images), ended_at = now()"


def refused(statement: str, by: str, **values: Any) -> None:
    """The statement is refused at once, by the constraint or trigger whose name or words these are."""
    with pytest.raises(DBAPIError, match=by), transaction() as db:
        db.execute(text(statement), values)


def refused_at_commit(act: Callable[[Session], object], by: str) -> None:
    """What was done stands until the commit, and is refused then."""
    with transaction() as db:
        act(db)
        with pytest.raises(DBAPIError, match=by):
            db.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))
        db.rollback()
    with pytest.raises(DBAPIError, match=by), transaction() as db:
        act(db)


@pytest.fixture
def job(books: str) -> UUID:
    """A job of two queued frames."""
    return submit(account(), 2)


@pytest.fixture
def settled(job: UUID) -> UUID:
    """A job of two frames, done and charged."""
    settle(must_claim())
    return job


# ------------------------------------------------------------------------------------------------ done is charged


def test_done_without_a_charge_is_refused(job: UUID) -> None:
    ask(IMAGE)

    refused(DONE, "done without a charge")


@pytest.mark.parametrize("status", ["done", "claimed"])
def test_a_frame_that_begins_in_the_middle_is_refused(job: UUID, status: str) -> None:
    settle(must_claim())
    facts = {
        "done": "NULL, (SELECT min(id) FROM images), now()",
        "claimed": "(SELECT min(id) FROM packs), NULL, NULL",
    }

    refused(
        "INSERT INTO frames (id, job_id, index, key_no, account_id, status, seed, work, quantity, price_id, pack_id,"
        " image_id, ended_at, fingerprint, spec) SELECT (left(id::text, 30) || '00ffff')::uuid, job_id, 9, key_no,"
        f" account_id, '{status}', seed, work, quantity, price_id, {facts[status]}, fingerprint, spec"
        " FROM frames WHERE index = 0",
        "a frame begins as queued",
    )


def test_a_charge_without_done_is_refused(job: UUID) -> None:
    refused(CHARGE, "which is not done at that price")


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_charge_for_a_frame_that_ended_otherwise_is_refused(job: UUID, status: str) -> None:
    reason = "'it would not render'" if status == "failed" else "NULL"
    ask(f"UPDATE frames SET status = '{status}', ended_at = now(), reason = {reason}")

    refused(CHARGE, "which is not done at that price")

    ask("INSERT INTO counts (job_id, failed) SELECT id, 2 FROM jobs")  # so that the audit finds nothing
    ask("UPDATE jobs SET held = 0")


def test_a_charge_of_another_quantity_than_was_admitted_is_refused(job: UUID) -> None:
    # given
    ask(IMAGE)
    dearer = CHARGE.replace("f.quantity", "2 * f.quantity")

    # then though it is the right amount for that quantity
    refused(f"WITH done AS ({DONE}) {dearer}", "which is not done at that price")


def test_a_charge_to_another_account_is_refused(job: UUID) -> None:
    account("other")
    other = "(SELECT id FROM accounts WHERE name = 'other')"
    ask(IMAGE.replace("FROM accounts", "FROM accounts WHERE name <> 'other'"))

    refused(
        f"WITH done AS ({DONE}) {CHARGE.replace('f.account_id', other)}", "which is not done at that price"
    )


def test_done_with_another_accounts_image_is_refused(job: UUID) -> None:
    account("other")
    ask(IMAGE.replace("FROM accounts", "FROM accounts WHERE name = 'other'"))

    refused(f"WITH done AS ({DONE}) {CHARGE}", "an image that is not its account's")


def test_claimed_by_a_pack_that_is_closed_is_refused(settled: UUID) -> None:
    submit(account("other"), 1)

    refused(
        "UPDATE frames SET status = 'claimed', pack_id = (SELECT id FROM packs) WHERE status = 'queued'",
        "claimed by a pack that is not open",
    )


def test_a_second_charge_is_refused(settled: UUID) -> None:
    refused(CHARGE, "usage_.*pkey")


def test_a_second_reversal_is_refused_and_the_first_is_not(settled: UUID) -> None:
    reverse = CHARGE.replace("(frame_id,", "(entry, frame_id,").replace("SELECT f.id", "SELECT 1, f.id")
    reverse = reverse.replace(" f.quantity * p.rate", " -1 * f.quantity * p.rate")

    refused_at_commit(lambda db: db.execute(text(reverse)), "reversed without a reason")
    with transaction() as db:
        reason = "INSERT INTO reversals (frame_id, account_id, reason) SELECT id, account_id, 'blurred' FROM frames"
        db.execute(text(reason))
        db.execute(text(reverse))
        db.execute(text("INSERT INTO outbox (account_id, job_id, frame_id, kind)"
                        " SELECT account_id, job_id, id, 'usage.reversed' FROM frames"))  # fmt: skip

    assert one("SELECT sum(amount) FROM usage") == 0
    refused(reverse, "usage_.*pkey")


def test_a_wrong_amount_is_refused(job: UUID) -> None:
    refused(CHARGE.replace("* 0.00000095367431640625", "* 0.000001"), "usage_check")
    refused(CHARGE.replace("f.quantity * p.rate", "-1 * f.quantity * p.rate"), "usage_check")


def test_another_rate_than_the_prices_is_refused(job: UUID) -> None:
    ask(IMAGE)

    refused(
        f"WITH done AS ({DONE}) {CHARGE.replace('p.rate', '(2 * p.rate)')}",
        "at another rate than its price's",
    )


def test_usage_is_neither_changed_nor_deleted(settled: UUID) -> None:
    changes = {
        "frame_id": "gen_random_uuid()",
        "entry": "1",
        "account_id": "gen_random_uuid()",
        "job_id": "gen_random_uuid()",
        "model": "'beta'",
        "method": "'image'",
        "currency": "'EUR'",
        "price_id": "price_id + 1",
        "rate": "2 * rate",
        "quantity": "1",
        "amount": "0",
        "pack_id": "4711",
        "at": "now() + interval '1 s'",
    }
    columns = ask("SELECT column_name FROM information_schema.columns WHERE table_name = 'usage'")
    assert {c.column_name for c in columns} == {*changes, "statement_line"}
    for column, value in changes.items():  # some break a check before
        refused(f"UPDATE usage SET {column} = {value}", "usage is append-only|usage_check|usage_.*_fkey")
    refused("UPDATE usage SET quantity = 2 * quantity, amount = 2 * amount", "usage is append-only")
    refused("DELETE FROM usage", "usage is append-only")


def test_usage_gets_its_statement_line_once(settled: UUID) -> None:
    refused("UPDATE usage SET statement_line = 1", "belongs on an open line")
    ask(
        "INSERT INTO statements (account_id, month, currency, digits)"
        " SELECT id, '2020-01-01', currency, 2 FROM accounts"
    )
    ask(
        "INSERT INTO statement_lines (statement_id, account_id, currency, model, method, rate, frames, reversed, late,"
        " quantity, exact) SELECT s.id, u.account_id, u.currency, u.model, u.method, u.rate, count(*), 0, 0,"
        " sum(u.quantity), sum(u.amount) FROM usage AS u, statements AS s GROUP BY 1, 2, 3, 4, 5, 6"
    )
    with transaction() as db:
        line = "UPDATE usage SET statement_line = (SELECT id FROM statement_lines)"
        db.execute(text(line))
        for other in ("2", "NULL"):
            with pytest.raises(DBAPIError, match="usage is append-only"), db.begin_nested():
                db.execute(text(f"UPDATE usage SET statement_line = {other}"))
        db.rollback()
    ask("TRUNCATE statement_lines, statements")  # so that the audit finds nothing


# ------------------------------------------------------------------------------------------------ prices


def test_a_price_never_changes(books: str) -> None:
    for change in (
        "rate = rate * 2",
        "book_id = (SELECT max(id) FROM price_books)",
        "valid = tstzrange(lower(valid) - interval '1 h', upper(valid))",
    ):
        refused(
            f"UPDATE prices SET {change} WHERE id = (SELECT min(id) FROM prices)", "a price never changes"
        )
    refused("DELETE FROM prices", "prices are kept")


def test_a_price_that_was_closed_stays_closed(books: str) -> None:
    ask("UPDATE prices SET valid = tstzrange(lower(valid), clock_timestamp())")

    refused("UPDATE prices SET valid = tstzrange(lower(valid), NULL)", "a price never changes")
    refused(
        "UPDATE prices SET valid = tstzrange(lower(valid), upper(valid) + interval '1 h')",
        "a price never changes",
    )


def test_two_prices_of_one_book_never_overlap(books: str) -> None:
    again = "INSERT INTO prices (book_id, method, currency, rate, valid) SELECT book_id, method, currency, 1,"

    refused(f"{again} valid FROM prices", "prices_.*excl")
    refused(f"{again} tstzrange(lower(valid) + interval '1 day', NULL) FROM prices", "prices_.*excl")


def test_a_price_that_frames_have_is_not_deleted_even_without_the_trigger(job: UUID) -> None:
    with transaction() as db:
        db.execute(text("ALTER TABLE prices DISABLE TRIGGER prices_kept"))
        with pytest.raises(IntegrityError, match="frames_price_id_fkey"):
            db.execute(text("DELETE FROM prices"))
        db.rollback()


# ------------------------------------------------------------------------------------------------ frames


@pytest.mark.parametrize("status", ["queued", "claimed", "failed", "cancelled", "rejected"])
def test_a_frame_that_is_done_stays_done(settled: UUID, status: str) -> None:
    refused(f"UPDATE frames SET status = '{status}'", "a frame that ended stays as it is")


def test_a_frame_that_was_cancelled_or_failed_stays_so(job: UUID) -> None:
    with transaction() as db:
        db.execute(text("UPDATE frames SET status = 'cancelled', ended_at = now() WHERE index = 0"))
        db.execute(
            text("UPDATE frames SET status = 'failed', ended_at = now(), reason = 'x' WHERE index = 1")
        )
        for index, status in ((0, "queued"), (0, "failed"), (1, "queued"), (1, "cancelled")):
            with pytest.raises(IntegrityError, match="stays as it is"), db.begin_nested():
                db.execute(text(f"UPDATE frames SET status = '{status}' WHERE index = {index}"))
        db.rollback()


@pytest.mark.parametrize(
    "change",
    [
        "status = 'claimed'",
        "pack_id = (SELECT max(id) FROM packs)",
        "status = 'done', ended_at = now()",
        "image_id = (SELECT max(id) FROM images)",
        "status = 'failed', ended_at = now()",
        "reason = 'for nothing'",
        "status = 'cancelled'",
        "ended_at = now()",
        "status = 'lost'",
        "attempts = -1",
        "seed = -1",
        "work = 0",
        "quantity = 0",
        "fingerprint = '\\x00'",
        "job_id = gen_random_uuid()",
        "key_no = 7",
        "account_id = gen_random_uuid()",
        "price_id = 999",
    ],
)
def test_a_wrong_state_of_a_frame_cannot_be_stored(job: UUID, change: str) -> None:
    # given a pack and an image that the change may name
    ask(IMAGE)
    must_claim(frames=1)

    refused(f"UPDATE frames SET {change} WHERE index = 1", "violates (check|foreign key) constraint")


def test_claimed_without_a_pack_is_refused(job: UUID) -> None:
    must_claim(frames=1)

    refused("UPDATE frames SET pack_id = NULL WHERE index = 0", "frames_check")


def test_two_frames_of_a_job_have_different_ids(job: UUID) -> None:
    refused("UPDATE frames SET id = (SELECT id FROM frames WHERE index = 1)", "pkey")


# ------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("repeat('ab', 32) || '.png'", "repeat('00', 32) || '.png'"),
        ("replace(id::text, '-', '')", "repeat('0', 32)"),
        ("'.png'", "'.webp'"),
        ("'v1/'", "'v2/'"),
        ("decode(repeat('ab', 32), 'hex')", "decode(repeat('ab', 16), 'hex')"),
        ("decode(repeat('cd', 32), 'hex')", "decode(repeat('cd', 16), 'hex')"),
        ("10, 64", "0, 64"),
    ],
    ids=["hash", "account", "extension", "version", "short hash", "short pixel hash", "no bytes"],
)
def test_an_images_key_names_its_account_and_its_hash(job: UUID, old: str, new: str) -> None:
    assert old in IMAGE

    refused(IMAGE.replace(old, new, 1), "images_.*check")


def test_the_key_a_worker_tells_must_be_of_the_frames_account(job: UUID) -> None:
    # given an image under another account's key
    other = account("other")
    pack = must_claim()
    theirs = stored(pack)[0]
    foreign = type(theirs)(
        **{
            **{name: getattr(theirs, name) for name in theirs.__slots__},
            "key": theirs.key.replace(pack.frames[0].account_id.hex, other.account_id.hex),
        }
    )

    # then
    with pytest.raises(IntegrityError, match="images_check"), transaction() as db:
        queue.settle(db, [foreign])


# ------------------------------------------------------------------------------------------------ jobs and lanes


@pytest.mark.parametrize("verb", [jobs.pause, jobs.cancel, jobs.resume])
def test_a_jobs_places_in_lanes_follow_it(books: str, verb: Callable[..., object]) -> None:
    # given
    caller = account()
    job = submit_keys(caller, [4, 5])

    # when
    with transaction() as db:
        verb(db, caller.account_id, job)

    # then
    assert one(
        "SELECT bool_and(jl.runnable = j.runnable) FROM job_lanes AS jl JOIN jobs AS j ON j.id = jl.job_id"
    )
    with transaction() as db:
        if verb is not jobs.cancel:
            jobs.reprioritise(db, caller.account_id, job, 8)
    assert one(
        "SELECT bool_and(jl.priority = j.priority) FROM job_lanes AS jl JOIN jobs AS j ON j.id = jl.job_id"
    )


def test_a_place_in_a_lane_cannot_differ_from_its_job(job: UUID) -> None:
    for change in ("priority = 9", "runnable = false", "account_id = gen_random_uuid()"):
        refused(f"UPDATE job_lanes SET {change}", "foreign key")


@pytest.mark.parametrize(
    "change",
    [
        "runnable = false",
        "status = 'paused'",
        "status = 'finished', runnable = false",
        "ended_at = now()",
        "priority = 10",
        "priority = -1",
        "frames = 0",
        "held = quoted + 1",
        "held = -1",
        "currency = 'EUR'",
        "name = ''",
        "status = 'lost'",
    ],
)
def test_a_wrong_state_of_a_job_cannot_be_stored(job: UUID, change: str) -> None:
    refused(f"UPDATE jobs SET {change}", "violates (check|foreign key) constraint")


def test_a_job_that_ended_stays_as_it_is(settled: UUID) -> None:
    refused("UPDATE jobs SET status = 'active', runnable = true, ended_at = NULL", "a job that ended stays")


def test_a_job_that_was_cancelled_stays_so(books: str) -> None:
    caller = account()
    job = submit(caller)
    with transaction() as db:
        jobs.cancel(db, caller.account_id, job)

    refused("UPDATE jobs SET status = 'active', runnable = true", "a job that ended stays")


def test_a_jobs_id_leaves_room_for_its_frames(job: UUID) -> None:
    copy = (
        "INSERT INTO jobs (id, account_id, status, priority, runnable, frames, currency, quoted, held)"
        " SELECT (left(id::text, 30) || '000001')::uuid, account_id, status, priority, runnable, frames, currency,"
        " quoted, held FROM jobs"
    )

    refused(copy, "jobs_id_check")


def test_one_key_stands_once_in_a_job(books: str) -> None:
    submit_keys(account(), [4, 5])

    refused("UPDATE job_keys SET call_key = 'the same'", "job_keys_job_id_call_key_rest_key")


@pytest.mark.parametrize(
    "change", ["closed_at = now()", "outcome = 'lost'", "frames = 0", "work = 0", "gpu_ms = -1"]
)
def test_a_wrong_state_of_a_pack_cannot_be_stored(job: UUID, change: str) -> None:
    must_claim()

    refused(f"UPDATE packs SET {change}", "packs_.*check")


def test_an_accounts_weight_and_currency_are_checked(job: UUID) -> None:
    refused("UPDATE accounts SET weight = 0", "accounts_weight_check")
    refused("UPDATE accounts SET weight = 1001", "accounts_weight_check")
    refused("UPDATE accounts SET currency = 'EUR'", "foreign key")
    refused("UPDATE accounts SET name = 'Not Allowed'", "accounts_name_check")


def test_an_account_with_jobs_is_not_deleted(job: UUID) -> None:
    refused("DELETE FROM accounts", "foreign key")


def test_the_books_show_what_the_guards_let_through(settled: UUID) -> None:
    """The audit can fail: each line finds what is broken on purpose, with the guards switched off."""
    breaks = {
        "DELETE FROM usage": {"done without a charge"},
        "UPDATE usage SET quantity = quantity * 2, amount = amount * 2": {
            "charge differs from the frozen price"
        },
        "UPDATE frames SET status = 'cancelled', image_id = NULL": {"charge without a done frame"},
        "DELETE FROM counts": {"counts differ from frames"},
        f"UPDATE jobs SET quoted = 1, held = {FRAME}": {"hold below what open frames need"},
        "UPDATE jobs SET quoted = 1, held = 1": {"hold above it at rest"},
        "UPDATE frames SET status = 'queued', image_id = NULL, ended_at = NULL": {
            "ended job with open frames",
            "queued frame behind a closed key or lane",
        },
        "UPDATE frames SET status = 'claimed', pack_id = (SELECT id FROM packs), image_id = NULL, ended_at = NULL": {
            "closed pack with frames"
        },
    }
    for statement, expected in breaks.items():
        with transaction() as db:
            for table in ("usage", "frames", "jobs"):
                db.execute(text(f"ALTER TABLE {table} DISABLE TRIGGER USER"))
            db.execute(text(statement))
            found = {v.violation for v in ledger.audit(db)}
            db.rollback()
        assert expected <= found, statement
