"""Prices: exact arithmetic, dated rates."""

import ast
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal, FloatOperation, Inexact
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError

import farm
from farm import accounts, pricing
from farm.accounts import Caller, Role
from farm.api.app import create_app
from farm.catalog import Catalog, Method, catalog
from farm.db import transaction
from farm.errors import Invalid, NotFound
from farm.pricing import FACTOR, DatedPrice, Rate, shown, total
from farm.spec import Asked, Spec, quantity, resolve
from farm.tables import Account
from tests.factories import (
    CATALOG,
    FRAME,
    account,
    ask,
    claim,
    model,
    must_claim,
    one,
    settle,
    submit,
    until_blocked,
    view,
)

MODULES = (
    "pricing",
    "budgets",
    "ledger",
    "drafts",
    "submissions",
    "jobs",
    "queue",
)  # where amounts pass through


def rate(method: Method, amount: str) -> Rate:
    return Rate(1, "alpha", method, "USD", Decimal(amount))


def dearer(amount: str) -> Catalog:
    """The catalog with another price for alpha."""
    price = {"method": "mpx_step", "rate": amount, "currency": "USD"}
    return Catalog([model("alpha", price=price), *(m for m in CATALOG.values() if m.name != "alpha")])


def test_half_a_megapixel_in_four_steps_at_0_0032_costs_0_0064() -> None:
    assert shown(rate(Method.MPX_STEP, "0.0032").amount(1024 * 512 * 4)) == "0.0064"


@pytest.mark.parametrize("side", [64, 512, 2048])
def test_an_image_at_0_37_costs_0_37_whatever_its_size(side: int, books: str) -> None:
    # given
    caller = account()

    # when
    job = submit(caller, model="flat", width=side, height=side, steps=7)

    # then
    assert view(caller, job).quoted == Decimal("0.37")


def test_a_million_images_at_0_0064_cost_6400_and_not_10000() -> None:
    one_image = rate(Method.MPX_STEP, "0.0032").amount(1024 * 512 * 4)

    assert shown(total([one_image] * 1_000_000)) == "6400"


@given(
    quantity=st.integers(1, 2**63 - 1),
    cents=st.decimals("0", "1000", places=9, allow_nan=False),
    method=st.sampled_from(Method),
)
def test_an_amount_is_exact_to_the_last_digit(quantity: int, cents: Decimal, method: Method) -> None:
    amount = rate(method, str(cents)).amount(quantity)

    numerator, denominator = cents.as_integer_ratio()
    megapixel = 1 << 20 if method is Method.MPX_STEP else 1
    top, bottom = amount.as_integer_ratio()
    assert top * denominator * megapixel == quantity * numerator * bottom


def test_an_amount_that_would_be_rounded_is_an_error() -> None:
    with pytest.raises(Inexact):
        rate(Method.MPX_STEP, "0." + "3" * 79).amount(3)


def test_a_float_is_refused_where_amounts_are_made() -> None:
    with pytest.raises((FloatOperation, TypeError)):
        Rate(1, "alpha", Method.IMAGE, "USD", 0.37).amount(1)  # type: ignore[arg-type]


def test_no_float_stands_where_amounts_pass_through() -> None:
    for name in MODULES:
        source = (Path(farm.__file__).parent / f"{name}.py").read_text()
        for node in ast.walk(ast.parse(source)):
            assert not (isinstance(node, ast.Constant) and isinstance(node.value, float)), (
                f"{name}: {node.lineno}"
            )
            assert not (isinstance(node, ast.Name) and node.id == "float"), f"{name}: {node.lineno}"
            assert not isinstance(node, ast.Div) or name not in ("pricing", "ledger"), name


def test_no_amount_in_the_database_is_a_float(books: str) -> None:
    floats = ask(
        "SELECT table_name, column_name FROM information_schema.columns"
        " WHERE table_schema = 'public' AND data_type IN ('real', 'double precision')"
        " AND table_name NOT IN ('measurements', 'limits')"  # seconds and bytes of devices; requests a second
    )

    assert floats == []


