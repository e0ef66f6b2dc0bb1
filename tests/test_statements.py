"""Statements: lines that add up, months that close once, and nothing lost or billed twice in between."""

import csv
import io
import re
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from farm import accounts, ledger, statements
from farm.accounts import Caller, Role
from farm.api.app import create_app
from farm.db import transaction
from farm.errors import Conflict, Invalid, NotFound
from farm.statements import Bill, Status
from farm.tables import Account
from tests.factories import (
    FRAME,
    account,
    back_date,
    must_claim,
    one,
    settle,
    submit,
    until_blocked,
)

NOW = datetime.now(UTC)
THIS = date(NOW.year, NOW.month, 1)
LAST = (THIS - timedelta(days=1)).replace(day=1)
BEFORE = (LAST - timedelta(days=1)).replace(day=1)
IN_LAST = datetime(LAST.year, LAST.month, 15, 12, tzinfo=UTC)
IN_BEFORE = datetime(BEFORE.year, BEFORE.month, 15, 12, tzinfo=UTC)


def used(
    caller: Caller, frames: int = 1, *, at: datetime | None = None, model: str = "alpha", **spec: Any
) -> None:
    """Let an account have used frames, now or at another time."""
    job = submit(caller, frames, model=model, **spec)
    while one("SELECT count(*) FROM frames WHERE job_id = :job AND status = 'queued'", job=job):
        settle(must_claim(models=[model]))
    if at:
        back_date(at, job=job)


def owner(caller: Caller) -> Account:
    with transaction() as db:
        return db.get_one(Account, caller.account_id)


def further(caller: Caller, month: date, rows: int = 1000) -> bool:
    with transaction() as db:
        return statements.close_further(db, owner(caller), month, rows=rows)


def close(caller: Caller, month: date) -> Bill:
    while not further(caller, month):
        pass
    return bill(caller, month)


def bill(caller: Caller, month: date) -> Bill:
    with transaction() as db:
        return statements.find(db, owner(caller), month)


def unstated() -> int:
    return int(one("SELECT count(*) FROM usage WHERE statement_line IS NULL"))


# ------------------------------------------------------------------------------------------------ rounding


def test_the_remainder_goes_to_the_largest_parts() -> None:
    thirds = [Decimal("0.333"), Decimal("0.334"), Decimal("0.333")]

    assert statements.spread(thirds, 2) == (
        [Decimal("0.33"), Decimal("0.34"), Decimal("0.33")],
        Decimal("1.00"),
    )
    assert statements.spread([Decimal("0.005")] * 2, 2)[0] == [Decimal("0.01"), Decimal("0.00")]
    assert statements.spread([Decimal("-0.005")], 2) == ([Decimal("-0.01")], Decimal("-0.01"))
    assert statements.spread([], 2) == ([], Decimal("0.00"))
    assert statements.spread([Decimal("0.4"), Decimal("0.4")], 0) == ([Decimal(1), Decimal(0)], Decimal(1))


@given(
    st.lists(st.decimals(-(10**12), 10**12, allow_nan=False, allow_infinity=False, places=22), max_size=12),
    st.sampled_from([0, 2, 3, 4]),
)
def test_rounded_amounts_add_up_and_none_moves_by_a_unit(exact: list[Decimal], digits: int) -> None:
    unit = Decimal(1).scaleb(-digits)

    amounts, total = statements.spread(exact, digits)

    assert sum(amounts) == total
    assert abs(total - sum_of(exact)) * 2 <= unit
    for amount, was in zip(amounts, exact, strict=True):
        assert amount == amount.quantize(unit)
        assert abs(amount - was) < unit


def sum_of(amounts: list[Decimal]) -> Decimal:
    from farm.pricing import total

    return total(amounts)


def test_a_currency_has_its_own_minor_unit() -> None:
    assert [statements.digits_of(c) for c in ("USD", "JPY", "KWD", "CLF", "XYZ")] == [2, 0, 3, 4, 2]


