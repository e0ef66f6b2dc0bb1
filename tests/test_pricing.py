"""Prices: exact arithmetic, dated rates."""

import ast
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal, FloatOperation, Inexact
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import farm
from farm import pricing
from farm.catalog import Catalog, Method
from farm.db import transaction
from farm.errors import Invalid
from farm.pricing import FACTOR, Rate, shown, total
from farm.spec import Asked, Spec, quantity, resolve
from tests.factories import (
    CATALOG,
    FRAME,
    account,
    ask,
    model,
    must_claim,
    one,
    settle,
    submit,
    until_blocked,
    view,
)

MODULES = ("pricing", "ledger", "jobs", "queue", "tables")  # where amounts pass through


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
    )

    assert floats == []


def test_the_factors_are_one_and_exactly_two_to_the_minus_twenty() -> None:
    assert FACTOR[Method.MPX_STEP] * 2**20 == 1
    assert FACTOR[Method.IMAGE] == 1


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
        " WHERE b.model = 'alpha' ORDER BY lower(valid)"
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
