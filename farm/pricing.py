"""Prices: dated rates that never change, and the exact arithmetic of what a quantity costs.

A megapixel is 1024 × 1024 pixels. Quantities are integers, rates are decimals, and the only factor between them,
1/2²⁰, is exact: nothing is divided and nothing is rounded here.

What a model costs in a currency is a line of dated prices, everybody's or one account's own: each is in force until
the next one starts, whichever of the methods it goes by; a reused image has a line of its own. The catalog starts
everybody's lines; once an admin has set a price in one, that line is the admins' alone and the catalog leaves it be.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Context, Decimal, FloatOperation, Inexact, localcontext
from typing import Annotated, Any
from uuid import UUID

from pydantic import BeforeValidator
from sqlalchemy import func, or_, select, text
from sqlalchemy.dialects.postgresql import Range, insert
from sqlalchemy.orm import Session

from farm.catalog import Catalog, Method
from farm.db import array, hot
from farm.errors import Fault, Invalid, NotFound
from farm.tables import Account, PriceBook, PriceRow

EXACT = Context(prec=80, traps=[Inexact, FloatOperation])
FACTOR = {
    Method.MPX_STEP: Decimal("0.00000095367431640625"),
    Method.IMAGE: Decimal(1),
    Method.REUSE: Decimal(1),
}


LOCK = 0x70726963  # "pric"
ADMIN = "admin"
SINCE_EVER = datetime(2000, 1, 1, tzinfo=UTC)
MAX_RATE, MAX_DECIMALS = 10**9, 12  # with them any quantity of 63 bits has an exact amount

Line = tuple[str, str, bool]  # model, currency, and whether it is the price of reuse


def _exact(value: object) -> Decimal:
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,12}(\.\d{1,12})?", str(value), re.ASCII):
        raise ValueError(
            "allowed are amounts of 0 and more as text, with up to 12 digits before and after the point"
        )
    if not isinstance(value, str | int | Decimal):
        raise ValueError("write an amount as text, so that it stays exact")
    return Decimal(value)


Amount = Annotated[Decimal, BeforeValidator(_exact, json_schema_input_type=str)]


@dataclass(frozen=True, slots=True)
class DatedPrice:
    """A price and when it is in force. version: counts up in its line. ends: None while no other is planned."""

    id: int
    account_id: UUID | None
    model: str
    method: Method
    currency: str
    rate: Decimal
    version: int
    starts: datetime
    ends: datetime | None
    source: str
    set_at: datetime


@dataclass(frozen=True, slots=True)
class Rate:
    """The price in force for one model, for one account."""

    price_id: int
    model: str
    method: Method
    currency: str
    rate: Decimal

    def amount(self, quantity: int) -> Decimal:
        """What that quantity costs, to the last digit."""
        with localcontext(EXACT):
            return quantity * self.rate * FACTOR[self.method]


def total(amounts: Iterable[Decimal]) -> Decimal:
    with localcontext(EXACT):
        return sum(amounts, Decimal(0))


def shown(amount: Decimal) -> str:
    """An amount as JSON carries it: all its digits, no exponent, no trailing zeros."""
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def sync(db: Session, models: Catalog) -> int:
    """Bring everybody's prices up to the catalog: a changed rate closes the old price and starts another.

    A line in which an admin has set a price stays as it is. Returns how many started. Safe to run by several at once.
    """
    now = _locked(db)
    lines = _lines_from(db, None, now)
    started = 0
    for model in models.values():
        for method, rate in model.price.rates().items():
            line = lines.get((model.name, model.price.currency, method is Method.REUSE), [])
            last = line[-1] if line else None
            if any(p.source == ADMIN for p in line):
                continue
            if last is None or (last.method, last.rate) != (method, rate):
                book = _book(db, None, model.name, method, model.price.currency)
                _start(db, line, PriceRow(
                    book_id=book, method=method, currency=model.price.currency, rate=rate, valid=Range(now, None)
                ))  # fmt: skip
                started += 1
    return started


def start_free_reuse(db: Session, model: str, currency: str) -> None:
    """Let reusing an image of a model cost nothing in a currency since ever, as far as nobody set a price for it."""
    _locked(db)
    line = _lines_from(db, None, SINCE_EVER).get((model, currency, True), [])
    if not line or line[0].valid.lower is None or line[0].valid.lower > SINCE_EVER:
        book = _book(db, None, model, Method.REUSE, currency)
        _start(db, line, PriceRow(
            book_id=book, method=Method.REUSE, currency=currency, rate=Decimal(0), valid=Range(SINCE_EVER, None)
        ))  # fmt: skip


def set_price(
    db: Session,
    models: Catalog,
    *,
    account: Account | None,
    model: str,
    rate: Decimal,
    method: Method | None = None,
    currency: str | None = None,
    since: datetime | None = None,
    set_by: UUID | None = None,
) -> DatedPrice:
    """Start a price of a model, for one account or for everybody, now or at a moment to come.

    It is in force until the next one that is planned; one planned for the same moment gives way. method: the
    catalog's if left out; currency: the account's, or the catalog's.
    Raises Invalid for what is not in the catalog, another currency than the account's, or a moment that has passed.
    """
    now, pays = _locked(db), None if account is None else account.currency
    entry = models.get(model)
    if entry is None:
        raise Invalid([Fault("model", model, f"allowed are {', '.join(models)}")])
    method = method or entry.price.method
    currency, since = currency or pays or entry.price.currency, since or now
    if faults := _faults(rate, currency, since, now=now, owned=pays):
        raise Invalid(faults)
    account_id = None if account is None else account.id
    line = _lines_from(db, account_id, since).get((model, currency, method is Method.REUSE), [])
    book = _book(db, account_id, model, method, currency)
    new = PriceRow(
        book_id=book, method=method, currency=currency, rate=rate, valid=Range(since, None),
        source=ADMIN, set_by=set_by,
    )  # fmt: skip
    _start(db, line, new)
    return next(p for p in every(db, account_id, model=model, past=True) if p.id == new.id)


def withdraw(
    db: Session,
    models: Catalog,
    *,
    account: Account | None,
    model: str,
    since: datetime,
    method: Method | None = None,
    currency: str | None = None,
) -> DatedPrice:
    """Take a planned price out again: the one before it stays in force, until the next one that is planned.

    method: only whether it is the price of reuse counts. currency: the account's if left out, or the catalog's.
    Returns what the price would have been. Raises Invalid for a moment that has passed, NotFound if none is planned
    for that moment.
    """
    now = _locked(db)
    if since <= now:
        raise Invalid(
            [Fault("since", since.isoformat(), "allowed are moments to come: what was in force stays")]
        )
    entry, account_id = models.get(model), None if account is None else account.id
    currency = currency or (account.currency if account else entry.price.currency if entry else "")
    line = _lines_from(db, account_id, now).get((model, currency, method is Method.REUSE), [])
    planned = next((row for row in line if row.valid.lower == since), None)
    if planned is None:
        raise NotFound(
            "no price is planned for that moment", model=model, currency=currency, since=since.isoformat()
        )
    shown = next(p for p in every(db, account_id, model=model) if p.id == planned.id)
    db.delete(planned)
    db.flush()
    for row in line:
        if row.valid.upper == since:
            row.valid = Range(row.valid.lower, planned.valid.upper)
    db.flush()
    return shown


def _faults(
    rate: Decimal, currency: str, since: datetime, *, now: datetime, owned: str | None
) -> list[Fault]:
    faults = []
    exponent = rate.as_tuple().exponent
    if not isinstance(exponent, int) or not 0 <= rate < MAX_RATE or -exponent > MAX_DECIMALS:
        allowed = f"allowed are 0 and more, below {MAX_RATE}, with up to {MAX_DECIMALS} decimals"
        faults.append(Fault("rate", str(rate), allowed))
    if not re.fullmatch("[A-Z]{3}", currency) or currency != (owned or currency):
        allowed = f"the account pays in {owned}" if owned else "allowed are three capital letters, as USD"
        faults.append(Fault("currency", currency, allowed))
    if since < now:
        allowed = "allowed are moments to come: a change never touches what was admitted"
        faults.append(Fault("since", since.isoformat(), allowed))
    return faults


def _locked(db: Session) -> datetime:
    """Let nobody else change prices until this transaction ends. Returns the time: later than any they started at."""
    db.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
    now: datetime = db.scalars(select(func.clock_timestamp())).one()
    return now


def _lines_from(db: Session, account_id: UUID | None, since: datetime) -> dict[Line, list[PriceRow]]:
    """Everybody's prices, or an account's own, as far as they are in force at a moment or later, by line, in order."""
    rows = db.execute(
        select(PriceRow, PriceBook.model)
        .join(PriceBook, PriceBook.id == PriceRow.book_id)
        .where(
            PriceBook.account_id.is_not_distinct_from(account_id),
            or_(func.upper_inf(PriceRow.valid), func.upper(PriceRow.valid) > since),
        )
        .order_by(func.lower(PriceRow.valid))
    ).tuples()
    lines: dict[Line, list[PriceRow]] = {}
    for row, model in rows:
        lines.setdefault((model, row.currency, row.method == Method.REUSE), []).append(row)
    return lines


def _start(db: Session, line: Sequence[PriceRow], new: PriceRow) -> None:
    """Put a price into its line: what is in force then ends, and it ends itself where the next one starts."""
    since, until = new.valid.lower, None
    for row in line:
        lower = row.valid.lower
        assert since is not None
        assert lower is not None
        if lower == since:
            db.delete(row)
        elif lower < since:
            row.valid = Range(lower, since)
        elif until is None:
            until = lower
    db.flush()
    new.valid = Range(since, until)
    db.add(new)
    db.flush()


def _book(db: Session, account_id: UUID | None, model: str, method: Method, currency: str) -> int:
    values = {"account_id": account_id, "model": model, "method": method, "currency": currency}
    added = insert(PriceBook).values(values).on_conflict_do_update(
        constraint="price_books_account_id_model_method_currency_key", set_={"model": model}
    )  # fmt: skip
    return db.scalars(added.returning(PriceBook.id)).one()


def current(db: Session, *, account_id: UUID, currency: str, models: Mapping[str, Method]) -> dict[str, Rate]:
    """The prices in force now, the account's own before everybody's: of rendering, by whichever method, or of reuse.

    Raises Invalid naming the models that have none in this currency.
    """
    name, values = asking(account_id, currency, models)
    return chosen(hot(db, name, values), currency, models)


def asking(account_id: UUID, currency: str, models: Iterable[str]) -> tuple[str, Mapping[str, Any]]:
    """The statement of farm/sql that finds the prices in force, and its values: to be sent along with others."""
    return "prices", {"models": array(models), "currency": currency, "account_id": account_id}


def chosen(rows: Iterable[Any], currency: str, models: Mapping[str, Method]) -> dict[str, Rate]:
    """The prices among what asking() found. Raises Invalid as current() does."""
    rates = {
        r.model: Rate(r.id, r.model, Method(r.method), currency, r.rate)
        for r in rows
        if (r.method == Method.REUSE) is (models[r.model] is Method.REUSE)
    }
    if missing := sorted(set(models) - set(rates)):
        raise Invalid([Fault("model", m, f"it has no price in {currency}") for m in missing])
    return rates


def every(
    db: Session,
    account_id: UUID | None,
    *,
    currency: str | None = None,
    model: str | None = None,
    past: bool = False,
) -> list[DatedPrice]:
    """Everybody's prices and this account's own, by model and date: in force and planned, or past ones too."""
    query = (
        select(PriceRow, PriceBook.model, PriceBook.account_id)
        .join(PriceBook, PriceBook.id == PriceRow.book_id)
        .where(or_(PriceBook.account_id.is_(None), PriceBook.account_id == account_id))
        .order_by(PriceBook.model, PriceBook.currency, PriceBook.account_id.nulls_first())
        .order_by(PriceRow.method == Method.REUSE, func.lower(PriceRow.valid))
    )
    if currency is not None:
        query = query.where(PriceBook.currency == currency)
    if model is not None:
        query = query.where(PriceBook.model == model)
    now = db.scalars(select(func.clock_timestamp())).one()
    versions: Counter[tuple[UUID | None, Line]] = Counter()
    found = []
    for row, name, owner in db.execute(query).tuples():
        line = (owner, (name, row.currency, row.method == Method.REUSE))
        versions[line] += 1
        starts, ends = row.valid.lower, row.valid.upper
        assert starts is not None
        if past or ends is None or ends > now:
            found.append(DatedPrice(
                row.id, owner, name, Method(row.method), row.currency, row.rate, versions[line], starts, ends,
                row.source, row.set_at,
            ))  # fmt: skip
    return found
