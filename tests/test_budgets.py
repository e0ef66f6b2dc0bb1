"""Budgets: never above the limit, whatever comes at once; and what happens on the way there."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

import migrations
from farm import accounts, budgets, events, ids, jobs, ledger, pricing, submissions, sweep
from farm import db as farm_db
from farm.accounts import Caller, Role
from farm.api.app import create_app
from farm.budgets import Action, Period, Threshold, Use
from farm.catalog import catalog
from farm.db import engine, sql, transaction
from farm.errors import BudgetExceeded, Invalid
from farm.settings import settings
from farm.submissions import Submission
from tests.factories import (
    CATALOG,
    FRAME,
    account,
    ask,
    claim,
    fail,
    must_claim,
    one,
    settle,
    statuses,
    submission,
    submit,
    until_blocked,
    view,
)
from tests.test_cli import Command, command, farm, url  # noqa: F401 - fixtures


def limit(
    caller: Caller,
    frames: Decimal | int | str | None,
    *at: tuple[int, Action],
    key: UUID | None = None,
    period: Period = Period.MONTH,
) -> None:
    """A budget of so many frames."""
    with transaction() as db:
        row = accounts.find(db, caller.account)
        amount = None if frames is None else Decimal(frames) * FRAME
        budgets.put(db, row, amount, key=key, period=period, thresholds=[Threshold(p, a) for p, a in at])


def use(caller: Caller) -> Use:
    with transaction() as db:
        (found,) = budgets.every(db, caller.account_id)
    return found


def in_frames(amount: Decimal) -> Decimal:
    return amount / FRAME


def fold() -> None:
    """The sweep's share in it, and no more."""
    with transaction() as db:
        ledger.fold_counts(db)
    with transaction() as db:
        budgets.fold(db)


def render(frames: int | None = None) -> None:
    """Render everything that may be claimed, or so many frames in one pack."""
    if frames is not None:
        settle(must_claim(frames=frames))
        return
    while (pack := claim()) is not None:
        settle(pack)


def second_key(caller: Caller) -> Caller:
    with transaction() as db:
        key, _ = accounts.issue_key(db, accounts.find(db, caller.account))
        return Caller(caller.account_id, caller.account, caller.currency, key.id, Role.SUBMIT)


def kinds(caller: Caller) -> list[str]:
    """What was told of the account's budgets."""
    sweep.tidy()
    with transaction() as db:
        told = events.after(db, 0, account_id=caller.account_id)
    return [e.kind for e in told if e.job_id is None]


# ------------------------------------------------------------------------------------------------ admission


def test_what_fits_is_admitted_to_the_last_digit_and_no_more(books: str) -> None:
    # given
    caller = account()
    limit(caller, 3)

    # when
    submit(caller, 2)
    submit(caller, 1, seed=5)
    with pytest.raises(BudgetExceeded) as refused:
        submit(caller, 1, seed=6)

    # then
    assert refused.value.facts["needed"] == "0.0032"
    assert refused.value.facts["left"] == "0"
    assert refused.value.facts["limit"] == "0.0096"
    assert "the account's budget of 0.0096 USD a month" in str(refused.value)
    assert one("SELECT count(*) FROM jobs") == 2
    assert one("SELECT count(*) FROM frames") == 3
    assert in_frames(use(caller).held) == 3


def test_a_job_larger_than_what_is_left_is_told_how_much_that_is(books: str) -> None:
    caller = account()
    limit(caller, 5)
    submit(caller, 2)

    with pytest.raises(BudgetExceeded) as refused:
        submit(caller, 4)

    assert (refused.value.facts["needed"], refused.value.facts["left"]) == ("0.0128", "0.0096")


