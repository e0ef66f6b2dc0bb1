"""Tells webhooks: leases one that has something due, sends its deliveries one by one, and books each answer.

A delivery is booked after it was answered: who dies in between sends it again, under the same webhook-id. One
webhook is told by one process at a time, in the order of its events as far as the receiver takes them. A receiver
that fails is left alone, longer each time; of what is in flight no receiver and no account has more than its part,
and those that failed last have half of it between them.
"""

import asyncio
import json
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from farm import fetch, ids, webhooks
from farm.db import hot, transaction
from farm.errors import FarmError
from farm.fetch import NotFetched
from farm.tables import Delivery, Event, Webhook
from farm.webhooks import Happening, Shape

log = logging.getLogger(__name__)

SCHEDULE_S = (0, 5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)  # until the next try
JITTER = 0.2  # of each, at most
PAUSES_S = (0, 5, 30, 60, 120, 300)  # a webhook is left alone after so many failures in a row
GIVE_UP = timedelta(days=5)  # of nothing but failures
WITHIN_S = 15.0
ANSWER_BYTES = 1000
TOLD = 500  # characters of an answer that are kept
TRIES_KEPT = 20
SLOTS = 64  # deliveries in flight
OF_A_RECEIVER, OF_AN_ACCOUNT = 4, 16  # of them
LEASE_S = 60.0
TURN_S, TURN_DELIVERIES = 10.0, 100  # then others have theirs
LOOK_S = 0.2
STOP_S = 3.0  # what is in flight may still be answered
LOCK = (0x73776570, 72)  # beside the sweep's
GIVE_BACK = text("""
    UPDATE webhooks AS w
    SET leased_until = NULL,
        next_at = CASE WHEN d.next_at IS NOT NULL THEN greatest(d.next_at, w.paused_until) END
    FROM (SELECT min(next_at) AS next_at FROM deliveries WHERE webhook_id = :id AND status = 'pending') AS d
    WHERE w.id = :id""")

T = TypeVar("T")
Receiver = tuple[UUID, str]


