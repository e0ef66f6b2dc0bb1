"""Webhooks: add, list, change, remove; their secrets; and the log of what they were sent."""

from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Path, Query
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.orm import Session

from farm import answers, ids, jobs, webhooks
from farm.api.auth import Reader, Submitter
from farm.api.bodies import Body, described, read
from farm.api.idempotency import Once
from farm.api.params import MAX_BIGINT, job_id
from farm.api.problems import documented
from farm.db import transaction
from farm.errors import Fault, Invalid
from farm.fetch import NotFetched, check
from farm.tables import Delivery, Webhook
from farm.webhooks import DEFAULT, Kinds, Url

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])

LOOKED_UP_S = 5.0
WebhookId = Annotated[str, Path(examples=["whk_0192f0c1a2b37c4d8e5f6a7b8c000000"])]
DeliveryId = Annotated[int, Path(ge=1, le=MAX_BIGINT)]
Description = Annotated[str, Field(strict=True, max_length=200, pattern=r"^[^\x00]*$")]
EXAMPLE = {"url": "https://example.com/farm", "kinds": ["job.*", "frame.failed"]}


class NewWebhook(BaseModel):
    """Who is to be told of what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Url = Field(description="an https URL on the public Internet", examples=["https://example.com/farm"])
    kinds: Kinds = Field(
        list(DEFAULT),
        description="kinds of events: job.finished, job.*, or *. A large job has a frame.done each image",
    )
    description: Description | None = None


class ChangedWebhook(BaseModel):
    """What may be changed of a webhook: some of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra={"minProperties": 1})

    url: Url | None = None
    kinds: Kinds | None = None
    description: Description | None = Field(None, description="null takes it away")
    disabled: Annotated[bool, Field(strict=True)] | None = Field(
        None, description="false: it is told of what happens from now on, and of what waits"
    )

    @model_validator(mode="after")
    def _something(self) -> "ChangedWebhook":
        if not self.model_fields_set:
            raise ValueError(f"say what to change: {', '.join(type(self).model_fields)}")
        return self

    def changes(self) -> dict[str, Any]:
        said = {name: getattr(self, name) for name in self.model_fields_set}
        return {k: v for k, v in said.items() if v is not None or k == "description"}


@router.post(
    "",
    status_code=201,
    responses=documented(403, 409, 413, 422),
    openapi_extra=described(NewWebhook, EXAMPLE),
)
async def add_webhook(caller: Submitter, body: Body, once: Once) -> answers.NewWebhook:
    """Tell a URL of the account's events from now on. Its secret is in this answer, and in none but its repetition."""
    new = read(NewWebhook, body)
    await _reachable(new.url)

    def add(db: Session) -> answers.NewWebhook:
        made = webhooks.add(db, caller.account_id, new.url, kinds=new.kinds, description=new.description)
        return _with_secret(made)

    return await run_in_threadpool(lambda: once(answers.NewWebhook, add, without="secret", whole=_whole))


@router.get("", responses=documented(404))
def list_webhooks(
    caller: Reader, job: Annotated[str | None, Query(description="that job's own callbacks instead")] = None
) -> answers.Webhooks:
    """The account's webhooks, or a job's own callbacks."""
    with transaction() as db:
        found = None if job is None else jobs.find(db, caller.account_id, job_id(job)).id
        rows = webhooks.every(db, caller.account_id, job_id=found)
        return answers.Webhooks(webhooks=[_shown(row) for row in rows])


@router.post("/callbacks/rotate", responses=documented(403, 409, 413, 422))
def rotate_callback_secret(caller: Submitter, once: Once) -> answers.NewSecret:
    """Make the next secret that signs the callbacks of the account's jobs; the one before signs too for a day.

    It is in this answer, and in none but its repetition.
    """

    def rotate(db: Session) -> answers.NewSecret:
        version = webhooks.rotate_callbacks(db, caller.account_id)
        return answers.NewSecret(version=version, secret=webhooks.secret(caller.account_id, version))

    def whole(kept: dict[str, Any]) -> dict[str, Any]:
        return {**kept, "secret": webhooks.secret(caller.account_id, kept["version"])}

    return once(answers.NewSecret, rotate, without="secret", whole=whole)


@router.get("/{webhook}", responses=documented(404))
def show_webhook(caller: Reader, webhook: WebhookId) -> answers.Webhook:
    """A webhook, without its secret."""
    with transaction() as db:
        return _shown(webhooks.find(db, caller.account_id, _id(webhook)))


@router.patch("/{webhook}", responses=documented(403, 404, 413, 422), openapi_extra=described(ChangedWebhook))
async def change_webhook(caller: Submitter, webhook: WebhookId, body: Body) -> answers.Webhook:
    """Change a webhook: where to, what of, or whether at all."""
    change = read(ChangedWebhook, body)
    if change.url is not None:
        await _reachable(change.url)

    def do() -> answers.Webhook:
        with transaction() as db:
            row = webhooks.find(db, caller.account_id, _id(webhook), lock=True)
            webhooks.change(db, row, change.changes())
            db.refresh(row)
            return _shown(row)

    return await run_in_threadpool(do)