@pytest.mark.parametrize(
    "written", ["2026-13", "2026-00", "2026-1", "26-11", "2026-11-01", "", "2026-1１", "0000-01"]
)
def test_what_is_no_month_is_refused_by_name(written: str) -> None:
    with pytest.raises(Invalid) as refused:
        statements.month_of(written)

    assert [(f.field, f.value) for f in refused.value.faults] == [("month", written)]


def test_a_month_is_followed_by_the_next() -> None:
    assert statements.month_of("2026-11") == date(2026, 11, 1)
    assert statements.month_after(date(2026, 12, 1)) == date(2027, 1, 1)
    assert statements.month_after(date(2026, 1, 1)) == date(2026, 2, 1)


# ------------------------------------------------------------------------------------------------ closing


def test_a_closed_month_has_a_line_for_each_model_and_rate_and_adds_up(books: str) -> None:
    # given what one account used last month, and what another did
    caller, other = account(), account("other")
    used(caller, 3, at=IN_LAST)
    used(caller, 2, model="flat", at=IN_LAST)
    used(other, 1, at=IN_LAST)

    # when
    closed = close(caller, LAST)

    # then
    lines = [(x.model, x.method, x.rate, x.frames, x.quantity, x.exact, x.amount) for x in closed.lines]
    assert lines == [
        ("alpha", "mpx_step", Decimal("0.0032"), 3, 3 * 512 * 512 * 4, 3 * FRAME, Decimal("0.01")),
        ("flat", "image", Decimal("0.37"), 2, 2, Decimal("0.74"), Decimal("0.74")),
    ]
    assert (closed.status, closed.total, closed.exact) == (Status.CLOSED, Decimal("0.75"), Decimal("0.7496"))
    assert unstated() == 1  # the other's
    assert bill(other, LAST).status is Status.OPEN


def test_closing_again_changes_nothing(books: str) -> None:
    caller = account()
    used(caller, 2, at=IN_LAST)
    first = close(caller, LAST)

    assert close(caller, LAST) == first
    assert one("SELECT count(*) FROM statement_lines") == 1


def test_a_month_without_usage_closes_at_nothing(books: str) -> None:
    closed = close(account(), LAST)

    assert (closed.total, closed.lines, closed.status) == (Decimal("0.00"), (), Status.CLOSED)


def test_a_month_that_is_not_over_is_a_draft_and_does_not_close(books: str) -> None:
    # given
    caller = account()
    used(caller, 3)

    # then
    draft = bill(caller, THIS)
    assert (draft.status, draft.total, draft.exact) == (Status.OPEN, Decimal("0.01"), 3 * FRAME)
    with pytest.raises(Conflict, match="is not over"):
        further(caller, THIS)
    assert one("SELECT count(*) FROM statements") == 0
    with pytest.raises(NotFound):
        bill(caller, statements.month_after(THIS))


def test_what_is_known_late_is_on_the_next_statement_with_its_own_time(books: str) -> None:
    # given a month that was closed, and a charge of it that became known after that
    caller = account()
    used(caller, 3, at=IN_BEFORE)
    first = close(caller, BEFORE)
    used(caller, 2, at=IN_BEFORE)
    used(caller, 1, at=IN_LAST)

    # when
    assert bill(caller, LAST).lines[0].late == 2
    second = close(caller, LAST)

    # then
    assert bill(caller, BEFORE) == first
    assert [(x.frames, x.late) for x in second.lines] == [(3, 2)]
    assert one("SELECT count(*) FROM usage WHERE at = :at", at=IN_BEFORE) == 5


def test_a_charge_that_commits_while_its_month_closes_is_neither_lost_nor_billed_twice(books: str) -> None:
    # given a charge of last month whose transaction is open
    caller = account()
    used(caller, 2, at=IN_LAST)
    job = submit(caller, 1)
    pack = must_claim()
    with transaction() as db:
        settle(pack, db=db)
        back_date(IN_LAST, job=job, db=db)

        # when
        closed = close(caller, LAST)

    # then
    assert [x.frames for x in closed.lines] == [2]
    assert unstated() == 1
    assert [(x.frames, x.late) for x in bill(caller, THIS).lines] == [(1, 1)]


