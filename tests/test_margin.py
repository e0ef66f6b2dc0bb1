"""Margin: whose GPU time it was, to the last microsecond."""

import io
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from farm import accounts, answers, ids, jobs, ledger, margin, pricing, queue
from farm.accounts import Caller, Role
from farm.api.app import create_app
from farm.cli import chart
from farm.cli.shares import by_currency, longest, rows
from farm.db import transaction
from farm.margin import Margin
from farm.queue import ClaimedFrame, ClaimedPack
from tests.factories import (
    CATALOG,
    FRAME,
    account,
    add_worker,
    ask,
    fail,
    must_claim,
    one,
    release,
    stored,
    submit,
)

MS = 1000  # microseconds
HOUR = timedelta(hours=1)


def rendered(pack: ClaimedPack, gpu_ms: int, frames: Sequence[ClaimedFrame] | None = None) -> None:
    """Settle a pack's frames, with the time it took on the device."""
    with transaction() as db:
        queue.settle(db, stored(pack, frames), gpu_ms={pack.id: gpu_ms})


def found(*, since: datetime | None = None, until: datetime | None = None) -> Margin:
    now = datetime.now(UTC)
    with transaction() as db:
        return margin.find(db, since=since or now - 24 * HOUR, until=until or now + HOUR)


def gpu(shares: Sequence[margin.Share]) -> dict[str, int]:
    return {s.name: s.gpu_us for s in shares}


def weigh(work: Sequence[int]) -> None:
    """Let queued frames be of so much work, in the order of their ids."""
    for row, value in zip(ask("SELECT id FROM frames ORDER BY id"), work, strict=True):
        ask("UPDATE frames SET work = :work WHERE id = :id", work=value, id=row.id)


# ------------------------------------------------------------------------------------------------ the split


def test_a_packs_time_is_split_by_work_and_its_parts_are_all_of_it(books: str) -> None:
    # given a pack of two accounts' frames, of work that does not divide its time
    one_, other = account("one"), account("other")
    submit(one_, 2)
    submit(other, 1)
    weigh([1, 1, 5])
    pack = must_claim()
    assert len(pack.frames) == 3

    # when
    rendered(pack, 100)

    # then 100 ms in sevenths, with the last microsecond to the largest remainder
    shares = found()
    assert gpu(shares.accounts) == {"one": 28_572, "other": 71_428}
    assert sum(gpu(shares.accounts).values()) == 100 * MS
    assert shares.accounts[0].revenue == {"USD": 2 * FRAME}


@pytest.mark.parametrize("work", [[1, 1, 1, 1], [3, 3, 3], [7, 11, 13, 17], [10**12, 1], [1]])
@pytest.mark.parametrize("gpu_ms", [0, 1, 7, 1000, 2**31 - 1])
def test_no_microsecond_is_lost_or_made(books: str, work: list[int], gpu_ms: int) -> None:
    caller = account()
    submit(caller, len(work))
    weigh(work)
    rendered(must_claim(), gpu_ms)

    shares = found()

    assert sum(gpu(shares.accounts).values()) == sum(gpu(shares.models).values()) == gpu_ms * MS


def test_frames_that_were_not_delivered_are_the_farms(books: str) -> None:
    # given a pack of which one frame's job was cancelled
    caller, other = account("one"), account("other")
    submit(caller, 3)
    gone = submit(other, 1)
    pack = must_claim()
    with transaction() as db:
        jobs.cancel(db, other.account_id, gone)

    # when
    rendered(pack, 100)

    # then
    shares = found()
    assert gpu(shares.accounts) == {"one": 75 * MS}
    (model,) = shares.models
    assert (model.name, model.gpu_us, model.undelivered_us) == ("alpha", 75 * MS, 25 * MS)


@pytest.mark.parametrize("how", ["release", "fail"])
def test_a_pack_whose_last_frames_come_back_keeps_its_time(books: str, how: str) -> None:
    # given a pack of four, of which two are delivered
    caller = account()
    submit(caller, 4)
    pack = must_claim()
    rendered(pack, 60, pack.frames[:2])
    back, took = [f.id for f in pack.frames[2:]], {pack.id: 100}

    # when the others come back, one after the other
    for frame in back:
        with transaction() as db:
            if how == "release":
                queue.release(db, [pack.id], frames=[frame], gpu_ms=took)
            else:
                queue.fail(db, pack.id, "it broke", frames=[frame], gpu_ms=took)

    # then every part of its time is somebody's
    (model,) = found().models
    assert gpu(found().accounts) == {"acme": 50 * MS}
    assert (model.gpu_us, model.undelivered_us) == (50 * MS, 50 * MS)


def test_a_frame_rendered_again_costs_its_account_one_rendering(books: str) -> None:
    # given a frame whose first two packs came to nothing
    caller = account()
    submit(caller, 1)
    fail(must_claim())
    release(must_claim())

    # when
    rendered(must_claim(), 40)

    # then
    assert gpu(found().accounts) == {"acme": 40 * MS}


def test_a_reversal_takes_revenue_but_no_gpu_time(books: str) -> None:
    caller = account()
    job = submit(caller, 2)
    rendered(must_claim(), 100)
    with transaction() as db:
        ledger.reverse(db, ids.frame_id(job, 0), reason="the wrong picture")

    (share,) = found().accounts

    assert (share.frames, share.reversed, share.revenue, share.gpu_us) == (2, 1, {"USD": FRAME}, 100 * MS)