@router.delete("/{webhook}", status_code=204, responses=documented(403, 404))
def remove_webhook(caller: Submitter, webhook: WebhookId) -> None:
    """Take a webhook away, with its log: it is told of nothing more."""
    with transaction() as db:
        webhooks.remove(db, webhooks.find(db, caller.account_id, _id(webhook), lock=True))


@router.post("/{webhook}/rotate", responses=documented(403, 404, 409, 413, 422))
def rotate_webhook(caller: Submitter, webhook: WebhookId, once: Once) -> answers.NewWebhook:
    """Give a webhook its next secret; the one before signs too for a day."""

    def rotate(db: Session) -> answers.NewWebhook:
        row = webhooks.find(db, caller.account_id, _id(webhook), lock=True)
        webhooks.refuse_callback(row)
        webhooks.rotate(db, row)
        return _with_secret(row)

    return once(answers.NewWebhook, rotate, without="secret", whole=_whole)


@router.post("/{webhook}/test", status_code=202, responses=documented(403, 404, 409, 413, 422))
def test_webhook(caller: Submitter, webhook: WebhookId, once: Once) -> answers.Delivery:
    """Send a webhook an event of kind webhook.test; what came of it is in its log."""

    def test(db: Session) -> answers.Delivery:
        row = webhooks.find(db, caller.account_id, _id(webhook), lock=True)
        return _delivery(webhooks.try_out(db, row))

    return once(answers.Delivery, test)


@router.get("/{webhook}/deliveries", responses=documented(404, 422))
def list_deliveries(
    caller: Reader,
    webhook: WebhookId,
    status: Annotated[Literal["pending", "delivered", "failed"] | None, Query()] = None,
    before: Annotated[
        int | None, Query(ge=1, le=MAX_BIGINT, description="a delivery: only older ones")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> answers.Deliveries:
    """What a webhook was sent and what came of it, newest first; what has ended is kept for 30 days."""
    with transaction() as db:
        row = webhooks.find(db, caller.account_id, _id(webhook))
        page = webhooks.deliveries(db, row, status=status, before=before, limit=limit)
        shown = [_delivery(d) for d in page]
    return answers.Deliveries(deliveries=shown, next=shown[-1].id if len(shown) == limit else None)


@router.get("/{webhook}/deliveries/{delivery}", responses=documented(404, 422))
def show_delivery(caller: Reader, webhook: WebhookId, delivery: DeliveryId) -> answers.Delivery:
    """One delivery."""
    with transaction() as db:
        row = webhooks.find(db, caller.account_id, _id(webhook))
        return _delivery(webhooks.find_delivery(db, row, delivery))


@router.post(
    "/{webhook}/deliveries/{delivery}/redeliver",
    status_code=202,
    responses=documented(403, 404, 409, 413, 422),
)
def redeliver(caller: Submitter, webhook: WebhookId, delivery: DeliveryId, once: Once) -> answers.Delivery:
    """Send it once more, now, under the same webhook-id, and again on the same schedule if that fails."""

    def again(db: Session) -> answers.Delivery:
        row = webhooks.find(db, caller.account_id, _id(webhook), lock=True)
        found = webhooks.find_delivery(db, row, delivery, lock=True)
        webhooks.redeliver(db, row, found)
        db.refresh(found)
        return _delivery(found)

    return once(answers.Delivery, again)


def _id(shown: str) -> UUID:
    return ids.parse("whk", shown)


async def _reachable(url: str) -> None:
    try:
        await check(url, within_s=LOOKED_UP_S, known=True)
    except NotFetched as e:
        raise Invalid([Fault("url", url, str(e))]) from None


def _shown(row: Webhook) -> answers.Webhook:
    return answers.Webhook(
        id=ids.public("whk", row.id),
        url=row.url,
        kinds=row.kinds,
        description=row.description,
        job=row.job_id and ids.public("job", row.job_id),
        created_at=row.created_at,
        disabled=row.disabled_why,
        disabled_at=row.disabled_at,
        failing_since=row.failing_since,
        behind=row.behind_from is not None,
        version=row.version,
        rotated_at=row.rotated_at,
    )


def _with_secret(row: Webhook) -> answers.NewWebhook:
    return answers.NewWebhook(**_shown(row).model_dump(), secret=webhooks.secret_of(row))


def _whole(kept: dict[str, Any]) -> dict[str, Any]:
    """An answer that was kept without the secret, with it."""
    return {**kept, "secret": webhooks.secret(_id(kept["id"]), kept["version"])}


def _delivery(row: Delivery) -> answers.Delivery:
    return answers.Delivery(
        id=row.id,
        kind=row.kind,
        event=row.event,
        status=row.status,
        tries=row.tries,
        next_at=row.next_at,
        created_at=row.created_at,
        ended_at=row.ended_at,
        log=[answers.Try(**t) for t in row.log],
    )