def test_a_close_that_was_interrupted_goes_on_and_is_right_at_every_step(books: str) -> None:
    # given
    caller = account()
    used(caller, 5, at=IN_LAST)

    # when
    for _ in range(2):
        assert not further(caller, LAST, rows=2)
        now = bill(caller, LAST)
        assert (now.status, now.exact, [x.frames for x in now.lines]) == (Status.CLOSING, 5 * FRAME, [5])
        with transaction() as db:
            assert ledger.audit(db) == []

    # then
    assert further(caller, LAST, rows=2)
    assert (bill(caller, LAST).status, bill(caller, LAST).exact) == (Status.CLOSED, 5 * FRAME)


def test_two_that_close_at_once_wait_for_one_another(books: str) -> None:
    # given
    caller = account()
    used(caller, 4, at=IN_LAST)
    results: list[bool] = []
    other = threading.Thread(target=lambda: results.append(further(caller, LAST)))

    # when
    with transaction() as db:
        statements.close_further(db, owner(caller), LAST, rows=2)
        other.start()
        until_blocked()
    other.join()

    # then
    assert results == [True]
    assert [x.frames for x in bill(caller, LAST).lines] == [4]


def test_months_close_one_after_the_other(books: str) -> None:
    # given usage in two months
    caller = account()
    used(caller, 1, at=IN_BEFORE)
    used(caller, 1, at=IN_LAST)

    # then the earlier first
    with pytest.raises(Conflict, match=f"close {BEFORE:%Y-%m} first"):
        further(caller, LAST)
    assert [x.frames for x in bill(caller, LAST).lines] == [1]  # a draft does not mix them either

    # and while it is not done, no other
    assert not further(caller, BEFORE, rows=1)
    with pytest.raises(Conflict, match="is being closed"):
        further(caller, LAST)
    close(caller, BEFORE)
    close(caller, LAST)

    # and none that was left out before them
    with pytest.raises(Conflict, match="is closed already"):
        further(caller, (BEFORE - timedelta(days=1)).replace(day=1))
    with pytest.raises(NotFound):
        bill(caller, (BEFORE - timedelta(days=1)).replace(day=1))


def test_a_reversal_is_on_the_statement_of_its_own_month(books: str) -> None:
    # given a month that was closed
    caller = account()
    used(caller, 1, model="flat", at=IN_LAST)
    close(caller, LAST)

    # when its charge is taken back
    with transaction() as db:
        ledger.reverse(db, one("SELECT id FROM frames"), reason="the wrong picture")

    # then
    (line,) = bill(caller, THIS).lines
    assert (line.frames, line.reversed, line.quantity, line.amount) == (0, 1, -1, Decimal("-0.37"))
    assert bill(caller, LAST).total == Decimal("0.37")


# ------------------------------------------------------------------------------------------------ guards


@pytest.fixture
def closed(books: str) -> Caller:
    """An account with a closed month, and two charges of this one."""
    caller = account()
    used(caller, 2, at=IN_LAST)
    close(caller, LAST)
    used(caller, 2)
    return caller


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("UPDATE statements SET closed_at = now()", "stays as it was closed"),
        ("UPDATE statements SET closed_at = NULL, total = NULL", "stays as it was closed"),
        ("DELETE FROM statements", "are kept"),
        ("DELETE FROM statement_lines", "are kept"),
        ("UPDATE statement_lines SET amount = amount + 1", "stays as it was closed"),
        ("UPDATE usage SET statement_line = (SELECT max(id) FROM statement_lines) WHERE statement_line IS NULL",
         "belongs on an open line"),
        ("UPDATE usage SET statement_line = 4711 WHERE statement_line IS NULL", "belongs on an open line"),
        ("UPDATE usage SET statement_line = NULL", "append-only"),
        ("INSERT INTO statements (account_id, month, currency, digits, total, closed_at)"
         " SELECT id, '2020-01-01', 'USD', 2, 0.01, now() FROM accounts", "does not add up"),
        ("INSERT INTO statements (account_id, month, currency, digits)"
         " SELECT id, '2020-01-02', 'USD', 2 FROM accounts", "statements_month_check"),
    ],
)  # fmt: skip
def test_what_was_closed_stays_and_lines_take_only_their_own(
    closed: Caller, statement: str, why: str
) -> None:
    with pytest.raises(DBAPIError, match=why), transaction() as db:
        db.execute(text(statement))


