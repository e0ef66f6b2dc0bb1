"""Calls that wait for a job's end: ?wait= or Prefer: wait=. They hold neither a thread nor a connection."""

import re
from typing import Annotated
from uuid import UUID

from fastapi import Header, Query, Request

from farm.accounts import Caller
from farm.api.feed import Feed
from farm.bulk.uploads import Facts
from farm.errors import Fault, Invalid
from farm.fetch import NotFetched, check
from farm.settings import settings
from farm.submissions import Submission

LONGEST_S = 300
LOOKED_UP_S = 2.0

Wait = Annotated[
    float | None,
    Query(
        ge=0,
        le=LONGEST_S,
        allow_inf_nan=False,
        description="seconds: answer once the job has ended, or as it is after these",
    ),
]
Prefer = Annotated[str | None, Header(description="wait=SECONDS, as ?wait=", examples=["wait=30"])]


def waiting_s(wait: float | None, prefer: str | None) -> float:
    """How long to wait, 0 if not at all; ?wait= counts before Prefer, and FARM_SYNC_WAIT_S before both."""
    if wait is None:
        asked = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})", prefer or "", re.ASCII | re.IGNORECASE)
        wait = float(asked[1]) if asked else 0.0
    return min(wait, LONGEST_S, settings().sync_wait_s)


async def ended(request: Request, caller: Caller, job_id: UUID, wait_s: float) -> bool:
    """Wait for the end of one of the caller's jobs."""
    feed: Feed = request.app.state.feed
    return await feed.ended(caller.account_id, job_id, wait_s)


async def reachable(submission: Submission | Facts) -> None:
    """Look whether a submission's callback may be sent anything.

    Raises Invalid if it is for an address inside. A name nobody knows now is looked at again when it is told.
    """
    if submission.webhook is None:
        return
    try:
        await check(submission.webhook.url, within_s=LOOKED_UP_S)
    except NotFetched as e:
        raise Invalid([Fault("webhook.url", submission.webhook.url, str(e))]) from None
