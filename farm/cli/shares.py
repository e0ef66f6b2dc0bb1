"""Shares of a margin as rows, one for each name and currency: currencies are not added up, nor drawn by one scale."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from farm.answers import MarginShare


@dataclass(frozen=True, slots=True)
class Row:
    """What one model, pool or account brought in of a currency, and the GPU time of the accounts that pay in it.

    currency: empty if nothing was delivered. rate: revenue for an hour of that time.
    """

    share: MarginShare
    currency: str
    amount: Decimal
    gpu_s: Decimal
    rate: Decimal | None


def rows(shares: Iterable[MarginShare]) -> list[Row]:
    """In the order of the shares, then by currency."""
    return [row for share in shares for row in _of(share)]


def _of(share: MarginShare) -> list[Row]:
    found = [
        Row(
            share,
            currency,
            Decimal(amount),
            Decimal(share.gpu_s_by_currency[currency]),
            Decimal(share.per_gpu_hour[currency]) if currency in share.per_gpu_hour else None,
        )
        for currency, amount in share.revenue.items()
    ]
    return found or [Row(share, "", Decimal(0), Decimal(0), None)]


def by_currency(all_rows: Iterable[Row]) -> dict[str, list[Row]]:
    """By the currencies' names; those without one are last."""
    found: dict[str, list[Row]] = {}
    for row in sorted(all_rows, key=lambda row: (not row.currency, row.currency)):
        found.setdefault(row.currency, []).append(row)
    return found


def longest(some: Sequence[Row]) -> tuple[Decimal, Decimal]:
    """The highest revenue and the longest GPU time, which are full bars."""
    return max((r.amount for r in some), default=Decimal(0)), max((r.gpu_s for r in some), default=Decimal(0))