def test_times_that_meet_add_up(books: str) -> None:
    # given a pack settled in two parts
    caller = account()
    submit(caller, 4)
    pack = must_claim()
    rendered(pack, 90, pack.frames[:1])
    edge = one("SELECT clock_timestamp()")
    rendered(pack, 90, pack.frames[1:])

    # when
    earlier, later = found(until=edge), found(since=edge)

    # then
    assert gpu(earlier.accounts) == {"acme": 22_500}
    assert gpu(later.accounts) == {"acme": 67_500}
    assert earlier.accounts[0].revenue["USD"] + later.accounts[0].revenue["USD"] == 4 * FRAME


# ------------------------------------------------------------------------------------------------ pools


def test_a_pools_time_is_what_its_workers_were_there_for(books: str) -> None:
    # given a worker here for ten minutes, which sat here before, and one that idles
    add_worker("a", "alpha")
    add_worker("b", "alpha")
    ask("UPDATE workers SET seen_at = now(), started_at = now() - interval '20 minutes'")
    ask("TRUNCATE sittings")
    ask("UPDATE workers SET seen_at = started_at + interval '5 minutes' WHERE id = 'a'")
    ask("UPDATE workers SET started_at = now() - interval '10 minutes', seen_at = now() WHERE id = 'a'")
    submit(account(), 4)
    pack = must_claim("a")

    # when
    rendered(pack, 60_000)

    # then: 5 and 10 minutes of one, 20 of the other
    (pool,) = found().time
    assert pool.name == "both"
    assert abs(pool.up_us - 35 * 60_000_000) < 1_000_000
    assert (pool.delivered_us, pool.undelivered_us) == (60_000 * MS, 0)
    assert pool.delivered_us + pool.undelivered_us + pool.other_us == pool.up_us
    assert one("SELECT count(*) FROM sittings") == 1


def test_a_worker_nobody_knows_was_there_for_what_it_rendered(books: str) -> None:
    submit(account(), 1)
    rendered(must_claim("a ghost"), 50)

    (pool,) = found().time

    assert (pool.name, pool.up_us, pool.other_us) == ("?", 50 * MS, 0)


def test_nothing_used_is_nothing(books: str) -> None:
    empty = found()

    assert (empty.models, empty.pools, empty.accounts, empty.time) == ((), (), (), ())


# ------------------------------------------------------------------------------------------------ currencies


def two_currencies() -> None:
    """Two of four frames of a pack are of an account that pays in another currency."""
    with transaction() as db:
        euro = accounts.create(db, "euro", currency="EUR")
        pricing.set_price(db, CATALOG, account=None, model="alpha", rate=Decimal("0.0064"), currency="EUR")
        key, _ = accounts.issue_key(db, euro)
        theirs = Caller(euro.id, euro.name, euro.currency, key.id, Role.SUBMIT)
    submit(account("dollar"), 3)
    submit(theirs, 1)
    rendered(must_claim(), 3600)


def test_revenue_an_hour_is_by_the_time_of_those_who_pay_in_that_currency(books: str) -> None:
    two_currencies()

    answer = asked(account("ops"), Role.ADMIN).json()

    (model,) = answer["models"]
    assert (model["gpu_s"], model["gpu_s_by_currency"]) == (
        "3.600000",
        {"EUR": "0.900000", "USD": "2.700000"},
    )
    assert model["per_gpu_hour"] == {"EUR": "25.60", "USD": "12.80"}
    assert [a["per_gpu_hour"] for a in answer["accounts"]] == [{"USD": "12.80"}, {"EUR": "25.60"}]


def test_each_currency_is_drawn_to_its_own_scale(books: str) -> None:
    # given
    two_currencies()
    shown = answers.Margin.model_validate_json(asked(account("ops"), Role.ADMIN).content)

    # when
    panels = by_currency(rows([*shown.models, *shown.accounts]))
    drawn = Image.open(io.BytesIO(chart.draw(shown))).convert("RGB")

    # then what has the most revenue of a currency has a full bar, whatever the other currency's figures are
    assert [(c, [r.share.name for r in some]) for c, some in panels.items()] == [
        ("EUR", ["alpha", "euro"]),
        ("USD", ["alpha", "dollar"]),
    ]
    assert [longest(some) for some in panels.values()] == [
        (Decimal("0.0064"), Decimal("0.9")),
        (Decimal("0.0096"), Decimal("2.7")),
    ]
    full = (chart.MARGIN + chart.NAME + 1) * 2, (chart.WIDTH - chart.MARGIN - chart.FIGURES - 2) * 2
    green = tuple(bytes.fromhex(chart.REVENUE[1:]))
    tops = [
        y
        for y in range(140 * 2, drawn.height)
        if all(drawn.getpixel((x, y)) == green for x in full) and drawn.getpixel((full[0], y - 1)) != green
    ]
    assert len(tops) == 6  # a model, a pool and an account, by two currencies


# ------------------------------------------------------------------------------------------------ over HTTP


def asked(caller: Caller, role: Role, **params: Any) -> Any:
    with transaction() as db:
        _, key = accounts.issue_key(db, accounts.find(db, caller.account), role=role)
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        return client.get("/v1/margin", headers={"Authorization": f"Bearer {key}"}, params=params)


def test_only_admins_see_the_margin_and_amounts_are_text(books: str) -> None:
    # given
    caller = account()
    submit(caller, 4)
    rendered(must_claim(), 3600)

    # then
    assert asked(caller, Role.SUBMIT).status_code == 403
    (model,) = asked(caller, Role.ADMIN).json()["models"]
    assert (model["revenue"], model["gpu_s"]) == ({"USD": "0.0128"}, "3.600000")
    assert model["per_gpu_hour"] == {"USD": "12.80"}
    assert Decimal(model["undelivered_s"]) == 0
    wrong = asked(caller, Role.ADMIN, since="2026-02-01", until="2026-01-01")
    assert wrong.json()["errors"][0]["field"] == "since"
