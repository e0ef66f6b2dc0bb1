"""Webhooks: who is told of what. Payloads and signatures are those of Standard Webhooks.

An account's webhook is told of the kinds of events it asks for; a job's own callback of that job's. Each event has
one delivery for each webhook that wants it, made from the events in the order of their numbers: what a crash left
out is made up for. A webhook whose receiver does not keep up gets no more deliveries until it has caught up; the
events wait where they are.

A secret is HMAC-SHA256(FARM_SECRET) over the webhook's id and a version: nothing secret is stored. After a rotation
the one before signs too for a day.
"""

import base64
import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

import httpx
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from farm import events, ids
from farm.db import scalar
from farm.errors import Conflict, Fault, Invalid, Misconfigured, NotFound
from farm.fetch import NotFetched, refuse_inside
from farm.settings import settings
from farm.tables import CallbackSecret, Delivery, Webhook

MOST = 50  # webhooks of an account
WAITING = 1000  # deliveries of a webhook at a time
AT_ONCE = 2000  # events looked at in one transaction
DEFAULT = ("job.*",)
ENDS = events.ENDS
OLD_SIGNS = timedelta(days=1)
KEPT = timedelta(days=30)  # what has ended stays in the log
PURPOSE = b"farm webhook 1\n"  # an API key's secret and a link are made of other words
TEST = "webhook.test"
DISABLED = "webhook.disabled"

Kinds = Annotated[
    list[Annotated[str, Field(strict=True, max_length=100)]], Field(min_length=1, max_length=20)
]
Url = Annotated[str, Field(strict=True, min_length=1, max_length=4096)]


class Callback(BaseModel):
    """Where to send what happens to a job."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Url = Field(description="an https URL on the public Internet", examples=["https://example.com/farm"])
    kinds: Kinds = Field(
        list(ENDS), description="kinds of events: job.finished, job.*, or *", examples=[["job.finished"]]
    )


class ShapedCallback(Callback):
    """A callback whose payload another API's clients understand. It does not come from a body.

    shape: the name of what makes it, in farm/api/callbacks.py. base: how the caller reached the farm, for links.
    """

    shape: str
    base: str = ""


@dataclass(frozen=True, slots=True)
class Happening:
    """What a payload is made of. number: of the event. base: how whoever asked reached the farm, for links."""

    kind: str
    at: datetime
    account_id: UUID
    job_id: UUID | None
    frame_id: UUID | None
    number: int
    data: Mapping[str, Any]
    base: str


# makes the payload that another API's clients understand; None: they are not told of this
Shape = Callable[[Session, Happening], Mapping[str, Any] | None]


# ------------------------------------------------------------------------------------------------ who is told


def add(
    db: Session,
    account_id: UUID,
    url: str,
    *,
    kinds: Sequence[str] = DEFAULT,
    description: str | None = None,
) -> Webhook:
    """Tell this URL of an account's events from now on.

    Raises Invalid naming what is not allowed, Conflict if the account has as many as it may.
    """
    wanted = events.checked_kinds(kinds, field="kinds")
    receiver = _receiver(url, field="url")
    db.execute(
        text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 0))"), {"key": f"webhooks/{account_id}"}
    )
    if len(every(db, account_id)) >= MOST:
        raise Conflict(f"an account may have {MOST} webhooks", allowed=MOST)
    made = Webhook(
        id=ids.new_id(ids.clock_ms(db)),
        account_id=account_id,
        url=url,
        receiver=receiver,
        kinds=list(wanted),
        description=description,
        version=1,
    )
    db.add(made)
    db.flush()
    db.refresh(made)
    return made


def bind(db: Session, account_id: UUID, job_id: UUID, callback: Callback) -> None:
    """Tell this URL of a job that is being submitted.

    Raises Invalid naming what is not allowed.
    """
    shaped = callback if isinstance(callback, ShapedCallback) else None
    kinds = events.checked_kinds(callback.kinds, field="webhook.kinds")
    db.add(
        Webhook(
            id=ids.new_id(ids.clock_ms(db)),
            account_id=account_id,
            job_id=job_id,
            url=callback.url,
            receiver=_receiver(callback.url, field="webhook.url"),
            kinds=list(kinds),
            shape=shaped.shape if shaped else "",
            base=shaped.base if shaped else "",
        )
    )
    db.flush()


def find(db: Session, account_id: UUID, webhook_id: UUID, *, lock: bool = False) -> Webhook:
    """Raises NotFound for another account's as for one that does not exist."""
    query = select(Webhook).where(Webhook.id == webhook_id, Webhook.account_id == account_id)
    found = db.scalar(query.with_for_update() if lock else query)
    if found is None:
        raise NotFound(webhook=ids.public("whk", webhook_id))
    return found