def test_the_factors_are_one_and_exactly_two_to_the_minus_twenty() -> None:
    assert FACTOR[Method.MPX_STEP] * 2**20 == 1
    assert FACTOR[Method.IMAGE] == FACTOR[Method.REUSE] == 1


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ("0.00640000", "0.0064"),
        ("100", "100"),
        ("1E+3", "1000"),
        ("1E-9", "0.000000001"),
        ("0E-20", "0"),
        ("0", "0"),
    ],
)
def test_an_amount_is_shown_without_exponent_and_trailing_zeros(amount: str, text: str) -> None:
    assert shown(Decimal(amount)) == text


def test_the_quantity_of_a_frame_is_an_integer_that_passes_three_ints(books: str) -> None:
    # given a frame of 2048 × 2048 in 100 steps, whose quantity does not fit into 32 bits times a few
    caller = account()
    job = submit(caller, 3, width=2048, height=2048, steps=100)

    # then
    stored = one("SELECT sum(quantity) FROM frames WHERE job_id = :job", job=job)
    assert stored == 3 * 2048 * 2048 * 100
    assert view(caller, job).quoted == Decimal("0.0032") * 4 * 100 * 3


def test_a_catalog_that_did_not_change_starts_no_price(books: str) -> None:
    with transaction() as db:
        assert pricing.sync(db, CATALOG) == 0


def test_a_changed_rate_closes_the_old_price_and_starts_another_at_that_moment(books: str) -> None:
    # when
    with transaction() as db:
        started = pricing.sync(db, dearer("0.0050"))

    # then
    assert started == 1
    old, new = ask(
        "SELECT p.rate, p.valid FROM prices AS p JOIN price_books AS b ON b.id = p.book_id"
        " WHERE b.model = 'alpha' AND b.method = 'mpx_step' ORDER BY lower(valid)"
    )
    assert (old.rate, new.rate) == (Decimal("0.0032"), Decimal("0.0050"))
    assert old.valid.upper == new.valid.lower
    assert new.valid.upper is None
    assert old.valid.upper - old.valid.lower > timedelta(0)


def test_two_that_bring_up_prices_at_once_start_one(books: str) -> None:
    def bring_up() -> int:
        with transaction() as db:
            return pricing.sync(db, dearer("0.0050"))

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            first = pricing.sync(db, dearer("0.0050"))
            second = thread.submit(bring_up)
            until_blocked()

        # then
        assert (first, second.result()) == (1, 0)


def test_an_admitted_job_keeps_its_price_and_the_next_has_the_new_one(books: str) -> None:
    # given
    caller = account()
    before = submit(caller)

    # when
    with transaction() as db:
        pricing.sync(db, dearer("0.0064"))
    after = submit(caller)
    settle(must_claim())

    # then
    assert view(caller, before).charged == FRAME
    assert view(caller, after).charged == 2 * FRAME


def test_an_accounts_own_price_comes_before_everybodys(books: str) -> None:
    # given
    favoured, other = account("favoured"), account("other")
    ask(
        "WITH book AS (INSERT INTO price_books (account_id, model, method, currency)"
        " VALUES (:account, 'alpha', 'mpx_step', 'USD') RETURNING id)"
        " INSERT INTO prices (book_id, method, currency, rate, valid)"
        " SELECT id, 'mpx_step', 'USD', 0.0016, tstzrange(now(), NULL) FROM book",
        account=favoured.account_id,
    )

    # then
    assert view(favoured, submit(favoured)).quoted == FRAME / 2
    assert view(other, submit(other)).quoted == FRAME


def test_a_model_without_a_price_in_the_accounts_currency_is_refused_by_name(books: str) -> None:
    with transaction() as db, pytest.raises(Invalid, match="no price in EUR"):
        pricing.current(
            db, account_id=account().account_id, currency="EUR", models={"alpha": Method.MPX_STEP}
        )


def test_steps_and_pixels_are_billed_not_guided_rows() -> None:
    def spec(guidance: float) -> Spec:
        resolved = resolve(Asked(prompt="x", model="alpha", guidance=guidance), CATALOG)
        assert isinstance(resolved, Spec)
        return resolved

    assert quantity(spec(7.5), Method.MPX_STEP) == quantity(spec(1.0), Method.MPX_STEP) == 512 * 512 * 4
    assert quantity(spec(7.5), Method.IMAGE) == 1


# ------------------------------------------------------------------------------------------------ price books


