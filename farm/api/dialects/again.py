"""Calls that are sent again: a client gave up waiting, or its connection broke, and the images are being made.

Stainless clients, openai among them, send no idempotency key with it, but say how often they have tried, and when
they give up. So a second try waits for the job of the first: farm/calls.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from uuid import UUID

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from farm import calls
from farm.accounts import Caller
from farm.db import transaction

TRIED = "x-stainless-retry-count"
GIVES_UP = "x-stainless-read-timeout"
MARGIN_S = 2.0  # an answer has to be there before its client gives up
SHORTEST_S = 0.5


@dataclass(frozen=True, slots=True)
class Call:
    """One try of a call: what it asks for, and how often that was tried before; None: the client does not say."""

    account_id: UUID
    digest: bytes
    attempt: int | None

    @classmethod
    def of(cls, request: Request, caller: Caller, body: bytes) -> "Call":
        tried = request.headers.get(TRIED, "")
        attempt = min(int(tried), 1000) if tried.isascii() and tried.isdigit() and len(tried) < 9 else None
        path = request.url.path.encode("utf-8", "replace")
        return cls(caller.account_id, sha256(path + b"\n" + body).digest(), attempt)

    async def earlier(self) -> UUID | None:
        """The job of the try before this one, if that is open."""
        return await run_in_threadpool(self._take_over, self.attempt) if self.attempt else None

    def _take_over(self, attempt: int) -> UUID | None:
        with transaction() as db:
            return calls.take_over(db, account_id=self.account_id, digest=self.digest, attempt=attempt)

    @property
    def note(self) -> Callable[[Session, UUID], None] | None:
        """What to store of a new job in its transaction."""
        return None if self.attempt is None else self._note

    def _note(self, db: Session, job_id: UUID) -> None:
        calls.note(db, job_id, account_id=self.account_id, digest=self.digest, attempt=self.attempt or 0)

    async def answered(self, request: Request, job_id: UUID) -> None:
        """Close the call, unless its client has left and will ask again."""
        if self.attempt is not None and not await request.is_disconnected():
            await run_in_threadpool(_close, job_id)


def _close(job_id: UUID) -> None:
    with transaction() as db:
        calls.close(db, job_id)


def patience_s(request: Request, longest_s: float) -> float:
    """How long to wait: longest_s, or until shortly before the client gives up if it says when."""
    try:
        own = float(request.headers.get(GIVES_UP, ""))
    except ValueError:
        return longest_s
    if not 0 < own < longest_s:
        return longest_s
    return max(SHORTEST_S, own - MARGIN_S, own / 2)