def test_a_large_job_is_refused_before_its_frames_are_stored(
    books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = account()
    limit(caller, 2)
    monkeypatch.setattr(submissions, "FORESEEN", 2)
    monkeypatch.setattr(submissions, "_copy_frames", lambda *_, **__: pytest.fail("frames are stored"))

    with pytest.raises(BudgetExceeded):
        submit(caller, 3)


def test_nothing_is_left_of_a_refused_job_and_its_idempotency_key_is_free(books: str) -> None:
    # given
    caller = account()
    limit(caller, 1)

    def send() -> UUID:
        with transaction() as db:
            return submissions.submit(
                db, caller, submission(count=2), idempotency_key="k", body_sha256=bytes(32), models=CATALOG
            )[0]

    with pytest.raises(BudgetExceeded):
        send()

    # then
    assert one("SELECT count(*) FROM idempotency_keys") == one("SELECT count(*) FROM outbox") == 0
    limit(caller, 2)
    assert send() == send()


def test_an_account_without_a_budget_takes_no_lock_and_has_no_limit(books: str) -> None:
    caller, other = account(), account("other")
    limit(other, 1)
    with transaction() as db:
        submit(caller, 2, db=db)
        alone = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'"
        assert db.scalar(text(alone)) == 0  # its lanes it shares

    submit(caller, 100, seed=9)


def test_a_second_admission_waits_for_the_first_and_sees_it(books: str) -> None:
    # given
    caller = account()
    limit(caller, 3)

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            submit(caller, 2, db=db)
            second = thread.submit(submit, caller, 2, seed=9)
            until_blocked()

        # then
        with pytest.raises(BudgetExceeded):
            second.result()
    assert one("SELECT count(*) FROM jobs") == 1


def test_a_first_admission_that_is_undone_leaves_room_for_the_second(books: str) -> None:
    caller = account()
    limit(caller, 2)

    with ThreadPoolExecutor(1) as thread:
        with transaction() as db:
            submit(caller, 2, db=db)
            second = thread.submit(submit, caller, 2, seed=9)
            until_blocked()
            db.rollback()

        second.result()
    assert in_frames(use(caller).held) == 2


def test_thirty_two_at_once_are_granted_exactly_the_limit(
    books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    monkeypatch.setenv("FARM_POOL_SIZE", "32")
    engine().dispose()
    settings.cache_clear()
    farm_db._engine.cache_clear()
    caller = account()
    limit(caller, 50)

    def one_after_the_other(client: int) -> int:
        granted = 0
        for n in range(4):
            try:
                submit(caller, 1, seed=100 * client + n)
            except BudgetExceeded:
                continue
            granted += 1
        return granted

    # when
    with ThreadPoolExecutor(32) as clients:
        granted = sum(clients.map(one_after_the_other, range(32)))

    # then
    assert granted == 50
    assert one("SELECT sum(held) FROM jobs") == 50 * FRAME


def test_a_key_has_a_budget_of_its_own_beside_the_accounts(books: str) -> None:
    # given
    caller = account()
    other = second_key(caller)
    limit(caller, 5)
    limit(caller, 2, key=caller.key_id)

    # then
    submit(caller, 2)
    with pytest.raises(BudgetExceeded, match="this API key's budget"):
        submit(caller, 1, seed=5)
    submit(other, 3, seed=6)
    with pytest.raises(BudgetExceeded, match="the account's budget"):
        submit(other, 1, seed=10)


def test_another_accounts_jobs_do_not_count(books: str) -> None:
    caller, other = account(), account("other")
    limit(caller, 1)

    submit(other, 50)

    submit(caller, 1)


def test_a_jobs_own_budget_is_the_most_it_may_cost(books: str) -> None:
    def send(budget: str) -> None:
        with transaction() as db:
            sent = Submission(spec={"prompt": "x", "model": "alpha", "count": 2}, budget=budget)
            submissions.submit(db, caller, sent, models=CATALOG)

    caller = account()
    send("0.0064")
    with pytest.raises(BudgetExceeded, match=r"costs up to 0\.0064 USD; its budget is 0\.0063"):
        send("0.0063")
    assert one("SELECT count(*) FROM jobs") == 1


# ------------------------------------------------------------------------------------------------ what counts


def test_what_is_held_becomes_what_is_spent(books: str) -> None:
    caller = account()
    limit(caller, 4)
    submit(caller, 3)
    render(2)

    fold()

    assert (in_frames(use(caller).spent), in_frames(use(caller).held)) == (2, 1)
    with pytest.raises(BudgetExceeded):
        submit(caller, 2, seed=9)
    submit(caller, 1, seed=9)


def test_before_the_sweep_has_folded_it_counts_as_held(books: str) -> None:
    caller = account()
    limit(caller, 3)
    submit(caller, 3)

    render()

    assert (in_frames(use(caller).spent), in_frames(use(caller).held)) == (0, 3)
    with pytest.raises(BudgetExceeded):
        submit(caller, 1, seed=9)


def test_failed_and_cancelled_frames_give_their_share_back(
    books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given one frame that fails and two that are cancelled
    monkeypatch.setenv("FARM_MAX_ATTEMPTS", "1")
    settings.cache_clear()
    caller = account()
    limit(caller, 3)
    submit(caller, 1)
    fail(must_claim())
    other = submit(caller, 2, seed=9)
    with transaction() as db:
        jobs.cancel(db, caller.account_id, other)

    # when
    sweep.tidy()
    sweep.tidy()

    # then
    assert (use(caller).spent, use(caller).held) == (0, 0)
    submit(caller, 3, seed=20)


def test_last_months_spending_is_no_matter_to_a_month_and_all_to_a_total(books: str) -> None:
    # given
    caller = account()
    submit(caller, 3)
    render()
    fold()
    ask("UPDATE tallies SET month = month - interval '1 month' WHERE month IS NOT NULL")

    # then
    limit(caller, 2)
    assert use(caller).spent == 0
    limit(caller, None)
    limit(caller, 2, period=Period.TOTAL)
    assert in_frames(use(caller).spent) == 3
    with pytest.raises(BudgetExceeded):
        submit(caller, 1, seed=9)


def test_what_was_charged_falls_into_the_month_of_its_usage(books: str) -> None:
    """A count has the time of the usage written with it: however late it is folded."""
    caller = account()
    submit(caller, 3)
    render()

    assert one("SELECT count(*) FROM counts AS c JOIN usage AS u ON u.at = c.at") == 3


def test_tallies_are_folded_to_a_row_a_key_and_month(books: str) -> None:
    caller = account()
    other = second_key(caller)
    limit(caller, 100)
    for n, who in enumerate((caller, other, caller, other)):
        submit(who, 2, seed=10 * n)
    render(3)

    fold()
    fold()

    assert one("SELECT count(*) FROM tallies") == one("SELECT count(*) FROM tallies WHERE folded") == 4
    assert (in_frames(use(caller).spent), in_frames(use(caller).held)) == (3, 5)


def test_no_code_path_can_change_a_hold_without_its_tally(books: str) -> None:
    caller = account()
    submit(caller, 3)

    with transaction() as db:
        db.execute(text("UPDATE jobs SET held = held / 3"))
        tallied = db.scalar(text("SELECT sum(held) FROM tallies"))
        db.rollback()

    assert tallied == FRAME


@pytest.mark.parametrize(
    ("change", "violation"),
    [
        ("UPDATE tallies SET held = held + 1 WHERE month IS NULL", "budgets count another hold"),
        ("DELETE FROM tallies WHERE month IS NOT NULL", "budgets count less than was charged"),
    ],
)
def test_the_audit_finds_tallies_that_are_wrong(books: str, change: str, violation: str) -> None:
    caller = account()
    submit(caller, 3)
    render(2)
    fold()

    with transaction() as db:
        db.execute(text(change))
        found = {v.violation for v in ledger.audit(db)}
        db.rollback()

    assert violation in found


def test_admission_reads_neither_jobs_nor_frames(books: str) -> None:
    caller = account()
    limit(caller, 10)

    with transaction() as db:
        statement = sql("budget_use").text
        plan = db.execute(
            text("EXPLAIN " + statement), {"accounts": [caller.account_id], "key": caller.key_id}
        ).scalars().all()  # fmt: skip

    lines = "\n".join(plan)
    assert "tallies_account_idx" in lines
    assert "jobs" not in lines
    assert "frames" not in lines


# ------------------------------------------------------------------------------------------------ thresholds


def test_notify_tells_once_and_admits_on(books: str) -> None:
    # given
    caller = account()
    limit(caller, 4, (50, Action.NOTIFY), (100, Action.NOTIFY))
    submit(caller, 2)
    assert kinds(caller) == []

    # when
    render()
    sweep.tidy()

    # then
    assert kinds(caller) == ["budget.notify"]
    assert [(t.percent, t.reached_at is not None) for t in use(caller).thresholds] == [
        (50, True),
        (100, False),
    ]
    submit(caller, 2, seed=9)
    assert kinds(caller) == ["budget.notify"]


def test_the_event_says_what_of_which_budget(books: str) -> None:
    caller = account()
    limit(caller, 4, (50, Action.NOTIFY), key=caller.key_id)
    submit(caller, 3)
    render()
    sweep.tidy()
    sweep.tidy()

    with transaction() as db:
        (event,) = [e for e in events.after(db, 0, account_id=caller.account_id) if e.job_id is None]
    month = event.data.pop("month")
    assert month == f"{event.at:%Y-%m}"
    assert event.data == {
        "percent": 50,
        "period": "month",
        "limit": "0.0128",
        "spent": "0.0096",
        "currency": "USD",
        "key": ids.public("key", caller.key_id),
    }


def test_stop_admits_nothing_more_from_its_threshold_on_even_before_the_sweep_has_seen_it(books: str) -> None:
    caller = account()
    limit(caller, 10, (20, Action.STOP))
    submit(caller, 2)
    submit(caller, 2, seed=9)
    render(2)
    fold()

    with pytest.raises(BudgetExceeded, match=r"20 % of the account's budget .* says to stop there"):
        submit(caller, 1, seed=20)

    render()  # what was admitted goes on


def test_drain_lets_what_runs_finish_and_holds_back_the_rest(books: str) -> None:
    # given a pack on a device while the threshold is reached
    caller, other = account(), account("other")
    limit(caller, 10, (10, Action.DRAIN))
    first = submit(caller, 1)
    render()
    job = submit(caller, 5, seed=9)
    pack = must_claim(frames=2)

    # when
    sweep.tidy()

    # then
    assert view(caller, job).status == "paused"
    assert claim() is None
    settle(pack)
    assert statuses(job).count("done") == 2
    assert view(caller, first).status == "finished"
    submit(other)  # nobody else is held back
    settle(must_claim())


def test_what_a_budget_paused_goes_on_when_there_is_room_again(books: str) -> None:
    # given a job paused by its budget and one by a person
    caller = account()
    limit(caller, 10, (10, Action.DRAIN))
    submit(caller, 1)
    by_budget, by_person = submit(caller, 2, seed=9), submit(caller, 2, seed=20)
    with transaction() as db:
        jobs.pause(db, caller.account_id, by_person)
    render(1)
    sweep.tidy()
    sweep.tidy()
    assert view(caller, by_budget).status == "paused"

    # when
    limit(caller, 1000, (10, Action.DRAIN))
    sweep.tidy()

    # then
    assert view(caller, by_budget).status == "queued"
    assert view(caller, by_person).status == "paused"
    render()
    assert view(caller, by_budget).status == "finished"
    with transaction() as db:
        jobs.resume(db, caller.account_id, by_person)


def test_a_new_month_lets_drained_jobs_go_on_and_reaches_thresholds_anew(books: str) -> None:
    # given
    caller = account()
    limit(caller, 10, (10, Action.NOTIFY), (10, Action.DRAIN))
    submit(caller, 3)
    render(1)
    sweep.tidy()
    assert kinds(caller) == ["budget.drain", "budget.notify"]

    # when
    ask("UPDATE tallies SET month = month - interval '1 month' WHERE month IS NOT NULL")
    ask("UPDATE budget_thresholds SET month = month - interval '1 month'")
    sweep.tidy()

    # then
    render(1)
    sweep.tidy()
    assert len(kinds(caller)) == 4


def test_a_held_back_job_is_not_resumed_by_hand(books: str) -> None:
    caller = account()
    limit(caller, 10, (10, Action.DRAIN))
    submit(caller, 1)
    job = submit(caller, 2, seed=9)
    render(1)
    sweep.tidy()

    with transaction() as db, pytest.raises(BudgetExceeded, match="holds its jobs back"):
        jobs.resume(db, caller.account_id, job)


def test_a_job_that_a_person_pauses_too_stays_paused(books: str) -> None:
    caller = account()
    limit(caller, 10, (10, Action.DRAIN))
    submit(caller, 1)
    job = submit(caller, 2, seed=9)
    render(1)
    sweep.tidy()
    with transaction() as db:
        jobs.pause(db, caller.account_id, job)

    limit(caller, None)
    sweep.tidy()

    assert view(caller, job).status == "paused"


def test_cancel_ends_what_is_queued_and_bills_what_runs(books: str) -> None:
    # given
    caller = account()
    limit(caller, 10, (10, Action.CANCEL))
    submit(caller, 1)
    render()
    job = submit(caller, 5, seed=9)
    pack = must_claim(frames=2)

    # when
    sweep.tidy()
    sweep.tidy()
    assert statuses(job).count("claimed") == 2
    settle(pack)
    sweep.tidy()
    sweep.tidy()

    # then
    seen = view(caller, job)
    assert (seen.status, seen.done, seen.cancelled, seen.charged) == ("cancelled", 2, 3, 2 * FRAME)
    sweep.tidy()
    assert (in_frames(use(caller).spent), use(caller).held) == (3, 0)


def test_a_budget_of_a_key_holds_back_that_keys_jobs_alone(books: str) -> None:
    caller = account()
    other = second_key(caller)
    limit(caller, 10, (10, Action.DRAIN), key=caller.key_id)
    mine, theirs = submit(caller, 2), submit(other, 2, seed=9)
    render(1)

    sweep.tidy()

    assert view(caller, mine).status == "paused"
    assert view(caller, theirs).status == "queued"


# ------------------------------------------------------------------------------------------------ to set


def test_setting_a_budget_anew_keeps_what_thresholds_were_told(books: str) -> None:
    caller = account()
    limit(caller, 4, (50, Action.NOTIFY))
    submit(caller, 2)
    render()
    sweep.tidy()

    limit(caller, 4, (50, Action.NOTIFY), (75, Action.STOP))

    assert kinds(caller) == ["budget.notify"]
    assert [t.action for t in use(caller).thresholds] == [Action.NOTIFY, Action.STOP]


def test_a_limit_below_what_is_gone_lets_nothing_in_and_shows_nothing_left(books: str) -> None:
    caller = account()
    submit(caller, 3)
    limit(caller, 1)

    assert in_frames(use(caller).left) == -2
    with pytest.raises(BudgetExceeded) as refused:
        submit(caller, 1, seed=9)
    assert refused.value.facts["left"] == "0"
    render()


def test_setting_a_budget_waits_for_an_admission_in_progress(books: str) -> None:
    caller = account()
    limit(caller, 5)

    with ThreadPoolExecutor(1) as thread:
        with transaction() as db:
            submit(caller, 5, db=db)
            lowered = thread.submit(limit, caller, 1)
            until_blocked()

        lowered.result()
    assert in_frames(use(caller).held) == 5


@pytest.mark.parametrize(
    ("facts", "field"),
    [
        ({"limit": Decimal("-1")}, "limit"),
        ({"limit": Decimal("0.0000000000001")}, "limit"),
        ({"limit": Decimal(10) ** 12}, "limit"),
        ({"key": uuid4()}, "key"),
        ({"thresholds": [Threshold(0, Action.STOP)]}, "thresholds[0].percent"),
        ({"thresholds": [Threshold(5, Action.STOP), Threshold(101, Action.STOP)]}, "thresholds[1].percent"),
        ({"thresholds": [Threshold(n + 1, Action.STOP) for n in range(21)]}, "thresholds"),
    ],
)
def test_a_budget_that_is_not_allowed_is_refused_by_its_field(
    books: str, facts: dict[str, Any], field: str
) -> None:
    caller = account()
    facts = {"limit": Decimal(1), **facts}
    with transaction() as db, pytest.raises(Invalid) as refused:
        budgets.put(db, accounts.find(db, caller.account), facts.pop("limit"), **facts)

    assert [f.field for f in refused.value.faults] == [field]
    assert one("SELECT count(*) FROM budgets") == 0


def test_the_database_keeps_a_key_from_another_accounts_budget(books: str) -> None:
    caller, other = account(), account("other")
    limit(caller, 1)

    with pytest.raises(IntegrityError, match="api_key_id"):
        ask("UPDATE budgets SET api_key_id = :key", key=other.key_id)


# ------------------------------------------------------------------------------------------------ over HTTP


@pytest.fixture
def keys(database: str) -> dict[str, str]:
    with transaction() as db:
        pricing.sync(db, catalog())
        acme, umbrella = accounts.create(db, "acme"), accounts.create(db, "umbrella")
        return {role.value: accounts.issue_key(db, acme, role=role)[1] for role in Role} | {
            "umbrella": accounts.issue_key(db, umbrella)[1]
        }


@pytest.fixture
def api(keys: dict[str, str]) -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {keys['admin']}"
        yield client


def as_(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_job_over_the_budget_is_answered_402_with_what_is_needed_and_left(
    api: TestClient, keys: dict[str, str]
) -> None:
    # given
    spec = {"spec": {"prompt": "a red circle", "count": 4}}  # 0.00025 each
    made = api.put("/v1/budget", json={"account": "umbrella", "limit": "0.0015"})
    assert made.status_code == 200, made.text
    assert api.post("/v1/jobs", json=spec, headers=as_(keys["umbrella"])).status_code == 202

    # when
    answer = api.post("/v1/jobs", json=spec, headers=as_(keys["umbrella"]))

    # then
    problem = answer.json()
    assert answer.status_code == problem["status"] == 402
    assert problem["type"] == "urn:farm:budget-exceeded"
    assert (problem["needed"], problem["left"], problem["currency"]) == ("0.001", "0.0005", "USD")
    assert "of the account's budget of 0.0015 USD a month 0.0005 are left" in problem["detail"]
    listed = api.get("/v1/jobs", headers=as_(keys["umbrella"])).json()["jobs"]
    assert len(listed) == 1
    (shown,) = api.get("/v1/budget", headers=as_(keys["umbrella"])).json()["budgets"]
    assert (shown["limit"], shown["spent"], shown["held"], shown["left"]) == (
        "0.0015",
        "0",
        "0.001",
        "0.0005",
    )


def test_a_budget_is_set_looked_at_and_taken_away(api: TestClient, keys: dict[str, str]) -> None:
    body = {"limit": "10", "period": "total", "thresholds": [{"percent": 80, "action": "notify"}]}
    made = api.put("/v1/budget", json=body).json()

    assert made["account"] == "acme"
    assert made["budgets"][0]["thresholds"] == [{"percent": 80, "action": "notify", "reached_at": None}]
    assert api.get("/v1/budget", headers=as_(keys["read"])).json() == made
    assert api.put("/v1/budget", json={"limit": None, "period": "total"}).json()["budgets"] == []


def test_a_keys_budget_is_shown_to_that_key_and_to_admins(api: TestClient, keys: dict[str, str]) -> None:
    mine = api.get("/v1/account", headers=as_(keys["submit"])).json()["key"]
    made = api.put("/v1/budget", json={"limit": "1", "key": mine})
    assert made.status_code == 200, made.text

    seen = {
        who: len(api.get("/v1/budget", headers=as_(keys[who])).json()["budgets"])
        for who in ("submit", "read", "admin")
    }
    assert seen == {"submit": 1, "read": 0, "admin": 1}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"limit": 1.5}, "limit"),
        ({"limit": "a lot"}, "limit"),
        ({}, "limit"),
        ({"limit": "1", "period": "week"}, "period"),
        ({"limit": "1", "key": "mine"}, "key"),
        ({"limit": "1", "thresholds": [{"percent": 80, "action": "panic"}]}, "thresholds[0].action"),
        ({"limit": "1", "thresholds": [{"percent": 800, "action": "stop"}]}, "thresholds[0].percent"),
        ({"limit": "1", "budget": 1}, "budget"),
    ],
)
def test_a_budget_that_cannot_be_set_names_the_field(
    api: TestClient, body: dict[str, Any], field: str
) -> None:
    answer = api.put("/v1/budget", json=body)

    assert answer.status_code == 422, answer.text
    assert [e["field"] for e in answer.json()["errors"]] == [field]