def put(amount: str, **facts: Any) -> DatedPrice:
    with transaction() as db:
        return pricing.set_price(
            db, CATALOG, **{"account": None, "model": "alpha", "rate": Decimal(amount), **facts}
        )


def row(caller: Caller) -> Account:
    with transaction() as db:
        return db.get_one(Account, caller.account_id)


def line(caller: Caller | None = None, model: str = "alpha") -> list[DatedPrice]:
    """Every price of rendering this model, in order."""
    with transaction() as db:
        found = pricing.every(db, caller and caller.account_id, model=model, past=True)
    return [p for p in found if p.method is not Method.REUSE]


def in_an_hour(hours: int = 1) -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + timedelta(hours=hours)


def test_the_worked_example_from_the_price_book_to_the_bill(books: str) -> None:
    # given half a megapixel in four steps at 0.0032, and another account that pays 0.37 an image
    caller, other = account("half"), account("flat-rate")
    put("0.0032")
    put("0.37", account=row(other), method=Method.IMAGE)

    # when
    first, second = (submit(c, width=1024, height=512, steps=4) for c in (caller, other))
    while (pack := claim()) is not None:
        settle(pack)

    # then
    assert shown(view(caller, first).charged) == "0.0064"
    assert shown(view(other, second).charged) == "0.37"


def test_a_price_that_is_set_starts_now_and_touches_nothing_admitted(books: str) -> None:
    # given
    caller = account()
    before = submit(caller)

    # when
    new = put("0.0064")
    after = submit(caller)

    # then
    old, again = line()
    assert again == new
    assert (old.ends, new.ends) == (new.starts, None)
    assert (old.source, new.source) == ("catalog", "admin")
    assert (old.version, new.version) == (1, 2)
    settle(must_claim())
    assert (view(caller, before).charged, view(caller, after).charged) == (FRAME, 2 * FRAME)


def test_a_planned_price_waits_for_its_moment(books: str) -> None:
    # when
    planned = put("0.0064", since=in_an_hour())

    # then
    caller = account()
    assert view(caller, submit(caller)).quoted == FRAME
    assert line()[0].ends == planned.starts


def test_a_price_set_before_a_planned_one_lasts_until_that(books: str) -> None:
    planned = put("0.0064", since=in_an_hour())

    now = put("0.0016")

    assert [(p.rate, p.ends) for p in line()[1:]] == [
        (now.rate, planned.starts),
        (planned.rate, None),
    ]
    caller = account()
    assert view(caller, submit(caller)).quoted == FRAME / 2


def test_a_price_planned_for_the_same_moment_gives_way(books: str) -> None:
    moment = in_an_hour()
    put("0.0064", since=moment)

    put("0.5", since=moment, method=Method.IMAGE)

    assert [(p.rate, p.method) for p in line()] == [
        (Decimal("0.0032"), Method.MPX_STEP),
        (Decimal("0.5"), Method.IMAGE),
    ]


def test_a_planned_price_is_withdrawn_and_the_one_before_it_goes_on(books: str) -> None:
    # given three prices that follow each other
    first, second = in_an_hour(), in_an_hour(2)
    put("0.0064", since=first)
    put("0.0128", since=second)

    # when
    gone = withdraw(first)

    # then the catalog's lasts until the second
    assert (gone.rate, gone.starts, gone.ends) == (Decimal("0.0064"), first, second)
    assert [(p.rate, p.ends) for p in line()] == [(Decimal("0.0032"), second), (Decimal("0.0128"), None)]
    withdraw(second)
    assert [(p.rate, p.ends) for p in line()] == [(Decimal("0.0032"), None)]


def test_only_what_is_planned_can_be_withdrawn(books: str) -> None:
    # given
    now = put("0.0064")
    moment = in_an_hour()
    put("0.5", since=moment, account=row(account()))

    # then
    with pytest.raises(Invalid) as refused:
        withdraw(now.starts)
    assert [f.field for f in refused.value.faults] == ["since"]
    for other in ({"since": in_an_hour(2)}, {"since": moment}, {"since": moment, "model": "none"}):
        with pytest.raises(NotFound, match="no price is planned"):
            withdraw(**other)  # type: ignore[arg-type]
    assert len(line()) == 2