@dataclass(frozen=True, slots=True)
class Letter:
    """One delivery, ready to be sent. body None: there is nothing to tell; fault: why it could not be made."""

    webhook_id: UUID
    delivery_id: int
    url: str
    body: bytes | None
    headers: Mapping[str, str]
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one try."""

    at: datetime
    ms: int
    status: int | None = None
    answer: str = ""
    error: str = ""

    @property
    def is_good(self) -> bool:
        return not self.error and (self.status is None or 200 <= self.status < 300)

    def to_json(self) -> dict[str, Any]:
        told = self.answer.replace("\x00", "")[:TOLD]
        return {
            "at": self.at.isoformat(),
            "ms": self.ms,
            "status": self.status,
            "answer": told,
            "error": self.error or None,
        }


# ------------------------------------------------------------------------------------------------ in the database


def spread() -> int:
    """Make deliveries of new events, unless another process is at it. Returns how many were looked at."""
    with transaction() as db:
        if db.scalar(text("SELECT pg_try_advisory_xact_lock(:a, :b)"), {"a": LOCK[0], "b": LOCK[1]}):
            return webhooks.spread(db)
    return 0


def lease(n: int, busy: list[Receiver], full: list[UUID]) -> list[tuple[UUID, Receiver]]:
    """Lease webhooks that have something due."""
    facts = {"n": n, "lease_s": LEASE_S, "busy": [f"{a} {r}" for a, r in busy], "full": full}
    with transaction() as db:
        return [(r.id, (r.account_id, r.receiver)) for r in hot(db, "lease_webhooks", facts)]


def release(webhook_ids: list[UUID]) -> None:
    """Give webhooks back that were leased."""
    with transaction() as db:
        db.execute(
            text("UPDATE webhooks SET leased_until = NULL WHERE id = ANY (CAST(:ids AS uuid[]))"),
            {"ids": webhook_ids},
        )


def first(webhook_id: UUID, shapes: Mapping[str, Shape]) -> Letter | None:
    """What is due of a webhook that was leased; if there is nothing, it is given back."""
    with transaction() as db:
        webhook, now = _locked(db, webhook_id)
        return None if webhook is None else _next(db, webhook, shapes, now)


def book(letter: Letter, outcome: Outcome, shapes: Mapping[str, Shape], *, more: bool) -> Letter | None:
    """Write down what came of a try. Returns what is due next, if more is wanted and it went well."""
    with transaction() as db:
        webhook, now = _locked(db, letter.webhook_id)
        if webhook is None:  # it was removed meanwhile
            return None
        delivery = db.get(Delivery, letter.delivery_id, with_for_update=True)
        if delivery is not None and delivery.status == "pending":
            _book(db, webhook, delivery, outcome, now=now)
        db.flush()
        if more and outcome.is_good and webhook.disabled_at is None:
            return _next(db, webhook, shapes, now)
        _give_back(db, webhook)
    return None


def _locked(db: Session, webhook_id: UUID) -> tuple[Webhook | None, datetime]:
    """The webhook, if it is still there, and what time it is."""
    found = db.scalar(select(Webhook).where(Webhook.id == webhook_id).with_for_update(key_share=True))
    now: datetime = db.scalars(select(func.clock_timestamp())).one()
    return found, now


def _book(db: Session, webhook: Webhook, delivery: Delivery, outcome: Outcome, *, now: datetime) -> None:
    delivery.tries += 1
    delivery.log = [*delivery.log, outcome.to_json()][-TRIES_KEPT:]
    if outcome.is_good:
        delivery.status, delivery.next_at, delivery.ended_at = "delivered", None, now
        webhook.failures, webhook.failing_since, webhook.paused_until = 0, None, None
        return
    delivery.step += 1
    webhook.failures += 1
    webhook.failing_since = webhook.failing_since or now
    pause_s = PAUSES_S[min(webhook.failures, len(PAUSES_S) - 1)]
    webhook.paused_until = now + timedelta(seconds=pause_s)
    if outcome.status == 410:
        webhooks.disable(db, webhook, "gone")
    elif now - webhook.failing_since > GIVE_UP:
        webhooks.disable(db, webhook, "failing")
    if outcome.status == 410 or delivery.step >= len(SCHEDULE_S):
        delivery.status, delivery.next_at, delivery.ended_at = "failed", None, now
    else:
        wait_s = SCHEDULE_S[delivery.step] * random.uniform(1, 1 + JITTER)
        delivery.next_at = now + timedelta(seconds=wait_s)


def _next(db: Session, webhook: Webhook, shapes: Mapping[str, Shape], now: datetime) -> Letter | None:
    """What is due of a webhook we have locked, with its lease prolonged; else it is given back."""
    due = (
        select(Delivery)
        .where(Delivery.webhook_id == webhook.id, text("deliveries.status = 'pending'"))
        .where(Delivery.next_at <= func.clock_timestamp())
        .order_by(Delivery.id)
        .limit(1)
    )
    delivery = None if webhook.disabled_at is not None else db.scalar(due)
    if delivery is None:
        _give_back(db, webhook)
        return None
    webhook.leased_until = now + timedelta(seconds=LEASE_S)
    return _letter(db, webhook, delivery, shapes, now=now)


def _give_back(db: Session, webhook: Webhook) -> None:
    """End our turn. The row is locked: what was made due before this statement is seen by it."""
    db.flush()
    db.execute(GIVE_BACK, {"id": webhook.id})


def _letter(
    db: Session, webhook: Webhook, delivery: Delivery, shapes: Mapping[str, Shape], *, now: datetime
) -> Letter:
    body: bytes | None = b""
    fault = ""
    try:
        payload = _payload(db, webhook, delivery, shapes)
        body = json.dumps(payload, separators=(",", ":")).encode() if payload is not None else None
    except Exception as e:
        log.exception("delivery %d could not be made", delivery.id)
        fault = f"the farm could not make this payload: {type(e).__name__}"
    message = f"msg_{webhook.id.hex}_{delivery.id}"
    headers = {
        "content-type": "application/json",
        "user-agent": "image-farm",
        "webhook-id": message,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": webhooks.signature(
            message, now, body or b"", webhooks.secrets(db, webhook, now)
        ),
    }
    return Letter(webhook.id, delivery.id, webhook.url, body, headers, fault)


def _payload(
    db: Session, webhook: Webhook, delivery: Delivery, shapes: Mapping[str, Shape]
) -> Mapping[str, Any] | None:
    if delivery.event is None:
        of = {"webhook": ids.public("whk", webhook.id)}
        return {"type": delivery.kind, "timestamp": _shown(delivery.created_at), "data": of}
    event = db.scalar(select(Event).where(Event.number == delivery.event))
    if event is None:
        return None
    data: dict[str, Any]
    if webhook.shape:
        happening = Happening(
            event.kind, event.at, event.account_id, event.job_id, event.frame_id, event.number, event.data,
            webhook.base,
        )  # fmt: skip
        return shapes[webhook.shape](db, happening)
    data = {
        **event.data,
        "number": event.number,
        "job": event.job_id and ids.public("job", event.job_id),
        "frame": event.frame_id and ids.public("frm", event.frame_id),
    }
    return {"type": event.kind, "timestamp": _shown(event.at), "data": data}


def _shown(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


# ------------------------------------------------------------------------------------------------ at the receivers


async def send(letter: Letter) -> Outcome:
    """Send it once, and say what came of it. It never raises."""
    at, began = datetime.now(UTC), time.monotonic()
    if letter.fault or letter.body is None:
        return Outcome(at, 0, error=letter.fault, answer="" if letter.fault else "there was nothing to tell")
    try:
        answer = await fetch.post(
            letter.url, letter.body, headers=letter.headers, within_s=WITHIN_S, most_bytes=ANSWER_BYTES
        )
    except NotFetched as e:
        return Outcome(at, _ms(began), error=str(e))
    except Exception as e:
        log.exception("delivery %d broke", letter.delivery_id)
        return Outcome(at, _ms(began), error=type(e).__name__)
    redirects = answer.status in fetch.REDIRECTS
    error = "a redirect is not followed" if redirects else ""
    return Outcome(at, _ms(began), answer.status, answer.text, error)


def _ms(began: float) -> int:
    return round(1000 * (time.monotonic() - began))


class Deliverer:
    """What one process has in flight."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._shapes = shapes
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="deliver")
        self._running: dict[asyncio.Task[None], Receiver] = {}
        self._failing: set[Receiver] = set()

    async def run(self, stop: asyncio.Event, beat: Callable[[], None]) -> None:
        """Deliver until told to stop; what is in flight then may still be answered, for a moment."""
        while not stop.is_set():
            beat()
            looked = 0
            try:
                looked = await self._off(spread)
                await self._start()
            except FarmError as e:
                log.warning("nothing is delivered for a moment: %s", e)
                await asyncio.sleep(1)
            except Exception:
                log.exception("delivering broke, and goes on")
                await asyncio.sleep(1)
            if looked < webhooks.AT_ONCE:
                await self._pause(stop)
        if self._running:
            await asyncio.wait(self._running, timeout=STOP_S)
        for task in self._running:
            task.cancel()
        self._threads.shutdown(wait=False)

    async def _pause(self, stop: asyncio.Event) -> None:
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait([stopped, *self._running], timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()

    async def _off(self, work: Callable[..., T], *facts: Any) -> T:
        """Do work with the database, off the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *facts)

    async def _start(self) -> None:
        free = SLOTS - len(self._running)
        if not free:
            return
        told = Counter(self._running.values())
        of_accounts = Counter(account for account, _ in self._running.values())
        failing = sum(told[r] for r in self._failing)
        busy = [r for r, n in told.items() if n >= self._most(r)]
        if failing >= SLOTS // 2:
            busy += self._failing
        full = [account for account, n in of_accounts.items() if n >= OF_AN_ACCOUNT]
        back = []
        for webhook_id, receiver in await self._off(lease, min(free, 16), busy, full):
            # several at once
            if told[receiver] >= self._most(receiver) or of_accounts[receiver[0]] >= OF_AN_ACCOUNT:
                back.append(webhook_id)
                continue
            told[receiver] += 1
            of_accounts[receiver[0]] += 1
            task = asyncio.create_task(self._turn(webhook_id, receiver))
            self._running[task] = receiver
            task.add_done_callback(lambda t: self._running.pop(t, None))
        if back:
            await self._off(release, back)

    def _most(self, receiver: Receiver) -> int:
        return 1 if receiver in self._failing else OF_A_RECEIVER

    def _note(self, receiver: Receiver, outcome: Outcome) -> None:
        if outcome.is_good:
            self._failing.discard(receiver)
        elif len(self._failing) < 10_000:
            self._failing.add(receiver)

    async def _turn(self, webhook_id: UUID, receiver: Receiver) -> None:
        """Send what is due of a webhook that was leased, one by one, until one fails or others are due."""
        until, left = time.monotonic() + TURN_S, TURN_DELIVERIES
        try:
            letter = await self._off(first, webhook_id, self._shapes)
            while letter is not None:
                outcome, left = await send(letter), left - 1
                self._note(receiver, outcome)
                more = left > 0 and time.monotonic() < until
                letter = await self._off(
                    lambda x, o, m: book(x, o, self._shapes, more=m), letter, outcome, more
                )
        except FarmError as e:
            log.warning("a webhook is told again when its lease is over: %s", e)
        except Exception:
            log.exception("a webhook is told again when its lease is over")


def run(
    stop: threading.Event, shapes: Mapping[str, Shape], *, beat: Callable[[], None] = lambda: None
) -> None:
    """Deliver until told to stop. beat is called each round: a health check watches it.

    Raises Misconfigured if there is no FARM_SECRET to sign with.
    """
    webhooks.secret(UUID(int=0), 1)

    async def until_told() -> None:
        stopping = asyncio.Event()
        deliverer = asyncio.create_task(Deliverer(shapes).run(stopping, beat))
        while not stop.is_set():
            await asyncio.sleep(0.1)
            if deliverer.done():
                break
        stopping.set()
        await deliverer

    asyncio.run(until_told())
