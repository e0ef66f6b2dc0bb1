"""Revenue against GPU time: what each model, pool and account brought in, and what it took.

A delivered frame's part of its pack's GPU time is its account's. Everything else the GPUs were there for is the
farm's own: frames that were not delivered, packs that failed or were lost, cold starts, and waiting for work.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from farm import pricing
from farm.db import sql
from farm.tables import Account

MICROS = 1_000_000
# it reads a large part of some tables, and joins what no statistics tell of
FOR_ALL = text("SET LOCAL enable_seqscan = on; SET LOCAL enable_nestloop = off")


@dataclass(frozen=True, slots=True)
class Share:
    """What one model, pool or account brought in and took.

    revenue: amount by currency. gpu_us_by_currency: microseconds of GPU time that were delivered, by the currency of
    who got it; undelivered_us: of packs of the same, but booked to the farm (an account never has any).
    """

    name: str
    frames: int
    reversed: int
    revenue: Mapping[str, Decimal]
    gpu_us_by_currency: Mapping[str, int]
    undelivered_us: int

    @property
    def gpu_us(self) -> int:
        return sum(self.gpu_us_by_currency.values())


@dataclass(frozen=True, slots=True)
class PoolTime:
    """Microseconds that a pool's workers were there, and what became of them; together the three are up_us.

    other_us: cold starts, waiting for work, and packs that failed or were lost. Packs of several workers of a pool
    count each; where a worker's time is not known, up_us is what was rendered.
    """

    name: str
    up_us: int
    delivered_us: int
    undelivered_us: int
    other_us: int


@dataclass(frozen=True, slots=True)
class Margin:
    """The farm in [since, until)."""

    since: datetime
    until: datetime
    models: tuple[Share, ...]
    pools: tuple[Share, ...]
    accounts: tuple[Share, ...]
    time: tuple[PoolTime, ...]


def find(db: Session, *, since: datetime, until: datetime) -> Margin:
    """Revenue and GPU time of charges made and packs closed in [since, until).

    The parts of a pack are exactly its gpu_ms, and those of adjacent times add up.
    """
    window = {"since": since, "until": until}
    db.execute(FOR_ALL)
    rows = db.execute(sql("margin"), window).all()
    names = dict(db.execute(select(Account.id, Account.name)).tuples().all())
    up = {r.pool: int(r.up_s * MICROS) for r in db.execute(sql("uptime"), window)}
    pools = _shares((r.pool, r) for r in rows)
    return Margin(
        since=since,
        until=until,
        models=_shares((r.model, r) for r in rows),
        pools=pools,
        accounts=_shares((names[r.account_id], r) for r in rows if r.account_id is not None),
        time=tuple(_time(pool, up) for pool in _with_idle(pools, up)),
    )


def _shares(rows: Iterable[tuple[str, Any]]) -> tuple[Share, ...]:
    grouped: dict[str, list[Any]] = defaultdict(list)
    for name, row in rows:
        grouped[name].append(row)
    return tuple(_share(name, grouped[name]) for name in sorted(grouped))


def _share(name: str, rows: Iterable[Any]) -> Share:
    amounts: dict[str, list[Decimal]] = defaultdict(list)
    delivered: dict[str, int] = defaultdict(int)
    frames = taken_back = undelivered = 0
    for row in rows:
        frames += row.frames
        taken_back += row.reversed
        if row.account_id is None:
            undelivered += int(row.gpu_us)
        else:
            delivered[row.currency] += int(row.gpu_us)
            amounts[row.currency].append(row.revenue)
    revenue = {currency: pricing.total(parts) for currency, parts in sorted(amounts.items())}
    return Share(name, frames, taken_back, revenue, dict(sorted(delivered.items())), undelivered)


def _with_idle(pools: Iterable[Share], up: Mapping[str, int]) -> list[Share]:
    """The pools that rendered, and those that only were there. Reused images have none."""
    known = {p.name: p for p in pools if p.gpu_us or p.undelivered_us}
    return [known.get(name) or Share(name, 0, 0, {}, {}, 0) for name in sorted({*known, *up})]


def _time(pool: Share, up: Mapping[str, int]) -> PoolTime:
    rendered = pool.gpu_us + pool.undelivered_us
    there = max(rendered, up.get(pool.name, 0))
    return PoolTime(pool.name, there, pool.gpu_us, pool.undelivered_us, there - rendered)
