"""Reuse: equal frames of one account are rendered once, and the others are answered with that image."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from uuid import UUID

import pytest
from sqlalchemy.exc import IntegrityError

from farm import accounts, budgets, jobs, ledger, pricing, retention, reuse, submissions, sweep
from farm.accounts import Caller, Role
from farm.catalog import Catalog
from farm.db import transaction
from farm.errors import BudgetExceeded
from farm.tables import Account
from tests.factories import (
    CATALOG,
    FRAME,
    account,
    ask,
    claim,
    fail,
    lose,
    model,
    must_claim,
    one,
    release,
    settle,
    statuses,
    stored,
    submit,
    until_blocked,
    view,
    violations,
)

pytestmark = pytest.mark.usefixtures("books")


def again(caller: Caller, count: int = 1, **asked: object) -> UUID:
    """A job that takes images that are there, or are being made."""
    return submit(caller, count, reuse=True, **asked)  # type: ignore[arg-type]


def look() -> int:
    """Look at the waiting frames that are due."""
    with transaction() as db:
        return reuse.answer_waiters(db)


def verb(do: Callable[..., object], caller: Caller, job: UUID, *args: object) -> None:
    with transaction() as db:
        do(db, caller.account_id, job, *args)


def delete_images(caller: Caller, job: UUID) -> None:
    """Delete a job's images, as far as no other job has them."""
    with transaction() as db:
        retention.delete_images(db, caller.account_id, job)
    with transaction() as db:
        retention.clear(db)


def images(job: UUID) -> list[int | None]:
    return [r.image_id for r in ask("SELECT image_id FROM frames WHERE job_id = :job ORDER BY id", job=job)]


def priced(reused: str) -> Catalog:
    """The catalog, with a price for reusing alpha's images."""
    price = {"method": "mpx_step", "rate": "0.0032", "currency": "USD", "reuse": reused}
    return Catalog([model("alpha", price=price), *(m for m in CATALOG.values() if m.name != "alpha")])


# ------------------------------------------------------------------------------------------------ at once


def test_an_equal_frame_is_answered_at_once_with_the_stored_image() -> None:
    # given
    caller = account()
    first = again(caller, 2, seed=7)
    settle(must_claim())

    # when
    second = again(caller, 2, seed=7)

    # then
    assert claim() is None
    shown = view(caller, second)
    assert (shown.status, shown.done, shown.charged, shown.held) == ("finished", 2, 0, 0)
    assert (shown.reused, shown.waiting, view(caller, first).reused) == (2, 0, 0)
    assert images(second) == images(first)
    assert one("SELECT bool_and(reused) FROM frames WHERE job_id = :job", job=second)
    assert not one("SELECT bool_or(reused) FROM frames WHERE job_id = :job", job=first)
    events = ask("SELECT kind, data FROM outbox WHERE job_id = :job ORDER BY id", job=second)
    assert [e.kind for e in events] == ["job.accepted", "frame.done", "frame.done", "job.finished"]
    assert events[1].data == {"index": 0, "reused": True}


def test_only_what_is_not_there_is_rendered() -> None:
    # given
    caller = account()
    again(caller, 2, seed=7)
    settle(must_claim())

    # when
    job = again(caller, 4, seed=6)

    # then
    assert statuses(job) == ["queued", "done", "done", "queued"]
    assert view(caller, job).held == 2 * FRAME
    settle(must_claim())
    assert (view(caller, job).status, view(caller, job).charged) == ("finished", 2 * FRAME)


def test_a_reused_image_has_a_price_of_its_own() -> None:
    # given
    caller = account()
    with transaction() as db:
        pricing.sync(db, priced("0.0005"))
    again(caller)
    settle(must_claim())

    # when
    job = again(caller)

    # then
    assert view(caller, job).charged == Decimal("0.0005")
    with transaction() as db:
        lines = ledger.usage_lines(db, caller.account_id, job_id=job)
    assert [(n.method, n.quantity, n.amount) for n in lines] == [("reuse", 1, Decimal("0.0005"))]


def test_where_rendering_costs_less_it_is_rendered() -> None:
    # given
    caller = account()
    with transaction() as db:
        pricing.sync(db, priced("0.0033"))
    again(caller)
    settle(must_claim())

    # then
    assert statuses(again(caller)) == ["queued"]


