"""The ledger: what was used, and counts folded without anybody noticing."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import text

from farm import ledger, pricing
from farm.accounts import Caller
from farm.catalog import Catalog
from farm.db import transaction
from tests.factories import (
    FRAME,
    account,
    ask,
    model,
    must_claim,
    one,
    settle,
    submit,
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


def test_a_reversed_charge_is_taken_off(books: str) -> None:
    caller = account()
    submit(caller, 2)
    settle(must_claim())
    ask(
        "INSERT INTO usage (frame_id, entry, account_id, job_id, model, method, currency, price_id, rate, quantity,"
        " amount) SELECT frame_id, 1, account_id, job_id, model, method, currency, price_id, rate, quantity, -amount"
        " FROM usage ORDER BY frame_id LIMIT 1"
    )

    (line,) = lines(caller)

    assert (line.quantity, line.amount) == (512 * 512 * 4, FRAME)


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