def test_usage_goes_only_on_a_line_of_its_own_account(books: str) -> None:
    # given a month being closed, and somebody else's charge
    caller, other = account(), account("other")
    used(caller, 2, at=IN_LAST)
    used(other, 1, at=IN_LAST)
    assert not further(caller, LAST, rows=1)

    # then
    theirs = "UPDATE usage SET statement_line = (SELECT id FROM statement_lines) WHERE account_id = :other"
    with pytest.raises(DBAPIError, match="belongs on an open line"), transaction() as db:
        db.execute(text(theirs), {"other": other.account_id})
    close(caller, LAST)


@pytest.mark.parametrize(
    ("statement", "violation"),
    [
        ("UPDATE usage SET statement_line = NULL WHERE statement_line IS NOT NULL",
         "statement line differs from its usage"),
        ("UPDATE usage SET statement_line = (SELECT id FROM statement_lines)", "statement line differs from its usage"),
        ("UPDATE usage SET statement_line = 4711", "usage on a line that is not its own"),
        ("UPDATE statements SET total = 7", "statement that does not add up"),
        ("UPDATE usage SET at = at + interval '3 months'", "statement line differs from its usage"),
        ("UPDATE usage SET model = 'beta'", "usage on a line that is not its own"),
        ("INSERT INTO reversals (frame_id, account_id, reason) SELECT frame_id, account_id, 'x' FROM usage LIMIT 1",
         "reason without a reversal"),
        ("UPDATE usage SET entry = 1, amount = -amount WHERE statement_line IS NULL",
         "reversal that is not of a charge"),
    ],
)  # fmt: skip
def test_the_audit_sees_what_slipped_past_the_guards(closed: Caller, statement: str, violation: str) -> None:
    with transaction() as db:
        db.execute(text("SET LOCAL session_replication_role = replica"))
        db.execute(text(statement))
        found = {v.violation for v in ledger.audit(db)}
        db.rollback()

    assert violation in found


# ------------------------------------------------------------------------------------------------ over HTTP


@pytest.fixture
def api(books: str) -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        yield client


def as_(caller: Caller, role: Role) -> dict[str, str]:
    with transaction() as db:
        return {"Authorization": f"Bearer {accounts.issue_key(db, owner(caller), role=role)[1]}"}


Asking = Callable[..., Any]


@pytest.fixture
def asking(api: TestClient) -> Asking:
    """GET a statement of last month as somebody, with parameters."""

    def ask_for(who: dict[str, str], month: str = f"{LAST:%Y-%m}", **params: str) -> Any:
        return api.get(f"/v1/statements/{month}", headers=who, params=params)

    return ask_for


def test_a_statement_is_its_accounts_and_an_admins(books: str, api: TestClient, asking: Asking) -> None:
    # given
    acme, other = account(), account("other")
    used(acme, 3, at=IN_LAST)
    mine, theirs, admin = as_(acme, Role.READ), as_(other, Role.SUBMIT), as_(other, Role.ADMIN)

    # then
    assert asking(mine).json()["total"] == "0.01"
    assert asking(mine, account="acme").json()["exact"] == "0.0096"
    assert asking(theirs).json()["lines"] == []
    assert asking(theirs, account="acme").status_code == 404
    assert asking(admin, account="acme").json()["status"] == "open"
    assert asking(admin, account="nobody").status_code == 404
    assert asking(mine, "2026-13").json()["errors"][0]["field"] == "month"
    assert asking(mine, format="pdf").json()["errors"][0]["field"] == "format"

    # and only an admin closes it
    path, body = f"/v1/statements/{LAST:%Y-%m}/close", {"account": "acme"}
    assert api.post(path, json=body, headers=mine).status_code == 403
    assert api.post(path, json=body, headers=admin).json()["status"] == "closed"
    assert api.post(path, json=body, headers=admin).json()["total"] == "0.01"
    assert api.post(path, json={"account": "nobody"}, headers=admin).status_code == 404
    assert api.post(f"/v1/statements/{THIS:%Y-%m}/close", json=body, headers=admin).status_code == 409
    listed = api.get("/v1/statements", headers=mine).json()["statements"]
    assert [(s["month"], s["total"]) for s in listed] == [(f"{LAST:%Y-%m}", "0.01")]