def test_where_nobody_set_a_price_of_reuse_it_is_0() -> None:
    # given an account that pays in a currency for which there is a price of rendering alone
    with transaction() as db:
        made = accounts.create(db, "euro", currency="EUR")
        key, _ = accounts.issue_key(db, made)
        caller = Caller(made.id, made.name, made.currency, key.id, Role.SUBMIT)
        pricing.set_price(db, CATALOG, account=made, model="alpha", rate=Decimal("0.0030"), currency="EUR")
    again(caller)
    settle(must_claim())

    # then
    job = again(caller)
    assert (statuses(job), view(caller, job).charged) == (["done"], 0)


def test_a_job_that_opts_out_is_rendered_and_found_by_others() -> None:
    # given
    caller = account()
    again(caller)
    settle(must_claim())

    # when
    out = submit(caller, reuse=False)

    # then
    assert statuses(out) == ["queued"]
    settle(must_claim())
    assert view(caller, out).charged == FRAME
    assert images(again(caller)) == images(out)  # the newest


def test_what_was_drawn_at_random_neither_looks_nor_is_found() -> None:
    # given
    caller = account()
    drawn = again(caller, seed=None)
    settle(must_claim())
    seed = one("SELECT seed FROM frames WHERE job_id = :job", job=drawn)

    # then
    assert one("SELECT count(*) FROM known_images") == 0
    assert statuses(again(caller, seed=seed)) == ["queued"]
    assert statuses(again(caller, seed=None)) == ["queued"]


@pytest.mark.parametrize(
    "change", [{"prompt": "a blue circle"}, {"steps": 5}, {"format": "webp"}, {"seed": 1}]
)
def test_what_differs_is_rendered(change: dict[str, object]) -> None:
    # given
    caller = account()
    again(caller)
    settle(must_claim())

    # then
    assert statuses(again(caller, **change)) == ["queued"]


def test_another_accounts_image_is_nobodys() -> None:
    # given
    again(account("one"))
    settle(must_claim())

    # then
    assert statuses(again(account("other"))) == ["queued"]


def test_an_image_with_the_prompt_inside_does_not_answer_an_account_that_wants_none() -> None:
    # given an image that was made before the account changed its mind
    caller = account()
    again(caller)
    settle(must_claim())
    ask("UPDATE accounts SET prompt_in_images = true")

    # then
    assert statuses(again(caller)) == ["queued"]


def test_a_deleted_image_answers_nobody() -> None:
    # given
    caller = account()
    first = again(caller)
    settle(must_claim())
    delete_images(caller, first)

    # then
    assert statuses(again(caller)) == ["queued"]


def test_a_reused_image_stays_when_the_job_that_made_it_loses_its_own() -> None:
    # given
    caller = account()
    first = again(caller)
    settle(must_claim())
    second = again(caller)

    # when
    delete_images(caller, first)

    # then
    assert one("SELECT deleted_at FROM images") is None
    assert images(again(caller)) == images(second)


def test_a_charge_for_reuse_at_another_price_is_refused() -> None:
    # given
    caller = account()
    with transaction() as db:
        pricing.sync(db, priced("0.0005"))
    first = again(caller)
    second = again(caller)
    settle(must_claim())
    image = images(first)[0]
    forged = (
        "WITH done AS (UPDATE frames SET status = 'done', reused = true, image_id = :image, ended_at = now()"
        " WHERE job_id = :job RETURNING id, account_id, job_id)"
        " INSERT INTO usage (frame_id, account_id, job_id, model, method, currency, price_id, rate, quantity, amount)"
        " SELECT d.id, d.account_id, d.job_id, 'alpha', p.method, p.currency, p.id, p.rate, 1, p.rate"
        " FROM done AS d, prices AS p JOIN price_books AS b ON b.id = p.book_id"
        " WHERE b.model = 'alpha' AND p.method = 'reuse' AND p.rate = :rate"
    )

    # then: at the price before, and then at the one that was frozen
    with pytest.raises(IntegrityError, match="not done at that price"):
        ask(forged, job=second, image=image, rate=Decimal(0))
    look()
    assert view(caller, second).charged == Decimal("0.0005")


# ------------------------------------------------------------------------------------------------ waiting


def test_of_two_equal_frames_in_flight_the_later_waits_and_costs_the_price_of_reuse() -> None:
    # given
    caller = account()
    first, second = again(caller), again(caller)

    # when
    pack = must_claim(frames=8)
    look()

    # then
    assert [f.job_id for f in pack.frames] == [first]
    assert statuses(second) == ["waiting"]
    assert (view(caller, second).queued, view(caller, second).held) == (1, FRAME)
    settle(pack)
    look()
    assert statuses(second) == ["done"]
    assert images(second) == images(first)
    sweep.do(next(c for c in sweep.CHORES if c.name == "fold"))
    shown = view(caller, second)
    assert (shown.status, shown.charged, shown.held) == ("finished", 0, 0)


