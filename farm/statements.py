"""Statements: what an account owes for a month, in lines that add up to the last unit.

A month is closed in batches, each a transaction of its own: rows of usage that are on no line yet are put on
theirs. What commits after its month was closed is on the next statement, with its own time. An amount is rounded
once, a line at a time, when the month closes; until then everything is exact.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from decimal import (
    ROUND_FLOOR,
    ROUND_HALF_UP,
    Context,
    Decimal,
    FloatOperation,
    InvalidOperation,
    localcontext,
)
from enum import StrEnum
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from farm import pricing
from farm.db import sql
from farm.errors import Conflict, FarmError, Fault, Invalid, NotFound
from farm.tables import Account, Statement, StatementLine, Usage

LOCK = 0x73746D74  # "stmt"; an account's number beside it
BATCH = 20_000  # rows
FIRST, LAST = date(2000, 1, 1), date(9998, 12, 1)
ROUNDING = Context(prec=80, traps=[FloatOperation, InvalidOperation])

# decimals of a currency's minor unit (ISO 4217), where they are not two
_CODES = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    3: "BHD IQD JOD KWD LYD OMR TND",
    4: "CLF UYW",
}
DIGITS = {code: digits for digits, codes in _CODES.items() for code in codes.split()}


class Status(StrEnum):
    """Open: a draft, nothing is stated yet. Closing: lines are being filled. Closed: for good."""

    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Line:
    """What was used of one model by one method at one rate.

    frames: charges; reversed: reversals; late: of both, those from before the month. quantity: pixels × steps, or
    images, less what was reversed. exact: what that costs; amount: rounded to the minor unit.
    """

    model: str
    method: str
    rate: Decimal
    frames: int
    reversed: int
    late: int
    quantity: int
    exact: Decimal
    amount: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class Bill:
    """An account's month. digits: decimals of its currency. total is the sum of the lines' amounts."""

    account: str
    month: date
    currency: str
    digits: int
    status: Status
    lines: tuple[Line, ...]
    exact: Decimal
    total: Decimal
    closed_at: datetime | None


# ------------------------------------------------------------------------------------------------ months


def month_of(written: str) -> date:
    """The first day of a month written as 2026-11.

    Raises Invalid if it is none.
    """
    match = re.fullmatch(r"(\d{4})-(\d{2})", written, re.ASCII)
    if match and 1 <= int(match[2]) <= 12 and FIRST.year <= int(match[1]) <= LAST.year:
        return date(int(match[1]), int(match[2]), 1)
    raise Invalid([Fault("month", written, "allowed is a year and a month, as 2026-11")])


def month_after(month: date) -> date:
    return date(month.year + month.month // 12, month.month % 12 + 1, 1)


def start_of(month: date) -> datetime:
    return datetime(month.year, month.month, 1, tzinfo=UTC)


# ------------------------------------------------------------------------------------------------ rounding


def digits_of(currency: str) -> int:
    """Decimals of a currency's minor unit."""
    return DIGITS.get(currency, 2)


def spread(exact: Sequence[Decimal], digits: int) -> tuple[list[Decimal], Decimal]:
    """Round amounts so that they add up to their rounded sum: the largest remainders are rounded up.

    The sum is rounded half away from zero. Each amount moves by less than one unit, and one without a remainder
    not at all; of equal remainders the earlier goes up.
    """
    unit = Decimal(1).scaleb(-digits)
    with localcontext(ROUNDING):
        down = [amount.quantize(unit, ROUND_FLOOR) for amount in exact]
        total = pricing.total(exact).quantize(unit, ROUND_HALF_UP)
        missing = int((total - sum(down, Decimal(0))) / unit)
        order = sorted(range(len(exact)), key=lambda k: (down[k] - exact[k], k))
        for k in order[:missing]:
            down[k] += unit
    return down, total


def _rounded(lines: Sequence[Line], digits: int) -> tuple[tuple[Line, ...], Decimal]:
    amounts, total = spread([line.exact for line in lines], digits)
    return tuple(replace(line, amount=a) for line, a in zip(lines, amounts, strict=True)), total


# ------------------------------------------------------------------------------------------------ to look at


def find(db: Session, account: Account, month: date) -> Bill:
    """The statement of a month; one that is not closed is a draft of what it would be now.

    Raises NotFound for a month that has none: it is still to come, or a later one was closed without it.
    """
    row = _row(db, account, month)
    if row is not None and row.closed_at is not None:
        return _closed(account, row, _lines(db, row))
    latest = _latest(db, account)
    if month > _now(db).date() or (row is None and latest is not None and latest.month > month):
        raise NotFound("there is no statement of that month", account=account.name, month=f"{month:%Y-%m}")
    lines = _merged([*(_lines(db, row) if row else ()), *_draft(db, account, month, latest)])
    digits = digits_of(account.currency)
    shown, total = _rounded(lines, digits)
    return Bill(
        account=account.name,
        month=month,
        currency=account.currency,
        digits=digits,
        status=Status.CLOSING if row else Status.OPEN,
        lines=shown,
        exact=pricing.total(line.exact for line in lines),
        total=total,
        closed_at=None,
    )


def every(db: Session, account: Account) -> list[Bill]:
    """The account's closed statements, newest first, without their lines."""
    closed = select(Statement).where(Statement.account_id == account.id, Statement.closed_at.is_not(None))
    return [_closed(account, row, ()) for row in db.scalars(closed.order_by(Statement.month.desc()))]