def test_only_admins_set_budgets_and_see_those_of_others(api: TestClient, keys: dict[str, str]) -> None:
    assert api.put("/v1/budget", json={"limit": "1"}, headers=as_(keys["submit"])).status_code == 403
    assert api.get("/v1/budget?account=acme", headers=as_(keys["umbrella"])).status_code == 404
    assert api.put("/v1/budget", json={"limit": "1", "account": "nobody"}).status_code == 404


def test_an_accounts_events_tell_of_its_budgets(api: TestClient, keys: dict[str, str]) -> None:
    api.put("/v1/budget", json={"limit": "0", "thresholds": [{"percent": 1, "action": "stop"}]})
    sweep.tidy()
    sweep.tidy()

    (event,) = api.get("/v1/events").json()["events"]
    assert (event["kind"], event["job"], event["number"]) == ("budget.stop", None, 1)
    assert api.get("/v1/events?after=1").json() == {"events": [], "next": 1}
    assert api.get("/v1/events", headers=as_(keys["umbrella"])).json()["events"] == []


# ------------------------------------------------------------------------------------------------ from the command line


def test_prices_budget_and_quotes_from_the_command_line(farm: Command) -> None:  # noqa: F811
    def said(*arguments: str) -> Any:
        ran = farm(*arguments, "--json")
        assert ran.code == 0, ran.err
        return json.loads(ran.out)

    assert said("prices", "set", "starter", "0.5", "--method", "image", "--account", "acme")["rate"] == "0.5"
    assert [p["rate"] for p in said("prices", "list") if p["account"] == "acme"] == ["0.5"]
    assert len(said("prices", "history", "starter")) == 3
    found = said("budget", "set", "acme", "1.25", "--at", "80:notify", "--at", "100:drain")
    assert [t["percent"] for t in found["budgets"][0]["thresholds"]] == [80, 100]
    quoted = said("submit", "a red circle", "--count", "2", "--quote")
    assert (quoted["amount"], quoted["frames"]) == ("1", 2)
    assert said("submit", "a red circle", "--count", "2", "--quoted", quoted["id"])["quoted"] == "1"
    assert said("budget", "show")["budgets"][0]["left"] == "0.25"
    assert (quoted["fits"], quoted["budgets"][0]["left"], quoted["budgets"][0]["refused"]) == (
        True,
        "1.25",
        None,
    )
    too_much = said("submit", "a red circle", "--quote")
    assert (too_much["fits"], too_much["budgets"][0]["needed"], too_much["budgets"][0]["left"]) == (
        False, "0.5", "0.25"
    )  # fmt: skip
    refused = farm("submit", "a red circle")
    assert refused.code == 1
    assert too_much["budgets"][0]["refused"] in refused.err
    assert (
        "this job costs up to 0.5 USD; of the account's budget of 1.25 USD a month 0.25 are left"
        in refused.err
    )
    assert farm("submit", "a red circle", "--budget", "0.4").code == 1
    for arguments in (
        ("prices", "list"), ("prices", "history"), ("budget", "show"), ("submit", "a circle", "--quote"),
        ("prices", "set", "starter", "1", "--from", "2031-01-01"), ("budget", "set", "acme", "none"),
    ):  # fmt: skip
        assert farm(*arguments).code == 0
    assert farm("budget", "set", "acme", "1", "--at", "soon").code != 0