def test_the_price_of_reuse_is_withdrawn_by_its_method(books: str) -> None:
    moment = in_an_hour()
    put("0.001", since=moment, method=Method.REUSE)
    put("0.0064", since=moment)

    assert withdraw(moment, method=Method.REUSE).method is Method.REUSE
    assert [p.rate for p in line()] == [Decimal("0.0032"), Decimal("0.0064")]


def test_an_end_that_has_passed_stays(books: str) -> None:
    put("0.0064")

    with pytest.raises(IntegrityError, match="a price never changes"):
        ask(
            "UPDATE prices SET valid = tstzrange(lower(valid), NULL)"
            " WHERE upper(valid) IS NOT NULL AND source = 'catalog'"
        )


def withdraw(since: datetime, *, model: str = "alpha", **facts: Any) -> DatedPrice:
    with transaction() as db:
        return pricing.withdraw(db, CATALOG, **{"account": None, "model": model, "since": since, **facts})


@pytest.mark.parametrize(
    ("facts", "field"),
    [
        ({"model": "gamma"}, "model"),
        ({"rate": Decimal("-1")}, "rate"),
        ({"rate": Decimal("NaN")}, "rate"),
        ({"rate": Decimal("0.0000000000001")}, "rate"),
        ({"rate": Decimal("1e9")}, "rate"),
        ({"currency": "euro"}, "currency"),
        ({"since": datetime(2020, 1, 1, tzinfo=UTC)}, "since"),
    ],
)
def test_a_price_that_is_not_allowed_is_refused_by_its_field(
    books: str, facts: dict[str, Any], field: str
) -> None:
    with pytest.raises(Invalid) as refused:
        put("1", **facts)

    assert [f.field for f in refused.value.faults] == [field]
    assert len(line()) == 1


def test_an_account_gets_no_price_in_a_currency_it_does_not_pay_in(books: str) -> None:
    with pytest.raises(Invalid, match="the account pays in USD"):
        put("1", account=row(account()), currency="EUR")


def test_the_catalog_leaves_a_line_of_prices_alone_once_an_admin_has_set_one(books: str) -> None:
    # given
    put("0.0064")

    # when
    with transaction() as db:
        started = pricing.sync(db, dearer("0.0050"))

    # then
    assert started == 0
    assert [p.rate for p in line()] == [Decimal("0.0032"), Decimal("0.0064")]


def test_an_accounts_own_price_keeps_the_catalog_from_nothing(books: str) -> None:
    put("0.0016", account=row(account()))

    with transaction() as db:
        assert pricing.sync(db, dearer("0.0050")) == 1


def test_a_catalog_that_goes_to_another_method_and_back_is_followed(books: str) -> None:
    caller = account()
    flat = {"method": "image", "rate": "0.2", "currency": "USD"}
    changed = Catalog([model("alpha", price=flat), *(m for m in CATALOG.values() if m.name != "alpha")])

    with transaction() as db:
        assert pricing.sync(db, changed) == 1
    assert view(caller, submit(caller, models=changed)).quoted == Decimal("0.2")
    with transaction() as db:
        assert pricing.sync(db, CATALOG) == 1
    assert view(caller, submit(caller)).quoted == FRAME


def test_what_was_in_force_is_kept_by_the_database(books: str) -> None:
    put("0.0064")
    put("0.0128", since=in_an_hour())

    for change in (
        "UPDATE prices SET rate = 1",
        "UPDATE prices SET source = 'admin' WHERE source = 'catalog'",
        "UPDATE prices SET valid = tstzrange(lower(valid), now() + interval '2 h') WHERE upper(valid) > now()",
        "UPDATE prices SET valid = tstzrange(lower(valid), lower(valid) + interval '1 us') WHERE NOT upper_inf(valid)",
        "DELETE FROM prices WHERE lower(valid) <= now()",
    ):
        with pytest.raises(IntegrityError, match=r"never changes|are kept|prices_int4range_valid_excl"):
            ask(change)