def test_equal_frames_of_one_job_are_rendered_once() -> None:
    # given
    caller = account()
    spec = {"prompt": "a red circle", "model": "alpha", "seed": 3}
    with transaction() as db:
        job, _ = submissions.submit(db, caller, submissions.Submission(specs=[spec] * 3), models=CATALOG)

    # then
    assert statuses(job) == ["queued", "waiting", "waiting"]
    shown = view(caller, job)
    assert (shown.queued, shown.waiting, shown.reused) == (3, 2, 0)
    settle(must_claim())
    look()
    assert statuses(job) == ["done"] * 3
    assert view(caller, job).charged == FRAME
    for _ in range(2):  # folded, and as it was
        shown = view(caller, job)
        assert (shown.done, shown.waiting, shown.reused) == (3, 0, 2)
        sweep.tidy()


@pytest.mark.parametrize("how", ["failed", "cancelled", "paused", "cancelled on the device"])
def test_a_waiter_is_rendered_if_the_earlier_will_not_be(how: str) -> None:
    # given
    caller = account()
    first, second, third = again(caller), again(caller), again(caller)

    # when
    match how:
        case "failed":
            for _ in range(3):
                fail(must_claim())
        case "cancelled on the device":
            pack = must_claim()
            verb(jobs.cancel, caller, first)
            assert settle(pack).done == frozenset()
        case "cancelled":
            verb(jobs.cancel, caller, first)
        case _:
            verb(jobs.pause, caller, first)
    look()

    # then one of the two is rendered, and the other waits for it
    assert (statuses(second), statuses(third)) == (["queued"], ["waiting"])
    pack = must_claim()
    assert [f.job_id for f in pack.frames] == [second]
    settle(pack)
    look()
    assert (statuses(second), statuses(third)) == (["done"], ["done"])
    assert view(caller, third).charged == 0
    sweep.tidy()


def test_what_a_lost_worker_had_is_still_waited_for() -> None:
    # given
    caller = account()
    first, second = again(caller), again(caller)

    # when
    lose(must_claim())
    look()

    # then
    assert (statuses(first), statuses(second)) == (["queued"], ["waiting"])
    settle(must_claim())
    look()
    assert statuses(second) == ["done"]


def test_an_urgent_frame_does_not_wait_for_a_less_urgent_one() -> None:
    caller = account()
    bulk = again(caller, priority="bulk")

    urgent = again(caller, priority="urgent")

    assert (statuses(bulk), statuses(urgent)) == (["queued"], ["queued"])
    later = again(caller, priority="standard")
    assert statuses(later) == ["waiting"]  # for the urgent one


def test_an_urgent_frame_waits_for_one_that_is_rendered_now_and_no_longer_if_that_comes_back() -> None:
    # given
    caller = account()
    again(caller, priority="bulk")
    pack = must_claim()
    urgent = again(caller, priority="urgent")
    assert statuses(urgent) == ["waiting"]

    # when
    release(pack)
    look()

    # then
    assert statuses(urgent) == ["queued"]
    assert [f.job_id for f in must_claim(frames=1).frames] == [urgent]


@pytest.mark.parametrize("which", ["waiter", "earlier"])
def test_a_change_of_priority_ends_a_waiting_that_would_hold_it_up(which: str) -> None:
    # given
    caller = account()
    first, second = again(caller), again(caller)

    # when
    verb(jobs.reprioritise, caller, *((second, 9) if which == "waiter" else (first, 1)))
    look()

    # then
    assert statuses(second) == ["queued"]


def test_a_waiting_frame_of_a_cancelled_job_is_cancelled_and_not_billed() -> None:
    # given
    caller = account()
    first, second = again(caller), again(caller)
    assert view(caller, second).waiting == 1
    verb(jobs.cancel, caller, second)
    assert view(caller, second).waiting == 0

    # when the earlier is done before the sweep gets to it
    settle(must_claim())
    look()
    for _ in range(2):  # end the frames, then the job
        sweep.tidy()

    # then
    shown = view(caller, second)
    assert (statuses(second), shown.status, shown.charged, shown.held) == (["cancelled"], "cancelled", 0, 0)
    assert view(caller, second).ended_at is not None
    assert view(caller, first).charged == FRAME


