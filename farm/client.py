"""The HTTP API from Python.

    with Farm() as farm:  # FARM_URL, FARM_API_KEY
        job = farm.submit({"prompt": "a red circle", "count": 4}, priority="urgent")
        for job in farm.watch(job.id):
            print(f"{job.progress:.0%}")
        image = farm.image(job.id, 0)

Errors are those of farm.errors, as the farm raised them. What is safe to send twice is sent again while the
farm does not answer, or answers 429 or 503, after what its Retry-After says: what creates something under one
idempotency key, so that it is done once.
"""

import re
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from farm import answers, errors, sending, streams, transfers
from farm.answers import (
    Account,
    Answer,
    Audit,
    Budgets,
    Bulk,
    BulkError,
    BulkPreview,
    Caller,
    DatedPrice,
    DeletedImages,
    Delivery,
    Event,
    Frame,
    Hourly,
    ImagesAudit,
    ImageUrl,
    Input,
    Job,
    Key,
    Limits,
    ManifestLine,
    Margin,
    Model,
    NewKey,
    NewSecret,
    NewWebhook,
    Preview,
    Provenance,
    Quote,
    Reversal,
    Statement,
    StatementSummary,
    Steps,
    Usage,
    UsageEntry,
    Webhook,
    Worker,
)
from farm.errors import Away, FarmError, Fault, InProgress, Invalid
from farm.settings import settings

Spec = Mapping[str, Any] | BaseModel  # what is left out, the model's catalog entry decides
A = TypeVar("A", bound=Answer)

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
WAIT_S = 20.0  # the longest one call waits for a job's end
TRY_AGAIN = (429, 502, 503, 504)
EXPORTED = 20_000  # rows of usage held at a time
IMAGES = 200  # that the farm reads for one page of an audit