def test_two_prices_of_a_book_never_overlap(books: str) -> None:
    put("0.0064", since=in_an_hour())

    with pytest.raises(IntegrityError, match="prices_int4range_valid_excl"):
        ask(
            "INSERT INTO prices (book_id, method, currency, rate, valid)"
            " SELECT book_id, method, currency, 1, tstzrange(now() + interval '10 min', now() + interval '2 h')"
            " FROM prices WHERE source = 'admin'"
        )


def test_of_two_that_set_a_price_at_once_the_later_stands(books: str) -> None:
    with ThreadPoolExecutor(1) as thread:
        with transaction() as db:
            facts: dict[str, Any] = {"account": None, "model": "alpha"}
            pricing.set_price(db, CATALOG, rate=Decimal(1), **facts)
            second = thread.submit(put, "2")
            until_blocked()

        assert second.result().version == 3
    assert [p.rate for p in line()] == [Decimal("0.0032"), 1, 2]


# ------------------------------------------------------------------------------------------------ over HTTP


@pytest.fixture
def api(database: str) -> Iterator[TestClient]:
    """The API with the catalog's prices; acme's keys in its headers by role: api.keys."""
    with transaction() as db:
        pricing.sync(db, catalog())
        acme, umbrella = accounts.create(db, "acme"), accounts.create(db, "umbrella")
        keys = {role.value: accounts.issue_key(db, acme, role=role)[1] for role in Role}
        keys["umbrella"] = accounts.issue_key(db, umbrella)[1]
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {keys['admin']}"
        client.app.state.keys = keys  # type: ignore[attr-defined]
        yield client


def as_(api: TestClient, who: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api.app.state.keys[who]}"}  # type: ignore[attr-defined]


def test_an_admin_sets_a_price_that_only_the_account_sees(api: TestClient) -> None:
    # when
    body = {"model": "starter", "rate": "0.37", "method": "image", "account": "umbrella"}
    made = api.post("/v1/prices", json=body)

    # then
    assert made.status_code == 201, made.text
    assert made.json()["rate"] == "0.37"
    seen = {
        who: [
            p["account"] for p in api.get("/v1/prices?model=starter", headers=as_(api, who)).json()["prices"]
        ]
        for who in ("umbrella", "submit")
    }
    assert seen == {"umbrella": [None, None, "umbrella"], "submit": [None, None]}
    quoted = api.post("/v1/jobs", json={"spec": {"prompt": "x"}}, headers=as_(api, "umbrella")).json()[
        "quoted"
    ]
    assert quoted == "0.37"


def test_prices_in_the_past_are_shown_when_asked_for(api: TestClient) -> None:
    api.post("/v1/prices", json={"model": "starter", "rate": "0.01"})

    def rates(query: str) -> list[str]:
        found = api.get(f"/v1/prices?model=starter{query}").json()["prices"]
        return [p["rate"] for p in found if p["method"] != "reuse"]

    assert rates("") == ["0.01"]
    assert rates("&past=true") == ["0.0032", "0.01"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"model": "starter", "rate": 0.1}, "rate"),
        ({"model": "starter", "rate": "1e3"}, "rate"),
        ({"model": "starter", "rate": "-1"}, "rate"),
        ({"model": "starter", "rate": True}, "rate"),
        ({"model": "starter"}, "rate"),
        ({"model": "unknown", "rate": "1"}, "model"),
        ({"model": "starter", "rate": "1", "method": "hour"}, "method"),
        ({"model": "starter", "rate": "1", "since": "yesterday"}, "since"),
        ({"model": "starter", "rate": "1", "since": "2020-01-01"}, "since"),
    ],
)
def test_a_price_that_cannot_be_set_names_the_field(
    api: TestClient, body: dict[str, Any], field: str
) -> None:
    answer = api.post("/v1/prices", json=body)

    assert answer.status_code == 422, answer.text
    assert [e["field"] for e in answer.json()["errors"]] == [field]


def test_only_admins_set_prices_and_see_those_of_others(api: TestClient) -> None:
    new = {"model": "starter", "rate": "1"}
    assert api.post("/v1/prices", json=new, headers=as_(api, "submit")).status_code == 403
    assert api.get("/v1/prices?account=acme", headers=as_(api, "umbrella")).status_code == 404
    assert api.get("/v1/prices?account=umbrella").status_code == 200
    assert api.post("/v1/prices", json={**new, "account": "nobody"}).status_code == 404