def test_a_statement_as_csv_adds_up_to_its_total(books: str, asking: Asking) -> None:
    acme = account()
    used(acme, 3, at=IN_LAST)
    used(acme, 1, model="flat", at=IN_LAST)
    mine = as_(acme, Role.READ)

    answer = asking(mine, format="csv")

    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert [(r["account"], r["model"], r["rate"], r["frames"], r["amount"]) for r in rows] == [
        ("acme", "alpha", "0.0032", "3", "0.01"),
        ("acme", "flat", "0.37", "1", "0.37"),
    ]
    assert [(r["quantity"], r["unit"]) for r in rows] == [(str(3 << 20), "pixel-step"), ("1", "image")]
    assert str(sum(Decimal(r["amount"]) for r in rows)) == asking(mine).json()["total"] == "0.38"


def test_a_line_of_the_page_can_be_worked_out_from_its_quantity(books: str, asking: Asking) -> None:
    # given a quantity that is no thousandth of a megapixel-step
    acme = account()
    used(acme, 1, at=IN_LAST, width=520, height=504)

    page = asking(as_(acme, Role.READ), format="html").text

    assert 520 * 504 * 4 == 1_048_320
    assert "1.000" in page
    assert "1,048,320 pixel-steps" in page
    assert Decimal(1_048_320) * Decimal("0.0032") / (1 << 20) == Decimal("0.00319921875")
    assert "0.00319921875 before rounding" in page


def test_a_statement_is_a_page_that_needs_nothing_from_elsewhere(books: str, asking: Asking) -> None:
    acme = account()
    used(acme, 2, model="flat", at=IN_LAST)
    mine = as_(acme, Role.READ)

    draft, page = asking(mine, format="html"), None
    close(acme, LAST)
    page = asking(mine, format="html")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://|src=|url\(|@import|<script|<link", page.text)
    assert f"<title>Statement acme · {LAST:%B %Y}</title>" in page.text
    assert "0.74&nbsp;USD" in page.text
    assert "@page" in page.text
    assert ">Draft<" in draft.text
    assert ">Draft<" not in page.text


def test_a_browser_gets_the_page_and_is_asked_for_the_key(
    books: str, api: TestClient, asking: Asking
) -> None:
    acme = account()
    mine = as_(acme, Role.READ)
    browser = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
    basic = {
        "Authorization": "Basic "
        + b64encode(mine["Authorization"].replace("Bearer ", "me:").encode()).decode()
    }

    page = asking(browser | basic)
    refused = api.get(f"/v1/statements/{THIS:%Y-%m}", headers=browser)

    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.headers["vary"] == asking(mine).headers["vary"] == "Accept"
    assert asking(browser | mine, format="csv").headers["content-type"] == "text/csv; charset=utf-8"
    assert asking(mine | {"Accept": "*/*"}).json()["account"] == "acme"
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"].startswith("Basic realm=")
    assert api.get("/v1/statements").headers["www-authenticate"].startswith("Bearer")


def test_the_schema_names_every_answer(api: TestClient) -> None:
    schema = api.get("/openapi.json").json()

    assert {"/v1/statements/{month}", "/v1/usage/export", "/v1/usage/hourly", "/v1/margin"} <= set(
        schema["paths"]
    )
    assert {"UsageEntry", "Closing", "NewReversal", "Statement"} <= set(schema["components"]["schemas"])
