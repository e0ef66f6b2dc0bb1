"""Revenue against GPU time, for who runs the farm."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from fastapi import APIRouter

from farm import answers, margin, pricing
from farm.api.auth import Admin
from farm.api.params import Moment
from farm.api.problems import documented
from farm.db import transaction
from farm.errors import Fault, Invalid
from farm.margin import PoolTime, Share

router = APIRouter(prefix="/v1/margin", tags=["admin"])

HOUR_US = Decimal(3_600_000_000)
CENT = Decimal("0.01")


@router.get("", responses=documented(403, 422))
def show_margin(caller: Admin, since: Moment | None = None, until: Moment | None = None) -> answers.Margin:
    """Revenue and GPU time in [since, until), of the last 30 days if no times are given."""
    end = until or datetime.now(UTC)
    start = since or end - timedelta(days=30)
    if start > end:
        raise Invalid([Fault("since", start.isoformat(), "allowed are times before until")])
    with transaction() as db:
        found = margin.find(db, since=start, until=end)
    return answers.Margin(
        since=start,
        until=end,
        models=[_share(s) for s in found.models],
        pools=[_share(s) for s in found.pools],
        accounts=[_share(s) for s in found.accounts],
        time=[_time(t) for t in found.time],
    )


def _share(share: Share) -> answers.MarginShare:
    return answers.MarginShare(
        name=share.name,
        frames=share.frames,
        reversed=share.reversed,
        revenue={currency: pricing.shown(amount) for currency, amount in share.revenue.items()},
        gpu_s=_seconds(share.gpu_us),
        gpu_s_by_currency={c: _seconds(gpu_us) for c, gpu_us in share.gpu_us_by_currency.items()},
        undelivered_s=_seconds(share.undelivered_us),
        per_gpu_hour=_per_hour(share.revenue, share.gpu_us_by_currency),
    )


def _per_hour(revenue: Mapping[str, Decimal], gpu_us: Mapping[str, int]) -> dict[str, str]:
    """A figure to compare by, not an amount: rounded to a cent."""
    return {
        c: f"{(amount * HOUR_US / gpu_us[c]).quantize(CENT):f}" for c, amount in revenue.items() if gpu_us[c]
    }


def _time(pool: PoolTime) -> answers.PoolTime:
    return answers.PoolTime(
        name=pool.name,
        up_s=_seconds(pool.up_us),
        delivered_s=_seconds(pool.delivered_us),
        undelivered_s=_seconds(pool.undelivered_us),
        other_s=_seconds(pool.other_us),
    )


def _seconds(micros: int) -> str:
    return f"{micros // 1_000_000}.{micros % 1_000_000:06}"