@pytest.mark.parametrize("where", [(), ("--offline",)])
def test_prices_and_budgets_are_set_shown_and_withdrawn_with_and_without_an_api(
    farm: Command,  # noqa: F811
    where: tuple[str, ...],
) -> None:
    def said(*arguments: str) -> Any:
        ran = farm(*arguments, *where, "--json")
        assert ran.code == 0, ran.err
        return json.loads(ran.out)

    at = ("--from", "2031-01-01", "--account", "acme")
    planned = said("prices", "set", "starter", "0.5", "--method", "image", *at)
    assert (planned["account"], planned["starts_at"]) == ("acme", "2031-01-01T00:00:00Z")
    assert planned in said("prices", "list", "--account", "acme")
    assert said("prices", "withdraw", "starter", *at) == planned
    assert planned not in said("prices", "history", "starter", "--account", "acme")
    found = said("budget", "set", "acme", "1.25", "--at", "80:notify")
    assert (found["account"], found["budgets"][0]["limit"]) == ("acme", "1.25")
    assert said("budget", "show", "--account", "acme") == found
    for wrong, word in (
        (("prices", "withdraw", "starter", *at), "no price is planned"),
        (("prices", "withdraw", "starter", "--from", "2020-01-01"), "since"),
        (("prices", "withdraw", "starter", *at, "--method", "barter"), "method"),
        (("prices", "set", "starter", "a lot"), "rate"),
        (("budget", "set", "acme", "-1.5x"), "limit"),
        (("budget", "set", "nobody", "1"), "nothing here"),
    ):
        ran = farm(*wrong, *where)
        assert ran.code != 0
        assert word in ran.err, (wrong, ran.err)


# ------------------------------------------------------------------------------------------------ migrating


def test_a_farm_that_was_there_before_budgets_has_its_tallies_after_migrating(books: str) -> None:
    # given charges that were folded and others that were not, and holds of two keys
    caller = account()
    other = second_key(caller)
    submit(caller, 3)
    submit(other, 3, seed=9)
    render(2)
    fold()
    render(2)
    versions = Path(migrations.__file__).parent / "versions"
    start, end = "INSERT INTO tallies (account_id, api_key_id, held, folded)", "-- ----"
    statements = (versions / "0002_budgets.sql").read_text().split("END $$;")[1]
    statements = statements[statements.index(start) :].split(end)[0]
    start, end = "INSERT INTO tallies (account_id, api_key_id, open_frames)\nSELECT j", "CREATE INDEX"
    later = (versions / "0014_limits.sql").read_text()
    statements += later[later.index(start) :].split(end)[0]

    # when
    ask("DELETE FROM tallies")
    with psycopg.connect(books) as db:
        db.execute(statements)  # type: ignore[call-overload]
    sweep.tidy()

    # then
    limit(caller, 10)
    assert (in_frames(use(caller).spent), in_frames(use(caller).held)) == (4, 2)
