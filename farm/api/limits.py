"""How many requests a key and an account may send, and how many wrong keys an address: token buckets in this process.

Each bucket holds what comes in FARM_RATE_BURST_S at its rate, and fills up at that rate. Where several API processes
share the farm, each gives a share of the rates: FARM_API_PROCESSES says how many they are. So no request waits for
another service, and an account whose requests all land on one process gets that much less.
"""

import ipaddress
import time
from dataclasses import dataclass
from math import ceil
from typing import Any
from uuid import UUID

from farm.accounts import Caller
from farm.errors import RateLimited
from farm.limits import LONGEST_S, RATES, Limits
from farm.settings import settings

KINDS = {"reads": "reads_per_s", "writes": "writes_per_s", "submissions": "submissions_per_s"}
MOST = 20_000  # buckets, until those that are full again are dropped


@dataclass(slots=True)
class Bucket:
    """What may be taken, when that was so, and how fast it fills."""

    left: float
    at: float
    per_s: float
    size: float

    def fill(self, now: float, per_s: float, size: float) -> None:
        self.left = min(size, self.left + (now - self.at) * per_s)
        self.at, self.per_s, self.size = now, per_s, size

    @property
    def policy(self) -> str:
        """Its size, and how long it takes to fill: the item of RateLimit-Policy."""
        return f"q={int(self.size)};w={max(1, ceil(self.size / self.per_s)) if self.per_s else LONGEST_S}"

    @property
    def rest(self) -> str:
        """What is left, and how long until it is full again: the item of RateLimit."""
        full_s = ceil((self.size - self.left) / self.per_s) if self.per_s else LONGEST_S
        return f"r={int(self.left)};t={full_s}"


@dataclass(frozen=True, slots=True)
class Taken:
    """What one request has used up, as items of RateLimit-Policy and RateLimit; and why it is refused, if it is."""

    policy: list[str]
    rest: list[str]
    refused: RateLimited | None = None


class Buckets:
    """The rates of everybody who came lately. Used by the event loop alone."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[UUID, str], Bucket] = {}

    def take(self, caller: Caller, kind: str, account: Limits, key: Limits) -> Taken:
        """Count one request of a kind, unless the account or its key has sent too many."""
        now = time.monotonic()
        wanted = [("account", caller.account_id, _rate(account, kind))]
        own = getattr(key, KINDS[kind])
        if own is not None:
            wanted.append(("key", caller.key_id, own / settings().api_processes))
        found = [(whose, self._bucket(owner, kind, rate, now)) for whose, owner, rate in wanted]
        refused = next((_limited(whose, kind, b) for whose, b in found if b.left < 1), None)
        for _, bucket in found:
            bucket.left -= refused is None
        return Taken(
            [f'"{whose}-{kind}";{b.policy}' for whose, b in found],
            [f'"{whose}-{kind}";{b.rest}' for whose, b in found],
            refused,
        )

    def _bucket(self, owner: UUID, kind: str, per_s: float, now: float) -> Bucket:
        # a rate below one in the burst's time lets one in, now and then
        size = max(per_s * settings().rate_burst_s, 1.0) if per_s else 0.0
        bucket = self._buckets.get((owner, kind))
        if bucket is None:
            if len(self._buckets) >= MOST:
                self._drop_full(now)
            bucket = self._buckets[owner, kind] = Bucket(size, now, per_s, size)
        bucket.fill(now, per_s, size)
        return bucket

    def _drop_full(self, now: float) -> None:
        self._buckets = _not_full(self._buckets, now)


class Failures:
    """Wrong keys that came lately, by address. Used by the event loop alone."""

    def __init__(self) -> None:
        self._buckets: dict[str, Bucket] = {}

    def too_many(self, address: str) -> bool:
        """Whether as many wrong keys came from there as may."""
        bucket = self._buckets.get(network_of(address))
        if bucket is None:
            return False
        bucket.fill(time.monotonic(), *_failing())
        return bucket.left < 1

    def count(self, address: str) -> RateLimited | None:
        """Count a wrong key. Returns how to refuse it where too many came before."""
        now, (per_s, size) = time.monotonic(), _failing()
        name = network_of(address)
        bucket = self._buckets.get(name)
        if bucket is None:
            if len(self._buckets) >= MOST:
                rest = _not_full(self._buckets, now)
                self._buckets = rest if len(rest) < MOST else {}
            bucket = self._buckets[name] = Bucket(size, now, per_s, size)
        bucket.fill(now, per_s, size)
        if bucket.left >= 1:
            bucket.left -= 1
            return None
        allowed = settings().wrong_keys_per_min
        return RateLimited(
            f"{allowed:g} wrong API keys a minute may come from an address",
            retry_after_s=min(LONGEST_S, max(1, ceil((1 - bucket.left) / per_s))),
            limit="address-wrong-keys", allowed_per_min=allowed,
        )  # fmt: skip


def _failing() -> tuple[float, float]:
    """Wrong keys a second from an address, and how many at once."""
    share = settings().wrong_keys_per_min / settings().api_processes
    return share / 60, max(1.0, share)


def network_of(address: str) -> str:
    """The address, and of IPv6 its first 64 bits: whoever has one of them has all."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((found.packed[:8] + bytes(8), 64)))


def _not_full(buckets: dict[Any, Bucket], now: float) -> dict[Any, Bucket]:
    return {name: b for name, b in buckets.items() if b.left + (now - b.at) * b.per_s < b.size}


def rates(*own: Limits) -> dict[str, float]:
    """What may be sent in a second to all processes together: by the first that says it, or else the settings."""
    return {
        name: next((v for o in own if (v := getattr(o, name)) is not None), getattr(settings(), name))
        for name in RATES
    }


def _rate(own: Limits, kind: str) -> float:
    value: float | None = getattr(own, KINDS[kind])
    return (getattr(settings(), KINDS[kind]) if value is None else value) / settings().api_processes


def _limited(whose: str, kind: str, bucket: Bucket) -> RateLimited:
    wait_s = ceil((1 - bucket.left) / bucket.per_s) if bucket.per_s else LONGEST_S
    return RateLimited(
        f"this {whose} may send {bucket.per_s:g} {kind} a second, {int(bucket.size)} at once",
        retry_after_s=min(LONGEST_S, max(1, wait_s)),
        limit=f"{whose}-{kind}",
        allowed_per_s=bucket.per_s,
        allowed_at_once=int(bucket.size),
    )
