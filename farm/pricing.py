"""Prices: dated rates that never change, and the exact arithmetic of what a quantity costs.

A megapixel is 1024 × 1024 pixels. Quantities are integers, rates are decimals, and the only factor between them,
1/2²⁰, is exact: nothing is divided and nothing is rounded here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Context, Decimal, FloatOperation, Inexact, localcontext
from uuid import UUID

from sqlalchemy import func, or_, select
from sqlalchemy.dialects.postgresql import Range, insert
from sqlalchemy.orm import Session

from farm.catalog import Catalog, Method
from farm.errors import Fault, Invalid
from farm.tables import PriceBook, PriceRow

EXACT = Context(prec=80, traps=[Inexact, FloatOperation])
FACTOR = {Method.MPX_STEP: Decimal("0.00000095367431640625"), Method.IMAGE: Decimal(1)}


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

    Returns how many started. Safe to run by several at once.
    """
    books = {m.name: _book(db, m.name, m.price.method, m.price.currency) for m in models.values()}
    current = {
        p.book_id: p
        for p in db.scalars(
            select(PriceRow)
            .where(PriceRow.book_id.in_(books.values()), func.upper_inf(PriceRow.valid))
            .with_for_update()
        )
    }
    now: datetime = db.scalars(select(func.clock_timestamp())).one()
    started = 0
    for model in models.values():
        old = current.get(books[model.name])
        if old is not None and old.rate == model.price.rate:
            continue
        if old is not None:
            old.valid = Range(old.valid.lower, now)
            db.flush()
        db.add(
            PriceRow(
                book_id=books[model.name],
                method=model.price.method,
                currency=model.price.currency,
                rate=model.price.rate,
                valid=Range(now, None),
            )
        )
        started += 1
    db.flush()
    return started


def _book(db: Session, model: str, method: Method, currency: str) -> int:
    values = {"account_id": None, "model": model, "method": method, "currency": currency}
    added = insert(PriceBook).values(values).on_conflict_do_update(
        constraint="price_books_account_id_model_method_currency_key", set_={"model": model}
    )  # fmt: skip
    return db.scalars(added.returning(PriceBook.id)).one()


def current(db: Session, *, account_id: UUID, currency: str, models: Mapping[str, Method]) -> dict[str, Rate]:
    """The prices in force now, the account's own before everybody's.

    Raises Invalid naming the models that have none in this currency.
    """
    rows = db.execute(
        select(PriceRow, PriceBook.model, PriceBook.account_id)
        .join(PriceBook, PriceBook.id == PriceRow.book_id)
        .where(
            PriceBook.model.in_(models),
            PriceBook.currency == currency,
            or_(PriceBook.account_id.is_(None), PriceBook.account_id == account_id),
            PriceRow.valid.contains(func.now()),
        )
        .order_by(PriceBook.account_id.nulls_first())
    )
    rates = {
        model: Rate(row.id, model, Method(row.method), row.currency, row.rate)
        for row, model, _ in rows
        if row.method == models[model]
    }
    if missing := sorted(set(models) - set(rates)):
        raise Invalid([Fault("model", m, f"it has no price in {currency}") for m in missing])
    return rates