def test_a_paused_waiter_waits_for_whatever_there_is_and_comes_when_it_is_resumed() -> None:
    # given both jobs paused
    caller = account()
    first, second = again(caller), again(caller)
    for job in (first, second):
        verb(jobs.pause, caller, job)
    look()
    assert (statuses(first), statuses(second)) == (["queued"], ["waiting"])

    # when
    verb(jobs.resume, caller, second)
    look()

    # then
    assert [f.job_id for f in must_claim().frames] == [second]


def test_a_price_that_changes_does_not_touch_who_waits() -> None:
    # given
    caller = account()
    with transaction() as db:
        pricing.sync(db, priced("0.0001"))
    again(caller)
    second = again(caller)

    # when
    with transaction() as db:
        pricing.sync(db, priced("0.0002"))
    settle(must_claim())
    look()

    # then
    assert view(caller, second).charged == Decimal("0.0001")


def test_an_image_deleted_before_the_waiter_was_looked_at_is_made_anew() -> None:
    # given
    caller = account()
    first = again(caller)
    second = again(caller)
    settle(must_claim())
    delete_images(caller, first)

    # when
    look()

    # then
    assert statuses(second) == ["queued"]


def test_whoever_waits_for_what_was_settled_meanwhile_is_not_forgotten() -> None:
    # given a submission that found its equal on a device, and is not committed when that is settled and looked at
    caller = account()
    again(caller)
    pack = must_claim()
    with transaction() as db:
        second = submit(caller, reuse=True, db=db)
        settle(pack)
        look()

    # when
    assert statuses(second) == ["waiting"]
    look()

    # then
    assert statuses(second) == ["done"]


def test_of_two_submissions_at_once_the_later_waits() -> None:
    # given
    caller = account()
    with ThreadPoolExecutor(1) as other:
        with transaction() as db:
            first = submit(caller, reuse=True, db=db)

            # when
            coming = other.submit(again, caller)
            until_blocked()

        # then
        assert (statuses(first), statuses(coming.result())) == (["queued"], ["waiting"])


def test_many_that_wait_are_looked_at_a_part_at_a_time() -> None:
    # given
    caller = account()
    again(caller)
    waiting = [again(caller) for _ in range(5)]
    settle(must_claim())

    def part() -> int:
        with transaction() as db:
            reuse.answer_waiters(db, frames=2)
        return sum(statuses(job) == ["done"] for job in waiting)

    # then no row is done with before all of its frames were looked at
    assert [part(), part()] == [2, 4]
    assert violations() == []
    while one("SELECT count(*) FROM waiters_due"):
        part()
    assert part() == 5


def test_a_large_submission_leaves_what_is_known_to_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    # given
    monkeypatch.setattr(reuse, "AT_ONCE", 2)
    caller = account()
    again(caller, 3)
    settle(must_claim())

    # when
    job = again(caller, 3)

    # then
    assert statuses(job) == ["waiting"] * 3
    look()
    assert statuses(job) == ["done"] * 3


def test_a_job_that_only_waits_holds_up_no_claim() -> None:
    # given
    caller = account()
    again(caller)
    waiting = again(caller)

    # then its lane is not looked into
    assert one("SELECT bool_or(open) FROM job_lanes WHERE job_id = :job", job=waiting) is False
    pack = must_claim()
    assert claim() is None
    fail(pack)
    assert violations() == []


def test_frames_settled_twice_answer_a_waiter_once() -> None:
    # given
    caller = account()
    again(caller)
    second = again(caller)
    pack = must_claim()

    # when
    settle(pack)
    look()
    settle(pack)
    look()

    # then
    assert one("SELECT count(*) FROM usage WHERE job_id = :job", job=second) == 1


def test_an_image_two_frames_point_to_is_one_row() -> None:
    caller = account()
    again(caller)
    second = again(caller)
    pack = must_claim()
    settle(pack)
    look()

    assert one("SELECT count(*) FROM images") == 1
    assert one("SELECT key FROM images") == stored(pack)[0].key
    assert statuses(second) == ["done"]


def test_a_job_is_quoted_and_held_with_what_it_reuses() -> None:
    # given an account that has spent its budget on two images
    caller = account()
    again(caller, 2, seed=1)
    settle(must_claim())
    with transaction() as db:
        budgets.put(db, db.get_one(Account, caller.account_id), 2 * FRAME)

    # then what costs nothing is admitted, and what costs something is not
    job = again(caller, 2, seed=1)
    assert (view(caller, job).quoted, view(caller, job).status) == (0, "finished")
    with pytest.raises(BudgetExceeded):
        again(caller, 3, seed=1)
