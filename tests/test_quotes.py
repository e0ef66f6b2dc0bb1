"""Quotes: the cost to the last digit, prices that stay, and when it may be done."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient

from farm import accounts, ids, pricing, quotes, submissions
from farm.accounts import Caller, Role
from farm.api.app import create_app
from farm.catalog import Method, catalog
from farm.db import transaction
from farm.errors import BudgetExceeded, Gone, Invalid, NotFound
from farm.quotes import Quoted
from farm.submissions import Submission
from tests.factories import (
    CATALOG,
    FRAME,
    account,
    add_worker,
    ask,
    claim,
    must_claim,
    one,
    settle,
    submission,
    submit,
    until_blocked,
    view,
)

SPEC = {"prompt": "a red circle", "model": "alpha", "seed": 0}


def quote(caller: Caller, count: int = 1, *, priority: int = 5, **spec: Any) -> Quoted:
    with transaction() as db:
        sent = submission(priority=priority, count=count, **spec)
        return submissions.quote(db, caller, sent, models=CATALOG)


def against(caller: Caller, quoted: Quoted | str, count: int = 1, **facts: Any) -> UUID:
    """Submit a job against a quote."""
    name = quoted if isinstance(quoted, str) else ids.public("quo", quoted.id)
    sent = Submission(spec={**SPEC, "count": count, **facts.pop("spec", {})}, quote=name, **facts)
    with transaction() as db:
        return submissions.submit(db, caller, sent, models=CATALOG)[0]


def dearer() -> None:
    with transaction() as db:
        pricing.set_price(db, CATALOG, account=None, model="alpha", rate=Decimal(1))


def took(pack_ms: int, *, model: str = "alpha") -> None:
    """Say that the packs of this model were so long on the device."""
    ask("UPDATE packs SET gpu_ms = :ms WHERE model = :model", ms=pack_ms, model=model)


# ------------------------------------------------------------------------------------------------ cost


def test_a_quote_says_frames_and_cost_to_the_last_digit_by_model(books: str) -> None:
    specs = [
        {**SPEC, "count": 3, "width": 520, "height": 512},
        {**SPEC, "model": "flat", "count": 2},
        {**SPEC, "count": 1},
    ]
    with transaction() as db:
        quoted = submissions.quote(db, account(), Submission(specs=specs), models=CATALOG)

    alpha, flat = quoted.parts
    assert (alpha.frames, alpha.quantity) == (4, 3 * 520 * 512 * 4 + 512 * 512 * 4)
    assert (flat.rate.method, flat.quantity, flat.amount) == (Method.IMAGE, 2, Decimal("0.74"))
    assert quoted.frames == 6
    assert quoted.amount == alpha.amount + flat.amount
    assert pricing.shown(alpha.amount) == "0.01295"


def test_a_quote_stores_no_job_and_holds_nothing(books: str) -> None:
    caller = account()

    quote(caller, 3)

    assert one("SELECT count(*) FROM jobs") == 0
    assert one("SELECT coalesce(sum(held), 0) FROM tallies") == 0


def test_a_job_against_a_quote_costs_what_was_quoted_whatever_prices_are_by_then(books: str) -> None:
    # given
    caller = account()
    quoted = quote(caller, 2)
    dearer()

    # when
    job = against(caller, quoted, 2)
    while (pack := claim()) is not None:
        settle(pack)

    # then
    assert view(caller, job).quoted == quoted.amount == 2 * FRAME
    assert view(caller, job).charged == 2 * FRAME
    assert one("SELECT job_id FROM quotes") == job
    assert view(caller, submit(caller, 2, seed=7)).quoted == 2 * 1 * 1


def test_the_seed_the_name_and_the_priority_are_free_to_differ(books: str) -> None:
    caller = account()

    job = against(caller, quote(caller), spec={"seed": 99}, name="another", priority=9)

    assert view(caller, job).quoted == FRAME


def test_specs_one_by_one_are_as_good_as_counted(books: str) -> None:
    caller = account()
    quoted = quote(caller, 2)
    with transaction() as db:
        sent = Submission(specs=[SPEC, SPEC], quote=ids.public("quo", quoted.id))
        job = submissions.submit(db, caller, sent, models=CATALOG)[0]

    assert view(caller, job).quoted == quoted.amount


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    "change", [{"count": 3}, {"steps": 5}, {"width": 520}, {"model": "beta"}, {"prompt": "a blue circle"}]
)
def test_a_job_that_asks_for_something_else_is_refused_and_the_quote_is_good_still(
    books: str, change: dict[str, Any]
) -> None:
    # given
    caller = account()
    quoted = quote(caller, 2)

    # when
    with pytest.raises(Invalid, match=r"quote: .* made for other specs"):
        against(caller, quoted, 2, spec=change)

    # then
    assert one("SELECT count(*) FROM jobs") == 0
    against(caller, quoted, 2)


def test_a_quote_is_good_for_one_job(books: str) -> None:
    caller = account()
    quoted = quote(caller)
    job = against(caller, quoted)

    with pytest.raises(Gone, match="a job was submitted") as refused:
        against(caller, quoted)

    assert refused.value.facts["job"] == ids.public("job", job)
    assert one("SELECT count(*) FROM jobs") == 1


def test_of_two_that_use_a_quote_at_once_one_gets_it(books: str) -> None:
    caller = account()
    quoted = quote(caller)
    sent = Submission(spec=SPEC, quote=ids.public("quo", quoted.id))

    with ThreadPoolExecutor(1) as thread:
        with transaction() as db:
            submissions.submit(db, caller, sent, models=CATALOG)
            second = thread.submit(against, caller, quoted)
            until_blocked()

        with pytest.raises(Gone):
            second.result()


def test_a_quote_expires(books: str) -> None:
    caller = account()
    quoted = quote(caller)
    ask(
        "UPDATE quotes SET created_at = created_at - interval '1 h', expires_at = expires_at - interval '1 h'"
    )

    with pytest.raises(Gone, match="has expired"):
        against(caller, quoted)

    assert one("SELECT count(*) FROM jobs") == 0


def test_another_accounts_quote_is_not_found(books: str) -> None:
    quoted = quote(account())

    with pytest.raises(NotFound):
        against(account("other"), quoted)


@pytest.mark.parametrize("name", ["quo_", "job_" + "0" * 32, "quo_" + "0" * 32, "x"])
def test_an_id_that_is_no_quotes_is_not_found(books: str, name: str) -> None:
    with pytest.raises(NotFound):
        against(account(), name)


def test_a_quote_above_the_jobs_own_budget_is_refused(books: str) -> None:
    caller, sent = account(), Submission(spec={**SPEC, "count": 2}, budget="0.0063")

    with transaction() as db, pytest.raises(BudgetExceeded):
        submissions.quote(db, caller, sent, models=CATALOG)

    assert one("SELECT count(*) FROM quotes") == 0


def test_an_expired_quote_is_dropped_a_day_later_and_a_used_one_stays(books: str) -> None:
    # given
    caller = account()
    used, old = quote(caller), quote(caller)
    against(caller, used)
    quote(caller)
    ask(
        "UPDATE quotes SET created_at = created_at - interval '2 days', expires_at = expires_at - interval '2 days'"
        " WHERE id = ANY(:ids)",
        ids=[used.id, old.id],
    )

    # when
    with transaction() as db:
        assert quotes.forget(db) == 1

    # then
    assert one("SELECT count(*) FROM quotes WHERE id = :id", id=used.id) == 1


# ------------------------------------------------------------------------------------------------ when


def test_nothing_is_expected_where_nothing_was_measured(books: str) -> None:
    add_worker("w", "alpha", "beta")

    quoted = quote(account())

    assert (quoted.starts, quoted.ends) == (None, None)


def test_nothing_is_expected_where_no_worker_is(books: str) -> None:
    caller = account()
    submit(caller)
    settle(must_claim())
    took(1000)

    assert quote(caller).starts is None


def test_start_and_end_follow_from_the_queue_and_the_pace_of_the_last_hour(books: str) -> None:
    # given packs of 4 frames that took 2 s, two workers, and 12 frames in front
    caller = account()
    submit(caller, 4)
    settle(must_claim())
    took(2000)
    add_worker("one", "alpha", "beta", "flat", "flux")
    add_worker("two", "alpha", "beta", "flat", "flux")
    submit(account("other"), 12, seed=100)
    submit(account("bulk"), 40, priority=1, seed=200)

    # when
    quoted = quote(caller, 8, seed=300)

    # then: 12 frames at half a second by two, and as long for 8
    assert quoted.starts is not None
    assert quoted.ends is not None
    now = quoted.expires_at - timedelta(seconds=900)
    assert abs((quoted.starts - now).total_seconds() - 3) < 1
    assert quoted.ends - quoted.starts == timedelta(seconds=2)


def expected_wait(caller: Caller) -> float:
    """Seconds until a job of one frame is expected to start."""
    quoted = quote(caller, seed=999)
    assert quoted.starts is not None
    return (quoted.starts - (quoted.expires_at - timedelta(seconds=900))).total_seconds()


def half_a_second_a_frame(*models: str) -> None:
    """Let a frame of 512 × 512 in 4 steps have taken half a second of late, and one worker be there."""
    caller = account("before")
    for name in models:
        submit(caller, 4, model=name)
        settle(must_claim(models=[name]))
        took(2000, model=name)
    add_worker("one", *models)


def test_what_is_ahead_counts_by_its_work(books: str) -> None:
    # given two frames of four times the pixels and five times the steps, and a job of sizes that take turns
    caller = account()
    half_a_second_a_frame("alpha")
    submit(account("large"), 2, width=1024, height=1024, steps=20, seed=100)
    large = expected_wait(caller)
    with transaction() as db:
        specs = [{**SPEC, "steps": 4 if n % 2 else 8, "seed": n} for n in range(400)]
        submissions.submit(db, account("both"), Submission(specs=specs, reuse=False), models=CATALOG)

    # then
    assert abs(large - 2 * 4 * 5 * 0.5) < 1
    assert abs(expected_wait(caller) - large - 400 * 1.5 * 0.5) < 20


def test_a_job_of_several_models_counts_by_its_keys(books: str) -> None:
    # given
    caller = account()
    half_a_second_a_frame("alpha", "beta")
    specs = [{**SPEC, "count": 3}, {**SPEC, "count": 2, "steps": 8}, {**SPEC, "model": "beta", "count": 5}]
    with transaction() as db:
        submissions.submit(db, account("both"), Submission(specs=specs, reuse=False), models=CATALOG)

    # then
    assert abs(expected_wait(caller) - (3 + 2 * 2 + 5) * 0.5) < 0.5


def test_what_is_on_a_device_counts_half_whatever_its_priority(books: str) -> None:
    # given a job of 8 frames less urgent, of which 4 are on a device
    caller = account()
    half_a_second_a_frame("alpha")
    submit(account("bulk"), 8, priority=1, seed=100)
    must_claim(frames=4)

    # then
    assert abs(expected_wait(caller) - 4 * 0.5 / 2) < 0.5


def test_what_waits_for_an_equal_frame_is_no_work(books: str) -> None:
    # given
    caller = account()
    half_a_second_a_frame("alpha")
    with transaction() as db:
        sent = Submission(specs=[{**SPEC, "prompt": "a dog"}] * 20, reuse=True)
        submissions.submit(db, account("same"), sent, models=CATALOG)

    # then
    assert one("SELECT count(*) FROM frames WHERE status = 'waiting'") == 19
    assert abs(expected_wait(caller) - 0.5) < 0.5


def test_one_pack_is_one_workers_work(books: str) -> None:
    caller = account()
    submit(caller, 4)
    settle(must_claim())
    took(2000)
    add_worker("one", "alpha")
    add_worker("two", "alpha")

    quoted = quote(caller, 4, seed=300)

    assert quoted.starts is not None
    assert quoted.ends is not None
    assert quoted.ends - quoted.starts == timedelta(seconds=2)


def test_what_was_rendered_more_than_an_hour_ago_says_nothing(books: str) -> None:
    caller = account()
    submit(caller)
    settle(must_claim())
    took(1000)
    add_worker("one", "alpha")
    ask("UPDATE packs SET id = id - (CAST(3601 AS bigint) * 1000000 << 12)")
    try:
        assert quote(caller).starts is None
    finally:
        ask("UPDATE packs SET id = id + (CAST(3601 AS bigint) * 1000000 << 12)")


# ------------------------------------------------------------------------------------------------ over HTTP


def test_a_quote_and_the_job_against_it_over_http(database: str) -> None:
    with transaction() as db:
        pricing.sync(db, catalog())
        acme = accounts.create(db, "acme")
        key = accounts.issue_key(db, acme)[1]
        reader = accounts.issue_key(db, acme, role=Role.READ)[1]
    body = {"spec": {"prompt": "a red circle", "count": 5}}
    with TestClient(create_app(), raise_server_exceptions=False) as api:
        api.headers["Authorization"] = f"Bearer {key}"

        # when
        made = api.post("/v1/quotes", json=body)
        quoted = made.json()
        job = api.post("/v1/jobs", json={**body, "quote": quoted["id"]})

        # then
        assert made.status_code == 201, made.text
        assert quoted["amount"] == job.json()["quoted"] == "0.00125"
        assert quoted["frames"] == 5
        assert quoted["lines"][0] | {"quantity": 5 * 64 * 64 * 20} == quoted["lines"][0]
        assert job.status_code == 202, job.text
        for again, status in (
            (body | {"quote": quoted["id"]}, 410),
            (body | {"quote": "quo_" + "0" * 32}, 404),
            (body | {"quote": 7}, 422),
            (body | {"budget": "0.00124"}, 402),
            (body | {"budget": 0.5}, 422),
        ):
            assert api.post("/v1/jobs", json=again).status_code == status, again
        refused = api.post("/v1/jobs", json=body | {"budget": "0.00124"}).json()
        assert (refused["needed"], refused["left"]) == ("0.00125", "0.00124")
        assert api.post("/v1/jobs", json=body | {"budget": "0.00125"}).status_code == 202
        headers = {"Authorization": f"Bearer {reader}"}
        assert api.post("/v1/quotes", json=body, headers=headers).status_code == 403
        assert api.post("/v1/quotes", json=body | {"quote": quoted["id"]}).status_code == 422