def _closed(account: Account, row: Statement, lines: Sequence[Line]) -> Bill:
    assert row.total is not None
    return Bill(
        account=account.name,
        month=row.month,
        currency=row.currency,
        digits=row.digits,
        status=Status.CLOSED,
        lines=tuple(lines),
        exact=pricing.total(line.exact for line in lines),
        total=row.total,
        closed_at=row.closed_at,
    )


def _row(db: Session, account: Account, month: date) -> Statement | None:
    return db.scalar(select(Statement).where(Statement.account_id == account.id, Statement.month == month))


def _latest(db: Session, account: Account) -> Statement | None:
    mine = select(Statement).where(Statement.account_id == account.id)
    return db.scalar(mine.order_by(Statement.month.desc()).limit(1))


def _lines(db: Session, row: Statement) -> list[Line]:
    found = db.scalars(
        select(StatementLine)
        .where(StatementLine.statement_id == row.id)
        .order_by(StatementLine.model, StatementLine.method, StatementLine.rate)
    )
    return [
        Line(
            x.model,
            x.method,
            x.rate,
            x.frames,
            x.reversed,
            x.late,
            x.quantity,
            x.exact,
            x.amount or Decimal(0),
        )
        for x in found
    ]


def _draft(db: Session, account: Account, month: date, latest: Statement | None) -> list[Line]:
    rows = db.execute(
        sql("statement_draft"),
        {
            "account_id": account.id,
            "since": start_of(month),
            "until": start_of(month_after(month)),
            "closed": start_of(month_after(latest.month) if latest else FIRST),
        },
    )
    return [Line(**{**r._mapping, "quantity": int(r.quantity)}) for r in rows]


def _merged(lines: Sequence[Line]) -> list[Line]:
    """One line for each model, method and rate: some rows may be stated already, others not yet."""
    merged: dict[tuple[str, str, Decimal], Line] = {}
    for line in lines:
        key = (line.model, line.method, line.rate)
        before = merged.get(key)
        merged[key] = line if before is None else _sum(before, line)
    return [merged[key] for key in sorted(merged)]


def _sum(one: Line, other: Line) -> Line:
    return Line(
        one.model, one.method, one.rate, one.frames + other.frames, one.reversed + other.reversed,
        one.late + other.late, one.quantity + other.quantity, pricing.total([one.exact, other.exact]),
    )  # fmt: skip


def _now(db: Session) -> datetime:
    now: datetime = db.scalars(select(func.clock_timestamp())).one()
    return now


# ------------------------------------------------------------------------------------------------ closing


def close_further(db: Session, account: Account, month: date, *, rows: int = BATCH) -> bool:
    """Put another batch of rows on a month's statement, and close it once there are none left.

    Returns whether it is closed. Call it until it is, each time in a transaction of its own: a crash between two
    leaves a statement that the next call goes on with. Memory and locks are a batch's.

    Raises Conflict if the month is not over, or an earlier one with usage is not closed, or a later one is.
    """
    lock = text("SELECT pg_advisory_xact_lock(:lock, hashtext(:account))")
    db.execute(lock, {"lock": LOCK, "account": str(account.id)})
    row = _row(db, account, month) or _begin(db, account, month)
    if row.closed_at is not None:
        return True
    if _take(db, account, row, rows) == rows:
        return False
    _finish(db, row)
    return True


def _begin(db: Session, account: Account, month: date) -> Statement:
    shown, now = f"{month:%Y-%m}", _now(db)
    if now < start_of(month_after(month)):
        raise Conflict(
            f"{shown} is not over: it can be closed from {month_after(month)}T00:00Z on", month=shown
        )
    latest = _latest(db, account)
    if latest is not None and latest.month > month:
        raise Conflict(f"{latest.month:%Y-%m} is closed already", month=shown, account=account.name)
    if latest is not None and latest.closed_at is None:
        raise Conflict(f"{latest.month:%Y-%m} is being closed; finish that first", month=shown)
    if (earlier := _unclosed_before(db, account, month, latest)) is not None:
        raise Conflict(f"close {earlier:%Y-%m} first", month=shown, account=account.name)
    row = Statement(
        account_id=account.id, month=month, currency=account.currency, digits=digits_of(account.currency)
    )
    db.add(row)
    db.flush()
    return row


def _unclosed_before(db: Session, account: Account, month: date, latest: Statement | None) -> date | None:
    """An earlier month that has usage and no statement."""
    closed = start_of(month_after(latest.month) if latest else FIRST)
    first = db.scalar(
        select(func.min(Usage.at)).where(
            Usage.account_id == account.id,
            Usage.statement_line.is_(None),
            Usage.at >= closed,
            Usage.at < start_of(month),
        )
    )
    return first and first.astimezone(UTC).date().replace(day=1)


def _take(db: Session, account: Account, row: Statement, rows: int) -> int:
    taken: Any = db.execute(
        sql("statement_take"),
        {
            "statement_id": row.id,
            "account_id": account.id,
            "since": start_of(row.month),
            "until": start_of(month_after(row.month)),
            "n": rows,
        },
    ).one()
    if taken.due != taken.stated:
        raise FarmError("usage was taken by somebody else meanwhile", due=taken.due, stated=taken.stated)
    return int(taken.due)


def _finish(db: Session, row: Statement) -> None:
    """Round the lines, and close. The database checks that they add up."""
    lines = db.scalars(
        select(StatementLine)
        .where(StatementLine.statement_id == row.id)
        .order_by(StatementLine.model, StatementLine.method, StatementLine.rate)
    ).all()
    amounts, total = spread([line.exact for line in lines], row.digits)
    for line, amount in zip(lines, amounts, strict=True):
        line.amount = amount
    db.flush()
    row.total, row.closed_at = total, _now(db)
    db.flush()
