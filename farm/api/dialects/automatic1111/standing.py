"""How far the account's own request is, and stopping it."""

import base64
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from farm import ids, jobs, outcomes, tickets
from farm.api.auth import Reader, Submitter
from farm.api.dialects.answers import answered
from farm.api.dialects.automatic1111.errors import ERRORS, errors
from farm.api.dialects.browsers import OwnPages
from farm.api.dialects.served import (
    translated,
)
from farm.api.progress import Progress
from farm.db import transaction
from farm.errors import Conflict
from farm.outcomes import Outcome
from farm.tables import Frame
from farm.tickets import Dialect

router = APIRouter(
    prefix="/sdapi/v1", tags=["dialects"], route_class=translated(errors), dependencies=[OwnPages]
)


class WebuiProgress(BaseModel):
    """How far the account's request is that came first of those that are open."""

    progress: float
    eta_relative: float
    state: dict[str, Any]
    current_image: str | None
    textinfo: str | None
    current_task: str | None


@router.get("/progress", response_class=Response, responses={200: {"model": WebuiProgress}, **ERRORS(422)})
def show_webui_progress(
    caller: Reader,
    request: Request,
    skip_current_image: Annotated[bool, Query(description="without a preview")] = False,
) -> Response:
    """How far the account's first open request is."""
    progress: Progress = request.app.state.progress
    with transaction() as db:
        mine = tickets.still_open(db, caller.account_id, Dialect.AUTOMATIC1111)
        found = outcomes.of(db, caller.account_id, [mine[0].job_id]) if mine else {}
    if not found:
        return answered(IDLE)
    outcome = found[mine[0].job_id]
    shares = [_share(p.frame, progress) for p in outcome.parts]
    steps = int(outcome.parts[0].frame.spec["steps"])
    share = sum(shares) / len(shares)
    state = {
        "job": ids.public("job", outcome.job.id),
        "job_count": outcome.job.frames,
        "job_timestamp": outcome.job.created_at.strftime("%Y%m%d%H%M%S"),
        "job_no": sum(s >= 1 for s in shares),
        "sampling_step": round(max((s for s in shares if s < 1), default=0.0) * steps),
        "sampling_steps": steps,
    }
    said = IDLE | {"progress": round(share, 4), "state": IDLE["state"] | state}
    said["current_task"] = tickets.asked(mine[0])["task"] or None
    if outcome.started_at is not None and share > 0:
        took_s = (datetime.now(UTC) - outcome.started_at).total_seconds()
        said["eta_relative"] = round(max(0.0, took_s / share - took_s), 3)
    if not skip_current_image:
        said["current_image"] = _preview(outcome, progress)
    return answered(said)


IDLE: dict[str, Any] = {
    "progress": 0.0,
    "eta_relative": 0.0,
    "state": {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": 0,
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    },
    "current_image": None,
    "textinfo": None,
    "current_task": None,
}


def _share(frame: Frame, progress: Progress) -> float:
    if frame.ended_at is not None:
        return 1.0
    return min(0.99, progress.of(frame.job_id, frame.index, frame.pack_id))


def _preview(outcome: Outcome, progress: Progress) -> str | None:
    for part in outcome.parts:
        frame = part.frame
        if frame.pack_id is not None:
            picture = progress.preview(frame.job_id, frame.index, frame.pack_id)
            if picture is not None:
                return base64.b64encode(picture).decode()
    return None


class Nothing(BaseModel):
    """Nothing is said."""


@router.post("/interrupt", response_class=Response, responses={200: {"model": Nothing}, **ERRORS(403)})
def interrupt_webui(caller: Submitter) -> Response:
    """Stop the account's first open request: it answers with the images that are there. Nobody else's stops."""
    with transaction() as db:
        for ticket in tickets.still_open(db, caller.account_id, Dialect.AUTOMATIC1111, limit=1):
            with suppress(Conflict):  # it ended meanwhile
                jobs.cancel(db, caller.account_id, ticket.job_id)
    return answered({})