def every(db: Session, account_id: UUID, *, job_id: UUID | None = None) -> list[Webhook]:
    """An account's webhooks in the order they were made, or a job's own callbacks."""
    query = select(Webhook).where(Webhook.account_id == account_id)
    of_job = Webhook.job_id.is_(None) if job_id is None else Webhook.job_id == job_id
    return list(db.scalars(query.where(of_job).order_by(Webhook.id)))


def change(db: Session, webhook: Webhook, changes: dict[str, Any]) -> None:
    """Set url, kinds, description or disabled. Enabled again, it is told of what happens from now on.

    Raises Invalid naming what is not allowed.
    """
    if "url" in changes:
        webhook.url, webhook.receiver = changes["url"], _receiver(changes["url"], field="url")
    if "kinds" in changes:
        webhook.kinds = list(events.checked_kinds(changes["kinds"], field="kinds"))
    if "description" in changes:
        webhook.description = changes["description"]
    if "disabled" in changes and changes["disabled"] is not (webhook.disabled_at is not None):
        if changes["disabled"]:
            disable(db, webhook, "asked")
        else:
            webhook.disabled_at = webhook.disabled_why = None
            webhook.failures, webhook.failing_since = 0, None
            webhook.paused_until = webhook.behind_from = None
            webhook.next_at = _now(db)  # what waited goes on
    db.flush()


def remove(db: Session, webhook: Webhook) -> None:
    """Take a webhook away, and its log."""
    db.delete(webhook)


def disable(db: Session, webhook: Webhook, why: str) -> None:
    webhook.disabled_at, webhook.disabled_why = _now(db), why
    data = {"webhook": ids.public("whk", webhook.id), "why": why}
    if why != "asked":
        events.record(db, DISABLED, account_id=webhook.account_id, job_id=webhook.job_id, data=data)


def _receiver(url: str, *, field: str) -> str:
    """Scheme, host and port of a URL that may be told of something.

    Raises Invalid for what is no https URL, and for an address inside; a name's are looked at when it is told.
    """
    try:
        host, port = refuse_inside(url)
    except NotFetched as e:
        raise Invalid([Fault(field, url, str(e))]) from None
    return f"{httpx.URL(url).scheme}://{host.lower()}:{port}"


def _now(db: Session) -> datetime:
    return db.scalar(select(func.clock_timestamp())) or datetime.now(UTC)


# ------------------------------------------------------------------------------------------------ secrets


def secret(key: UUID, version: int) -> str:
    """The secret of a webhook, or under an account's id of its jobs' callbacks: `whsec_` and base64."""
    root = settings().secret.get_secret_value()
    if len(root) < 32:
        raise Misconfigured("FARM_SECRET needs 32 characters or more", setting="FARM_SECRET")
    digest = hmac.digest(root.encode(), PURPOSE + f"{key.hex}.{version}".encode(), hashlib.sha256)
    return "whsec_" + base64.b64encode(digest).decode()


def secret_of(webhook: Webhook) -> str:
    """A webhook's own secret; a job's callback is signed with its account's."""
    return secret(webhook.id, webhook.version)


def callback_secret(db: Session, account_id: UUID) -> str:
    """What signs the callbacks of an account's jobs."""
    row = db.get(CallbackSecret, account_id)
    return secret(account_id, row.version if row else 1)


def rotate(db: Session, webhook: Webhook) -> str:
    """Give a webhook its next secret; the one before signs too for a day."""
    webhook.version += 1
    webhook.rotated_at = _now(db)
    db.flush()
    return secret_of(webhook)


def rotate_callbacks(db: Session, account_id: UUID) -> int:
    """Give an account's callbacks their next secret; the one before signs too for a day. Returns its version."""
    version = db.scalar(
        insert(CallbackSecret)
        .values(account_id=account_id, version=2)
        .on_conflict_do_update(
            index_elements=["account_id"],
            set_={"version": CallbackSecret.version + 1, "rotated_at": func.now()},
        )
        .returning(CallbackSecret.version)
    )
    return version or 2


