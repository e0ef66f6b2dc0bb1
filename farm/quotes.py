"""Quotes: what a job costs at most, to the last digit, at prices that stay for a while; and when it may be done.

A quote keeps its prices and a hash of what was quoted. A job submitted against it has to ask for just that, once and
in time, and gets those prices frozen into its frames, whatever they are by then.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import groupby
from math import ceil
from uuid import UUID

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from farm import ids
from farm.accounts import Caller
from farm.catalog import Catalog, Method
from farm.db import sql
from farm.errors import Fault, Gone, Invalid, NotFound
from farm.pricing import Rate
from farm.settings import settings
from farm.tables import Quote, QuotePrice


@dataclass(frozen=True, slots=True)
class Part:
    """What a job asks of one model at one price. quantity: pixels × steps, or images."""

    rate: Rate
    frames: int
    quantity: int
    work: int

    @property
    def amount(self) -> Decimal:
        return self.rate.amount(self.quantity)


@dataclass(frozen=True, slots=True)
class Quoted:
    """A quote, and when its job may start and end: None where nothing was measured, or no worker is there."""

    id: UUID
    frames: int
    currency: str
    amount: Decimal
    parts: tuple[Part, ...]
    expires_at: datetime
    starts: datetime | None
    ends: datetime | None


def digest(specs: Iterable[str]) -> bytes:
    """Hash of what is asked for: the frames' specs as JSON, in order; seeds cost nothing. 32 bytes."""
    found = hashlib.sha256()
    for spec, run in groupby(specs):
        found.update(f"{sum(1 for _ in run)} {spec}\n".encode())
    return found.digest()


def make(
    db: Session,
    caller: Caller,
    *,
    specs_sha256: bytes,
    amount: Decimal,
    parts: Sequence[Part],
    priority: int,
    models: Catalog,
) -> Quoted:
    """Store a quote of one part for each model."""
    now: datetime = db.scalars(select(func.clock_timestamp())).one()
    quote = Quote(
        id=ids.new_id(ids.clock_ms(db)),
        account_id=caller.account_id,
        api_key_id=caller.key_id,
        specs_sha256=specs_sha256,
        frames=sum(p.frames for p in parts),
        currency=caller.currency,
        amount=amount,
        created_at=now,
        expires_at=now + timedelta(seconds=settings().quote_s),
    )
    db.add(quote)
    db.flush()
    db.add_all(
        QuotePrice(
            quote_id=quote.id, account_id=caller.account_id, model=p.rate.model, price_id=p.rate.price_id,
            method=p.rate.method, currency=p.rate.currency, rate=p.rate.rate,
        )
        for p in parts
    )  # fmt: skip
    db.flush()
    starts, ends = expected(db, parts, priority=priority, models=models) or (None, None)
    return Quoted(
        quote.id, quote.frames, quote.currency, amount, tuple(parts), quote.expires_at, starts, ends
    )


def take(db: Session, caller: Caller, quote_id: UUID, specs_sha256: bytes) -> tuple[Quote, dict[str, Rate]]:
    """The account's quote, locked so that one job has it, and its prices by model.

    Raises NotFound for another account's as for one that does not exist, Gone if it has expired or a
    job has it, Invalid if it was made for something else.
    """
    quote = db.scalar(
        select(Quote).where(Quote.id == quote_id, Quote.account_id == caller.account_id).with_for_update()
    )
    name = ids.public("quo", quote_id)
    if quote is None:
        raise NotFound(quote=name)
    if quote.job_id is not None:
        raise Gone("a job was submitted against this quote", quote=name, job=ids.public("job", quote.job_id))
    if quote.expires_at <= db.scalars(select(func.clock_timestamp())).one():
        raise Gone(
            "this quote has expired; ask for another", quote=name, expired_at=quote.expires_at.isoformat()
        )
    if quote.specs_sha256 != specs_sha256:
        raise Invalid(
            [Fault("quote", name, "it was made for other specs; a job against it asks for just the same")]
        )
    prices = db.scalars(select(QuotePrice).where(QuotePrice.quote_id == quote_id))
    return quote, {p.model: Rate(p.price_id, p.model, Method(p.method), p.currency, p.rate) for p in prices}


def forget(db: Session) -> int:
    """Drop quotes that expired a day ago and that no job has. Returns how many."""
    gone = "DELETE FROM quotes WHERE job_id IS NULL AND expires_at < now() - interval '1 day'"
    return int(getattr(db.execute(text(gone)), "rowcount", 0))


# ------------------------------------------------------------------------------------------------ when


def expected(
    db: Session, parts: Sequence[Part], *, priority: int, models: Catalog
) -> tuple[datetime, datetime] | None:
    """When the first frame of such a job is handed out, and when the last is done, if nothing more urgent comes.

    From the pace of the last hour, the work that is queued as urgent or more so, and half of what is on devices. None
    if a model that counts was not rendered in that hour, or no worker has it.
    """
    paces = {r.model: r.ms / 1000 / float(r.work) for r in db.execute(sql("pace"))}
    pools = {models[p.rate.model].pool for p in parts}
    about = {"priority": priority, "models": [m.name for pool in pools for m in models.pool(pool)]}
    queued = {r.model: float(r.work) for r in db.execute(sql("queue_ahead"), about)}
    workers = _workers(db)
    spans = []
    for pool in pools:
        own = [p for p in parts if models[p.rate.model].pool == pool]
        span = _span(own, pool, models=models, paces=paces, queued=queued, workers=workers)
        if span is None:
            return None
        spans.append(span)
    now = db.scalars(select(func.clock_timestamp())).one()
    starts, ends = min(s for s, _ in spans), max(e for _, e in spans)
    return now + timedelta(seconds=starts), now + timedelta(seconds=ends)


def _span(
    parts: Sequence[Part],
    pool: str,
    *,
    models: Catalog,
    paces: Mapping[str, float],
    queued: Mapping[str, float],
    workers: Mapping[str, int],
) -> tuple[float, float] | None:
    """Seconds until a pool starts with these parts, and until it is done with them.

    paces: seconds of one worker for a pixel and step. queued: the work ahead.
    """
    ahead = {m.name: queued[m.name] for m in models.pool(pool) if queued.get(m.name)}
    at_work = min(workers.get(p.rate.model, 0) for p in parts)
    if at_work == 0 or not paces.keys() >= {*ahead, *(p.rate.model for p in parts)}:
        return None
    starts = sum(work * paces[m] for m, work in ahead.items()) / at_work
    packs = sum(ceil(p.frames / models[p.rate.model].pack.frames) for p in parts)
    own = sum(p.work * paces[p.rate.model] for p in parts)
    return starts, starts + own / min(at_work, packs)


def _workers(db: Session) -> dict[str, int]:
    """How many workers are up that have a model."""
    rows = db.execute(
        text(
            "SELECT m.model, count(*) FROM workers AS w CROSS JOIN LATERAL unnest(w.models) AS m (model)"
            " WHERE w.state = 'up' AND w.seen_at > clock_timestamp() - make_interval(secs => :lost_s)"
            " AND NOT EXISTS (SELECT FROM ailments AS a WHERE a.worker = w.id AND a.model IN ('', m.model)"
            " AND a.until > clock_timestamp())"
            " GROUP BY m.model"
        ),
        {"lost_s": settings().worker_lost_s},
    )
    return dict(rows.tuples().all())