class Farm:
    """One farm, as one account. Threads may share it."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        patience_s: float = 15.0,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Nothing is sent yet. patience_s: how long a call goes on trying; timeout_s: of one try."""
        self.url = (url or settings().url).rstrip("/")
        key = settings().api_key.get_secret_value() if api_key is None else api_key
        self._patience_s = patience_s
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(5.0, timeout_s)),
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # -------------------------------------------------------------------------------------------- jobs

    def submit(
        self,
        spec: Spec | Sequence[Spec],
        *,
        priority: int | str = "standard",
        name: str | None = None,
        quote: str | None = None,
        budget: str | None = None,
        reuse: bool = True,
        webhook: str | Mapping[str, Any] | None = None,
        after: Sequence[str] = (),
        after_ok: Sequence[str] = (),
        start_after: datetime | None = None,
        deadline: datetime | None = None,
        on_late: str | None = None,
        max_parallel: int | None = None,
        proof: int | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Send a job of one spec or many. It is durable when this returns.

        after, after_ok: jobs that have to end before, or to be all done. start_after: nothing is rendered before.
        deadline: what is not done by then fails, or goes on as bulk with on_late="demote". max_parallel: frames that
        are rendered at once, at most. proof: render so many, the first; the rest waits for approve().

        quote: the id of one for just these specs. budget: the most the job may cost, as text.
        webhook: a URL to tell how it ends, or url and kinds.
        reuse: frames whose seed is given may be answered with an image that was made of the same spec and seed.
        Under an idempotency key a job is accepted once; without one, each call makes another.
        Raises Invalid with a fault for each field that is not allowed.
        """
        body = _submission(spec, priority=priority, name=name, quote=quote, budget=budget)
        if not reuse:
            body["reuse"] = False
        timing = {"after": list(after), "after_ok": list(after_ok), "start_after": start_after, "deadline": deadline,
                  "on_late": on_late, "max_parallel": max_parallel, "proof": proof}  # fmt: skip
        body |= _plain_times({k: v for k, v in timing.items() if v})
        if webhook is not None:
            body["webhook"] = {"url": webhook} if isinstance(webhook, str) else dict(webhook)
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._ask(Job, "POST", "/v1/jobs", json=body, headers=headers)

    def quote(
        self, spec: Spec | Sequence[Spec], *, priority: int | str = "standard", budget: str | None = None
    ) -> Quote:
        """What such a job costs at most; submitted with the quote's id it does, whatever prices are by then."""
        body = _submission(spec, priority=priority, budget=budget)
        return self._ask(Quote, "POST", "/v1/quotes", json=body, once=True)

    def job(self, job: str) -> Job:
        return self._ask(Job, "GET", _path("jobs", job))

    def jobs(
        self, *, limit: int = 50, before: str | None = None, idempotency_key: str | None = None
    ) -> list[Job]:
        """The account's jobs, newest first; those older than `before`, or the one of an idempotency key."""
        asked = {"limit": limit, "before": before, "idempotency_key": idempotency_key}
        return self._ask(answers.Jobs, "GET", "/v1/jobs", params=asked).jobs

    def watch(self, job: str) -> Iterator[Job]:
        """The job as it is now, again and again until it has ended, or waits to be approved."""
        wait_s, now = FIRST_WAIT_S, self.job(job)
        while True:
            yield now
            if now.ended or now.status == "staged":
                return
            began = time.monotonic()
            now = self._ask(Job, "GET", _path("jobs", job), params={"wait": f"{wait_s:.2f}"})
            if not now.ended:  # a farm that does not wait must not be asked all the time
                time.sleep(max(0.0, wait_s - (time.monotonic() - began)))
            wait_s = min(1.0, wait_s * 1.3)

    def wait(self, job: str, *, timeout_s: float | None = None) -> Job:
        """The job once it has ended, or as it is when the time is up."""
        give_up = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = WAIT_S if give_up is None else min(WAIT_S, give_up - time.monotonic())
            began = time.monotonic()
            now = self._ask(Job, "GET", _path("jobs", job), params={"wait": f"{max(0.0, left):.2f}"})
            if now.ended or (give_up is not None and time.monotonic() >= give_up):
                return now
            if time.monotonic() - began < min(left, FIRST_WAIT_S):
                time.sleep(FIRST_WAIT_S)

    # -------------------------------------------------------------------------------------------- bulk

    def start_bulk(self, facts: Mapping[str, Any], *, idempotency_key: str | None = None) -> Bulk:
        """Start an upload of lines, or with `matrix` among the facts submit one. See docs/bulk.md for the facts."""
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._ask(Bulk, "POST", "/v1/bulk", json=dict(facts), headers=headers)

    def send_file(
        self,
        path: Path,
        facts: Mapping[str, Any] | None = None,
        *,
        upload: str | None = None,
        idempotency_key: str | None = None,
        tell: Callable[[Bulk], object] = lambda upload: None,
    ) -> Bulk:
        """Send a file of lines, NDJSON or CSV by its name, as one job; it goes on by itself after a cut connection.

        upload: one that was started before and is to go on. tell: called with the upload after each part.
        Raises Invalid with the first faults if the file is refused.
        """
        if upload is None:
            facts = {**(facts or {}), "format": sending.format_of(path)}
            started = self.start_bulk(facts, idempotency_key=idempotency_key)
        else:
            started = self.bulk(upload)
        tell(started)
        return sending.send(self, path, started, tell=tell)

    def append_bulk(
        self, upload: str, data: bytes, *, offset: int, content_type: str, finish: bool = False
    ) -> Bulk:
        """Send bytes of the file from an offset on. Raises Conflict with the `offset` where the upload is."""
        asked = {"offset": offset, "finish": finish or None}
        headers = {"Content-Type": content_type}
        return self._ask(
            Bulk, "PATCH", _path("bulk", upload), params=asked, content=data, headers=headers, once=True
        )

    def finish_bulk(self, upload: str) -> Bulk:
        """Make what was sent a job."""
        return self._ask(Bulk, "POST", _path("bulk", upload, "finish"))

    def bulk(self, upload: str) -> Bulk:
        return self._ask(Bulk, "GET", _path("bulk", upload))

    def bulks(self, *, limit: int = 50, before: str | None = None) -> list[Bulk]:
        """The account's bulk uploads, newest first."""
        return self._ask(answers.Bulks, "GET", "/v1/bulk", params={"limit": limit, "before": before}).uploads

    def discard_bulk(self, upload: str) -> None:
        """Give up an upload. Raises Conflict if it is a job by now."""
        self._send("DELETE", _path("bulk", upload))

    def bulk_errors(self, upload: str) -> list[BulkError]:
        """What is wrong with which line."""
        lines = self._send("GET", _path("bulk", upload, "errors")).text.splitlines()
        return [BulkError.model_validate_json(line) for line in lines]

    def preview_bulk(self, facts: Mapping[str, Any], *, limit: int = 20) -> BulkPreview:
        """What a matrix comes to, and what it costs."""
        return self._ask(
            BulkPreview, "POST", "/v1/bulk/preview", json=dict(facts), params={"limit": limit}, once=True
        )

    def approve(self, job: str) -> Job:
        """Hand out what stands behind a job's proof."""
        return self._ask(Job, "POST", _path("jobs", job, "approve"))

    # -------------------------------------------------------------------------------------------- inputs

    def send_input(self, data: bytes) -> Input:
        """Send an image to start frames from, a PNG, JPEG or WebP; name it in specs by its id. Kept once.

        Raises Invalid if it is none, TooLarge.
        """
        headers = {"Content-Type": "application/octet-stream"}
        return self._ask(Input, "POST", "/v1/inputs", content=data, headers=headers)

    def inputs(self, *, limit: int = 50, before: str | None = None) -> list[Input]:
        """The account's input images, newest first; those older than `before`."""
        asked = {"limit": limit, "before": before}
        return self._ask(answers.Inputs, "GET", "/v1/inputs", params=asked).inputs

    def delete_input(self, input_id: str) -> None:
        """Remove an input image.

        Raises Conflict if an open job needs it.
        """
        self._send("DELETE", _path("inputs", input_id))

    # -------------------------------------------------------------------------------------------- verbs

    def cancel(self, job: str) -> Job:
        return self._ask(Job, "POST", _path("jobs", job, "cancel"))

    def pause(self, job: str) -> Job:
        return self._ask(Job, "POST", _path("jobs", job, "pause"))

    def resume(self, job: str) -> Job:
        return self._ask(Job, "POST", _path("jobs", job, "resume"))

    def reprioritise(self, job: str, priority: int | str) -> Job:
        return self.change_job(job, {"priority": priority})

    def change_job(self, job: str, changes: Mapping[str, Any]) -> Job:
        """Change priority, start_after, deadline, on_late or max_parallel; None: there is none any more."""
        return self._ask(Job, "PATCH", _path("jobs", job), json=_plain_times(changes))

    def sheet(self, job: str) -> bytes:
        """The job's contact sheet, a PNG."""
        return self._send("GET", _path("jobs", job, "sheet")).content

    def past_events(self, job: str, *, after: int = 0, kinds: Sequence[str] = ()) -> list[Event]:
        """What happened to a job since the event of that number, in order; 1000 at most."""
        asked = {"after": after, "kinds": ",".join(kinds) or None}
        return self._ask(answers.Events, "GET", _path("jobs", job, "events"), params=asked).events

    def events(self, job: str, *, after: int = 0, kinds: Sequence[str] = ()) -> Iterator[Event]:
        """What happens to a job, from the event after that number until it has ended: in order, each once.

        It waits for what comes, and goes on by itself where a connection broke. kinds: as job.*, frame.failed.
        """
        for told in self.follow(job, after=after, kinds=kinds):
            if isinstance(told, Event):
                yield told

    def follow(
        self,
        job: str | None = None,
        *,
        after: int | None = None,
        kinds: Sequence[str] = (),
        previews: bool = False,
    ) -> Iterator[Event | Steps | Preview]:
        """As events(), with how far frames on a device are and, if asked for, what they look like.

        Without a job, what happens to all the account's, from now on or after that number, without end.
        """
        asked = {"kinds": ",".join(kinds) or None, "previews": previews or None}
        return streams.follow(
            self._http,
            "/v1/events" if job is None else _path("jobs", job, "events"),
            after=after,
            params={k: v for k, v in asked.items() if v is not None},
            patience_s=self._patience_s,
            refused=_error,
        )

    # -------------------------------------------------------------------------------------------- frames

    def frames(
        self, job: str, *, first: int = 0, limit: int | None = None, status: str | None = None
    ) -> Iterator[Frame]:
        """A job's frames in order, from an index on: all of them, or so many."""
        left, start = limit, first
        while left is None or left > 0:
            asked = {"first": start, "limit": min(1000, left or 1000), "status": status}
            page = self._ask(answers.Frames, "GET", _path("jobs", job, "frames"), params=asked)
            yield from page.frames
            if page.next is None:
                return
            start = page.next
            left = None if left is None else left - len(page.frames)

    def frame(self, job_or_frame: str, index: int | None = None) -> Frame:
        """A frame by its id, or by job and index."""
        if index is None:
            return self._ask(Frame, "GET", _path("frames", job_or_frame))
        return self._ask(Frame, "GET", _path("jobs", job_or_frame, "frames", str(index)))

    def image(self, job: str, index: int = 0) -> bytes:
        """A frame's image, as it is stored.

        Raises Conflict while there is none yet, Gone if there will be none.
        """
        return self._send("GET", _path("jobs", job, "frames", str(index), "image")).content

    def manifest(
        self, job: str, *, after: int | None = None, limit: int | None = None, signed: bool = False
    ) -> Iterator[ManifestLine]:
        """Every frame of a job in order, with its image's URL and hash and what it cost; those after an index.

        It is read as it comes, and goes on by itself where a connection broke. signed: URLs that need no key.
        """
        return transfers.manifest(
            self._http, _path("jobs", job, "manifest"), after=after, limit=limit, signed=signed,
            patience_s=self._patience_s, refused=_error,
        )  # fmt: skip

    def archive(self, job: str, form: str = "zip") -> Iterator[bytes]:
        """A job's images as one zip or tar with a manifest.csv, some bytes at a time.

        Raises Away if it breaks off: what came is of no use then.
        """
        path = _path("jobs", job, "archive")
        return transfers.pieces(self._http, path, params={"format": form}, refused=_error)

    def provenance(self, frame: str) -> Provenance:
        """What made a frame's image; of a rerender also whether it is the same."""
        return self._ask(Provenance, "GET", _path("frames", frame, "provenance"))

    def rerender(self, frame: str, *, idempotency_key: str | None = None) -> Job:
        """Render a frame's spec and seed once more, as a job of one frame; see its frame's provenance then."""
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._ask(Job, "POST", _path("frames", frame, "rerender"), headers=headers)

    def image_url(self, job: str, index: int = 0) -> ImageUrl:
        """A link to a frame's image that works without a key until it expires."""
        return self._ask(ImageUrl, "GET", _path("jobs", job, "frames", str(index), "image-url"))

    def delete_images(self, job: str) -> DeletedImages:
        """Delete the images of a job that has ended, for good.

        Raises Conflict if it has not.
        """
        return self._ask(DeletedImages, "DELETE", _path("jobs", job, "images"))

    # -------------------------------------------------------------------------------------------- the farm

    def me(self) -> Caller:
        return self._ask(Caller, "GET", "/v1/account")

    def limits(self, account: str | None = None, *, key: str | None = None) -> Limits:
        """What the account may do at most, and what of it is used; another account's, for admins."""
        if account is None:
            return self._ask(Limits, "GET", "/v1/limits")
        return self._ask(Limits, "GET", _path("accounts", account, "limits"), params={"key": key})

    def models(self) -> list[Model]:
        return self._ask(answers.Models, "GET", "/v1/models").models

    def usage(
        self, *, since: datetime | None = None, until: datetime | None = None, job: str | None = None
    ) -> Usage:
        """What the account used in [since, until)."""
        asked = {"since": since and since.isoformat(), "until": until and until.isoformat(), "job": job}
        return self._ask(Usage, "GET", "/v1/usage", params=asked)

    def hourly_usage(
        self, *, since: datetime | None = None, until: datetime | None = None, account: str | None = None
    ) -> Hourly:
        """What was used hour by hour in [since, until), of the last day if neither is given.

        Both times are taken down to the start of their hour.
        """
        times = {"since": since and since.isoformat(), "until": until and until.isoformat()}
        asked = {**times, "account": account}
        return self._ask(Hourly, "GET", "/v1/usage/hourly", params=asked)

    def export_usage(self, *, cursor: str = "0", account: str | None = None) -> Iterator[UsageEntry]:
        """Every charge and reversal after a cursor, in the order they became known, until now."""
        while True:
            asked = {"cursor": cursor, "limit": EXPORTED, "account": account}
            lines = self._send("GET", "/v1/usage/export", params=asked).text.splitlines()
            if not lines:
                return
            for line in lines:
                entry = UsageEntry.model_validate_json(line)
                cursor = entry.cursor
                yield entry

    def statement(self, month: str, *, account: str | None = None) -> Statement:
        """What the account owes for a month, written as 2026-11; a draft while the month is not closed."""
        return self._ask(Statement, "GET", _path("statements", month), params={"account": account})

    def statement_as(self, form: str, month: str, *, account: str | None = None) -> bytes:
        """The same as csv or html."""
        asked = {"account": account, "format": form}
        return self._send("GET", _path("statements", month), params=asked).content

    def statements(self, *, account: str | None = None) -> list[StatementSummary]:
        """The account's closed statements, newest first."""
        return self._ask(answers.Statements, "GET", "/v1/statements", params={"account": account}).statements

    def prices(
        self, *, model: str | None = None, past: bool = False, account: str | None = None
    ) -> list[DatedPrice]:
        """The prices in force and those planned, by model and date; past: those too that are over."""
        asked = {"model": model, "past": past or None, "account": account}
        return self._ask(answers.Prices, "GET", "/v1/prices", params=asked).prices

    def budget(self, *, account: str | None = None) -> Budgets:
        """What the account may spend, and what of it is gone."""
        return self._ask(Budgets, "GET", "/v1/budget", params={"account": account})

    def account_events(self, *, after: int = 0, kinds: Sequence[str] = ()) -> list[Event]:
        """What happened to the account's jobs and budgets since that event, in order; 1000 at most."""
        asked = {"after": after, "kinds": ",".join(kinds) or None}
        return self._ask(answers.Events, "GET", "/v1/events", params=asked).events

    # -------------------------------------------------------------------------------------------- webhooks

    def add_webhook(
        self, url: str, *, kinds: Sequence[str] = (), description: str | None = None
    ) -> NewWebhook:
        """Tell a URL of the account's events from now on; of job.* if no kinds are named. Only here is its secret."""
        asked = {"url": url, "kinds": list(kinds) or None, "description": description}
        body = {k: v for k, v in asked.items() if v is not None}
        return self._ask(NewWebhook, "POST", "/v1/webhooks", json=body, once=True)

    def webhooks(self, *, job: str | None = None) -> list[Webhook]:
        """The account's webhooks, or a job's own callbacks."""
        return self._ask(answers.Webhooks, "GET", "/v1/webhooks", params={"job": job}).webhooks

    def webhook(self, webhook: str) -> Webhook:
        return self._ask(Webhook, "GET", _path("webhooks", webhook))

    def change_webhook(self, webhook: str, changes: Mapping[str, Any]) -> Webhook:
        """Change url, kinds, description or disabled."""
        return self._ask(Webhook, "PATCH", _path("webhooks", webhook), json=dict(changes))

    def remove_webhook(self, webhook: str) -> None:
        self._send("DELETE", _path("webhooks", webhook))

    def rotate_webhook(self, webhook: str) -> NewWebhook:
        """Give a webhook its next secret; the one before signs too for a day."""
        return self._ask(NewWebhook, "POST", _path("webhooks", webhook, "rotate"), once=True)

    def rotate_callbacks(self) -> NewSecret:
        """Make the next secret that signs jobs' own callbacks; the one before signs too for a day."""
        return self._ask(NewSecret, "POST", "/v1/webhooks/callbacks/rotate", once=True)

    def test_webhook(self, webhook: str) -> Delivery:
        """Send a webhook an event of kind webhook.test."""
        return self._ask(Delivery, "POST", _path("webhooks", webhook, "test"), once=True)

    def deliveries(
        self, webhook: str, *, status: str | None = None, before: int | None = None, limit: int = 50
    ) -> list[Delivery]:
        """What a webhook was sent and what came of it, newest first."""
        asked = {"status": status, "before": before, "limit": limit}
        path = _path("webhooks", webhook, "deliveries")
        return self._ask(answers.Deliveries, "GET", path, params=asked).deliveries

    def delivery(self, webhook: str, delivery: int) -> Delivery:
        return self._ask(Delivery, "GET", _path("webhooks", webhook, "deliveries", str(delivery)))

    def redeliver(self, webhook: str, delivery: int) -> Delivery:
        """Send a delivery once more, now."""
        path = _path("webhooks", webhook, "deliveries", str(delivery), "redeliver")
        return self._ask(Delivery, "POST", path, once=True)

    # -------------------------------------------------------------------------------------------- admins

    def set_price(
        self,
        model: str,
        rate: str,
        *,
        account: str | None = None,
        method: str | None = None,
        currency: str | None = None,
        since: datetime | None = None,
    ) -> DatedPrice:
        """Start a price of a model, for one account or for everybody, now or at a moment to come."""
        asked = {"model": model, "rate": rate, "account": account, "method": method, "currency": currency,
                 "since": since and since.isoformat()}  # fmt: skip
        body = {k: v for k, v in asked.items() if v is not None}
        return self._ask(DatedPrice, "POST", "/v1/prices", json=body, once=True)

    def withdraw_price(
        self,
        model: str,
        since: datetime,
        *,
        account: str | None = None,
        method: str | None = None,
        currency: str | None = None,
    ) -> DatedPrice:
        """Take out a price that is planned for a moment to come: the one before it goes on."""
        asked = {"model": model, "since": since.isoformat(), "account": account, "method": method,
                 "currency": currency}  # fmt: skip
        return self._ask(DatedPrice, "DELETE", "/v1/prices", params=asked, once=True)

    def set_budget(
        self,
        limit: str | None,
        *,
        account: str | None = None,
        key: str | None = None,
        period: str = "month",
        thresholds: Sequence[tuple[int, str]] = (),
    ) -> Budgets:
        """Set a budget of an account or of one of its keys; None takes it away. thresholds: percent and action."""
        body = {
            "limit": limit,
            "account": account,
            "key": key,
            "period": period,
            "thresholds": [{"percent": percent, "action": action} for percent, action in thresholds],
        }
        return self._ask(Budgets, "PUT", "/v1/budget", json=body)

    def workers(self) -> list[Worker]:
        return self._ask(answers.Workers, "GET", "/v1/workers").workers

    def drain(self, worker: str) -> Worker:
        """Have a worker claim nothing more."""
        return self._ask(Worker, "POST", _path("workers", worker, "drain"), once=True)

    def undrain(self, worker: str) -> Worker:
        """Have a drained worker claim again."""
        return self._ask(Worker, "POST", _path("workers", worker, "undrain"), once=True)

    def accounts(self) -> list[Account]:
        return self._ask(answers.Accounts, "GET", "/v1/accounts").accounts

    def add_account(self, name: str, *, currency: str = "USD", weight: int = 1) -> Account:
        body = {"name": name, "currency": currency, "weight": weight}
        return self._ask(Account, "POST", "/v1/accounts", json=body, once=True)

    def account(self, name: str) -> Account:
        return self._ask(Account, "GET", _path("accounts", name))

    def change_limits(self, account: str, changes: Mapping[str, Any], *, key: str | None = None) -> Limits:
        """Change what an account, or one of its keys, may do at most: None for what the farm's settings say."""
        body = {**changes, **({"key": key} if key is not None else {})}
        return self._ask(Limits, "PATCH", _path("accounts", account, "limits"), json=body)

    def change_account(self, name: str, *, retention_days: int | None) -> Account:
        """Say for how many days after a job's end an account's images are kept; None: for ever."""
        body = {"retention_days": retention_days}
        return self._ask(Account, "PATCH", _path("accounts", name), json=body)

    def put_prompts(self, name: str, *, inside: bool) -> Account:
        """Say whether an account's images, from now on, carry their prompt inside the file."""
        return self._ask(Account, "PATCH", _path("accounts", name), json={"prompt_in_images": inside})

    def keys(self, account: str) -> list[Key]:
        return self._ask(answers.Keys, "GET", _path("accounts", account, "keys")).keys

    def key(self, key: str) -> Key:
        return self._ask(Key, "GET", _path("keys", key))

    def add_key(
        self,
        account: str,
        *,
        role: str | None = None,
        scopes: Sequence[str] | None = None,
        name: str | None = None,
        expires_at: datetime | None = None,
    ) -> NewKey:
        """Add an API key; its text is in api_key, and nowhere else.

        role: read, submit or admin, each may what the one before may; or scopes: some of them, and no more.
        """
        asked = {"role": role, "scopes": scopes and list(scopes), "name": name,
                 "expires_at": expires_at and expires_at.isoformat()}  # fmt: skip
        body = {k: v for k, v in asked.items() if v is not None}
        return self._ask(NewKey, "POST", _path("accounts", account, "keys"), json=body, once=True)

    def change_key(self, key: str, changes: Mapping[str, Any]) -> Key:
        """Change a key's name, or its expires_at: None for never."""
        return self._ask(Key, "PATCH", _path("keys", key), json=dict(changes))

    def rotate_key(self, key: str, *, overlap_s: int = 0) -> NewKey:
        """Give a key its next secret; the one before stops working, at once or after so many seconds."""
        body = {"overlap_s": overlap_s}
        return self._ask(NewKey, "POST", _path("keys", key, "rotate"), json=body, once=True)

    def revoke_key(self, key: str) -> Key:
        return self._ask(Key, "POST", _path("keys", key, "revoke"))

    def audit(self) -> Audit:
        """Every fact of the books that is not as it must be; none, if all is well. And what it did not see."""
        return self._ask(Audit, "GET", "/v1/audit")

    def audit_images(self, sample: int | None = None) -> Iterator[ImagesAudit]:
        """Stored images against their booked hashes, a page at a time: all of them, or so many at random.

        None is read twice: where there are fewer than asked for, all are read.
        """
        seed = None if sample is None else secrets.randbits(63)
        left, after = sample, 0
        while left is None or left > 0:
            limit = IMAGES if left is None else min(left, IMAGES)
            asked = {"after": after, "limit": limit, "seed": seed}
            page = self._ask(ImagesAudit, "GET", "/v1/audit/images", params=asked)
            yield page
            if page.next is None:
                return
            left, after = None if left is None else left - limit, page.next

    def close_statement(self, account: str, month: str) -> Statement:
        """Close a month that is over; it may take some seconds for each hundred thousand images.

        Raises Conflict if it is not over, or if an earlier month has to be closed first.
        """
        while True:
            path = _path("statements", month, "close")
            bill = self._ask(Statement, "POST", path, json={"account": account})
            if bill.status == "closed":
                return bill

    def reverse(self, frame: str, reason: str) -> Reversal:
        """Take back a frame's charge; it stays done. Raises Conflict if that was done before."""
        body = {"frame": frame, "reason": reason}
        return self._ask(Reversal, "POST", "/v1/usage/reversals", json=body, once=True)

    def margin(self, *, since: datetime | None = None, until: datetime | None = None) -> Margin:
        """Revenue against GPU time in [since, until); of the last 30 days if neither is given."""
        asked = {"since": since and since.isoformat(), "until": until and until.isoformat()}
        return self._ask(Margin, "GET", "/v1/margin", params=asked)

    # -------------------------------------------------------------------------------------------- to send

    def _ask(self, kind: type[A], method: str, path: str, **request: Any) -> A:
        response = self._send(method, path, **request)
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as e:
            raise FarmError(f"{self.url} answers like another program, or another version of the farm") from e

    def _send(self, method: str, path: str, *, once: bool = False, **request: Any) -> httpx.Response:
        """Send a request, again while that may help.

        once: it creates something. A POST is then sent under an idempotency key, made here and kept; anything else
        is not sent again after it may have been carried out.
        """
        if "params" in request:
            request["params"] = {k: v for k, v in request["params"].items() if v is not None}
        if once and method == "POST":
            request["headers"] = {"Idempotency-Key": str(uuid.uuid4()), **(request.get("headers") or {})}
            once = False
        give_up = time.monotonic() + self._patience_s
        wait_s = FIRST_WAIT_S
        while True:
            pause_s = wait_s
            try:
                response = self._http.request(method, path, **request)
            except httpx.TransportError as e:
                error: FarmError = Away(f"{self.url} does not answer: {e or type(e).__name__}")
                again = not once or isinstance(e, (httpx.ConnectError, httpx.ConnectTimeout))
            else:
                if response.is_success:
                    return response
                error = _error(response)
                again = not once and (response.status_code in TRY_AGAIN or isinstance(error, InProgress))
                pause_s = max(wait_s, _retry_after_s(response))
            if not again or time.monotonic() + pause_s > give_up:
                raise error
            time.sleep(pause_s)
            wait_s = min(LONGEST_WAIT_S, wait_s * 2)


def _path(*parts: str) -> str:
    return "/v1/" + "/".join(quote(p, safe="") for p in parts)


def _submission(spec: Spec | Sequence[Spec], **facts: Any) -> dict[str, Any]:
    if isinstance(spec, (Mapping, BaseModel)):
        body: dict[str, Any] = {"spec": _plain(spec)}
    else:
        body = {"specs": [_plain(s) for s in spec]}
    return body | {k: v for k, v in facts.items() if v is not None}


def _plain_times(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON carries them."""
    return {k: v.isoformat() if isinstance(v, datetime) else v for k, v in facts.items()}


def _plain(spec: Spec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude_unset=True) if isinstance(spec, BaseModel) else dict(spec)


def _retry_after_s(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdigit() else 0.0


def _error(response: httpx.Response) -> FarmError:
    """The error the farm raised, read off its problem document."""
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {}
    status = response.status_code
    kind = _class_of(str(problem.get("type", "")), status)
    detail = str(problem.get("detail") or f"{status} {response.reason_phrase} from {response.url}")
    if issubclass(kind, Invalid):
        return Invalid(_faults(problem) or [Fault("", None, detail)])
    facts = {k: v for k, v in problem.items() if k not in ("type", "title", "status", "detail", "instance")}
    return kind(detail, **facts)


def _faults(problem: Mapping[str, Any]) -> list[Fault]:
    given = problem.get("errors")
    return [
        Fault(str(e.get("field", "")), e.get("value"), str(e.get("allowed", "")))
        for e in (given if isinstance(given, list) else [])
        if isinstance(e, dict)
    ]


def _class_of(urn: str, status: int) -> type[FarmError]:
    """By the problem's type; for one we don't know, the most general of its status."""
    name = "".join(word.capitalize() for word in re.sub("^urn:farm:", "", urn).split("-"))
    found = getattr(errors, name, None)
    if isinstance(found, type) and issubclass(found, FarmError):
        return found
    if status in TRY_AGAIN:
        return Away
    for kind in (errors.Unauthorized, errors.BudgetExceeded, errors.Forbidden, errors.NotFound, errors.Conflict,
                 errors.Gone, errors.TooLarge, errors.Invalid):  # fmt: skip
        if kind.http_status == status:
            return kind
    return errors.Refused if status < 500 else FarmError
