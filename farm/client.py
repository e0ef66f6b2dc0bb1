"""The HTTP API from Python.

    with Farm() as farm:  # FARM_URL, FARM_API_KEY
        job = farm.submit({"prompt": "a red circle", "count": 4}, priority="urgent")
        for job in farm.watch(job.id):
            print(f"{job.progress:.0%}")
        image = farm.image(job.id, 0)

Errors are those of farm.errors, as the farm raised them. What is safe to send twice is sent again while the
farm does not answer, or answers 429 or 503: a job under one idempotency key, so that it is accepted once.
"""

import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from farm import answers, errors
from farm.answers import (
    Account,
    Answer,
    Caller,
    Event,
    Frame,
    Job,
    Key,
    Model,
    NewKey,
    Usage,
    Violation,
    Worker,
)
from farm.errors import Away, FarmError, Fault, Invalid
from farm.settings import settings

Spec = Mapping[str, Any] | BaseModel  # what is left out, the model's catalog entry decides
A = TypeVar("A", bound=Answer)

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
TRY_AGAIN = (429, 502, 503, 504)


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
        idempotency_key: str | None = None,
    ) -> Job:
        """Send a job of one spec or many. It is durable when this returns.

        Under an idempotency key a job is accepted once; without one, each call makes another.
        Raises Invalid with a fault for each field that is not allowed.
        """
        body: dict[str, Any] = {"priority": priority}
        if isinstance(spec, (Mapping, BaseModel)):
            body["spec"] = _plain(spec)
        else:
            body["specs"] = [_plain(s) for s in spec]
        if name is not None:
            body["name"] = name
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._ask(Job, "POST", "/v1/jobs", json=body, headers=headers)

    def job(self, job: str) -> Job:
        return self._ask(Job, "GET", _path("jobs", job))

    def jobs(
        self, *, limit: int = 50, before: str | None = None, idempotency_key: str | None = None
    ) -> list[Job]:
        """The account's jobs, newest first; those older than `before`, or the one of an idempotency key."""
        asked = {"limit": limit, "before": before, "idempotency_key": idempotency_key}
        return self._ask(answers.Jobs, "GET", "/v1/jobs", params=asked).jobs

    def watch(self, job: str) -> Iterator[Job]:
        """The job as it is now, again and again until it has ended; the last one has."""
        wait_s = FIRST_WAIT_S
        while True:
            now = self.job(job)
            yield now
            if now.ended:
                return
            time.sleep(wait_s)
            wait_s = min(1.0, wait_s * 1.3)

    def cancel(self, job: str) -> Job:
        return self._ask(Job, "POST", _path("jobs", job, "cancel"))

    def pause(self, job: str) -> Job:
        return self._ask(Job, "POST", _path("jobs", job, "pause"))

    def resume(self, job: str) -> Job:
        return self._ask(Job, "POST", _path("jobs", job, "resume"))

    def reprioritise(self, job: str, priority: int | str) -> Job:
        return self._ask(Job, "PATCH", _path("jobs", job), json={"priority": priority})

    def sheet(self, job: str) -> bytes:
        """The job's contact sheet, a PNG."""
        return self._send("GET", _path("jobs", job, "sheet")).content

    def events(self, job: str, *, after: int = 0) -> list[Event]:
        """What happened to a job since the event of that number, in order; 1000 at most."""
        return self._ask(answers.Events, "GET", _path("jobs", job, "events"), params={"after": after}).events

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

    # -------------------------------------------------------------------------------------------- the farm

    def me(self) -> Caller:
        return self._ask(Caller, "GET", "/v1/account")

    def models(self) -> list[Model]:
        return self._ask(answers.Models, "GET", "/v1/models").models

    def usage(
        self, *, since: datetime | None = None, until: datetime | None = None, job: str | None = None
    ) -> Usage:
        """What the account used in [since, until)."""
        asked = {"since": since and since.isoformat(), "until": until and until.isoformat(), "job": job}
        return self._ask(Usage, "GET", "/v1/usage", params=asked)

    # -------------------------------------------------------------------------------------------- admins

    def workers(self) -> list[Worker]:
        return self._ask(answers.Workers, "GET", "/v1/workers").workers

    def accounts(self) -> list[Account]:
        return self._ask(answers.Accounts, "GET", "/v1/accounts").accounts

    def add_account(self, name: str, *, currency: str = "USD", weight: int = 1) -> Account:
        body = {"name": name, "currency": currency, "weight": weight}
        return self._ask(Account, "POST", "/v1/accounts", json=body, once=True)

    def keys(self, account: str) -> list[Key]:
        return self._ask(answers.Keys, "GET", _path("accounts", account, "keys")).keys

    def add_key(self, account: str, *, role: str = "submit") -> NewKey:
        """Add an API key; its text is in api_key, and nowhere else."""
        return self._ask(NewKey, "POST", _path("accounts", account, "keys"), json={"role": role}, once=True)

    def rotate_key(self, key: str) -> NewKey:
        """Give a key its next secret; the one before stops working."""
        return self._ask(NewKey, "POST", _path("keys", key, "rotate"), once=True)

    def revoke_key(self, key: str) -> Key:
        return self._ask(Key, "POST", _path("keys", key, "revoke"))

    def audit(self) -> list[Violation]:
        """Every fact of the books that is not as it must be; none, if all is well."""
        return self._ask(answers.Audit, "GET", "/v1/audit").violations

    # -------------------------------------------------------------------------------------------- to send

    def _ask(self, kind: type[A], method: str, path: str, **request: Any) -> A:
        response = self._send(method, path, **request)
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as e:
            raise FarmError(f"{self.url} answers like another program, or another version of the farm") from e

    def _send(self, method: str, path: str, *, once: bool = False, **request: Any) -> httpx.Response:
        """Send a request, again while that may help. once: not after it may have been carried out."""
        if "params" in request:
            request["params"] = {k: v for k, v in request["params"].items() if v is not None}
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
                again = not once and response.status_code in TRY_AGAIN
                pause_s = max(wait_s, _retry_after_s(response))
            if not again or time.monotonic() + pause_s > give_up:
                raise error
            time.sleep(pause_s)
            wait_s = min(LONGEST_WAIT_S, wait_s * 2)


def _path(*parts: str) -> str:
    return "/v1/" + "/".join(quote(p, safe="") for p in parts)


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
    for kind in (errors.Unauthorized, errors.Forbidden, errors.NotFound, errors.Conflict, errors.Gone,
                 errors.TooLarge, errors.Invalid):  # fmt: skip
        if kind.http_status == status:
            return kind
    return errors.Refused if status < 500 else FarmError