def secrets(db: Session, webhook: Webhook, now: datetime) -> list[str]:
    """Those that sign now, the newest first."""
    key, version, rotated_at = webhook.id, webhook.version, webhook.rotated_at
    if webhook.job_id is not None:
        kept = db.get(CallbackSecret, webhook.account_id)
        key = webhook.account_id
        version, rotated_at = (kept.version, kept.rotated_at) if kept else (1, None)
    both = rotated_at is not None and now < rotated_at + OLD_SIGNS and version > 1
    return [secret(key, v) for v in ((version, version - 1) if both else (version,))]


def signature(message: str, at: datetime, body: bytes, secrets: Sequence[str]) -> str:
    """The webhook-signature header: one signature for each secret."""
    said = f"{message}.{int(at.timestamp())}.".encode() + body
    keys = [base64.b64decode(s.removeprefix("whsec_")) for s in secrets]
    return " ".join("v1," + base64.b64encode(hmac.digest(key, said, hashlib.sha256)).decode() for key in keys)


# ------------------------------------------------------------------------------------------------ deliveries


def spread(db: Session, *, limit: int = AT_ONCE, waiting: int = WAITING) -> int:
    """Make the deliveries of the next events. Only one at a time may do it: the caller holds a lock.

    Of a webhook at most `waiting` wait; it is told of the rest once it has caught up. Returns how many events were
    looked at, and deliveries made up for.
    """
    looked = scalar(db, "spread", {"n": limit, "waiting": waiting})
    late = scalar(db, "spread_late", {"n": limit, "waiting": waiting})
    return int(looked) + int(late)


def deliveries(
    db: Session,
    webhook: Webhook,
    *,
    status: str | None = None,
    before: int | None = None,
    limit: int = 50,
) -> Sequence[Delivery]:
    """A webhook's log, newest first."""
    query = select(Delivery).where(Delivery.webhook_id == webhook.id)
    if status is not None:
        query = query.where(Delivery.status == status)
    if before is not None:
        query = query.where(Delivery.id < before)
    return db.scalars(query.order_by(Delivery.id.desc()).limit(limit)).all()


def find_delivery(db: Session, webhook: Webhook, delivery_id: int, *, lock: bool = False) -> Delivery:
    """Raises NotFound if the webhook has none of that number."""
    query = select(Delivery).where(Delivery.webhook_id == webhook.id, Delivery.id == delivery_id)
    found = db.scalar(query.with_for_update() if lock else query)
    if found is None:
        raise NotFound(delivery=delivery_id)
    return found


def redeliver(db: Session, webhook: Webhook, delivery: Delivery) -> None:
    """Deliver once more, now, and from the start of the schedule. The caller has locked both.

    Raises Conflict if the webhook is disabled.
    """
    _refuse_disabled(webhook)
    now = _now(db)
    delivery.status, delivery.ended_at, delivery.step = "pending", None, 0
    delivery.next_at = webhook.next_at = now
    webhook.paused_until = None
    db.flush()


def try_out(db: Session, webhook: Webhook) -> Delivery:
    """Send a webhook an event that did not happen. The caller has locked it.

    Raises Conflict if the webhook is disabled.
    """
    _refuse_disabled(webhook)
    made = Delivery(webhook_id=webhook.id, account_id=webhook.account_id, kind=TEST)
    db.add(made)
    webhook.next_at, webhook.paused_until = _now(db), None
    db.flush()
    db.refresh(made)
    return made


def refuse_callback(webhook: Webhook) -> None:
    """Raises Conflict for a job's callback: it has its account's secret."""
    if webhook.job_id is not None:
        raise Conflict(
            "a job's callback is signed with its account's secret: rotate that of /v1/webhooks/callbacks"
        )


def _refuse_disabled(webhook: Webhook) -> None:
    if webhook.disabled_at is not None:
        raise Conflict("this webhook is disabled: enable it first", webhook=ids.public("whk", webhook.id))


def forget(db: Session, *, limit: int = 5000) -> int:
    """Drop what ended long ago: deliveries, and the callbacks of jobs."""
    return int(scalar(db, "forget_deliveries", {"days": KEPT.days, "n": limit}))
