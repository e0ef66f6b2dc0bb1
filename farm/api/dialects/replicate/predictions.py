"""Predictions: make, wait, show, list, cancel."""

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from farm import ids, jobs, outcomes, tickets
from farm import webhooks as callbacks
from farm.accounts import Caller
from farm.api import links
from farm.api.auth import Reader, Submitter
from farm.api.bodies import Body, described, read
from farm.api.dialects import asking
from farm.api.dialects.answers import Responses, answered
from farm.api.dialects.replicate.asked import (
    NAMES,
    ModelPrediction,
    Prediction,
    by_version,
    named_by,
    spec_of,
    version_of,
)
from farm.api.dialects.replicate.errors import ERRORS, errors
from farm.api.dialects.replicate.shown import PredictionPage, PredictionShown, shown
from farm.api.dialects.served import submitted, translated
from farm.api.params import IdempotencyHeader
from farm.catalog import Model
from farm.db import transaction
from farm.errors import Conflict, Fault, Invalid, NotFound
from farm.submissions import Submission
from farm.tickets import Dialect

LONGEST_WAIT_S = 60
PAGE = 100
EVENTS: Mapping[str, tuple[str, ...]] = {
    "start": ("job.accepted",),
    "output": ("frame.done",),
    "logs": (),  # steps are no events: they are seen with the rest
    "completed": callbacks.ENDS,
}

router = APIRouter(prefix="/v1", tags=["dialects"], route_class=translated(errors))


Prefer = Annotated[
    str | None, Header(description="wait, or wait=1 to wait=60: seconds", examples=["wait=30"])
]
CancelAfter = Annotated[
    str | None, Header(description="5s to 24h, as 90s, 1m or 1h30m: what is not done by then is cancelled")
]
OK: Responses = {201: {"model": PredictionShown, "description": "The prediction"}}


@router.post(
    "/predictions",
    status_code=201,
    response_class=Response,
    responses={**OK, **ERRORS(402, 403, 404, 409, 410, 413, 422, 429)},
    openapi_extra=described(Prediction),
)
async def create_prediction(
    caller: Submitter,
    body: Body,
    request: Request,
    *,
    prefer: Prefer = None,
    cancel_after: CancelAfter = None,
    idempotency_key: IdempotencyHeader = None,
) -> Response:
    """Make a prediction with a version of a model."""
    asked = await run_in_threadpool(read, Prediction, body)
    slug, model = by_version(asked.version)
    return await _created(
        request, caller, asked, slug, model,
        body=body, prefer=prefer, cancel_after=cancel_after, key=idempotency_key,
    )  # fmt: skip


@router.post(
    "/models/{owner}/{name}/predictions",
    status_code=201,
    response_class=Response,
    responses={**OK, **ERRORS(402, 403, 404, 409, 410, 413, 422, 429)},
    openapi_extra=described(ModelPrediction),
)
async def create_prediction_of_model(
    caller: Submitter,
    owner: str,
    name: str,
    body: Body,
    request: Request,
    *,
    prefer: Prefer = None,
    cancel_after: CancelAfter = None,
    idempotency_key: IdempotencyHeader = None,
) -> Response:
    """Make a prediction with a model."""
    model = named_by(owner, name)
    asked = await run_in_threadpool(read, ModelPrediction, body)
    return await _created(
        request, caller, asked, f"{owner}/{name}", model,
        body=body, prefer=prefer, cancel_after=cancel_after, key=idempotency_key,
    )  # fmt: skip


async def _created(
    request: Request,
    caller: Caller,
    asked: ModelPrediction,
    slug: str,
    model: Model,
    *,
    body: bytes,
    prefer: str | None,
    cancel_after: str | None,
    key: str | None,
) -> Response:
    farm_url = links.base(request)
    submission = _submission(asked, model, farm_url, within=_within(cancel_after))
    said = {
        "model": slug,
        "version": version_of(model),
        "input": _kept(asked),
    }

    def keep(db: Session, job_id: UUID) -> None:
        name = ids.public("job", job_id)
        tickets.write(db, caller.account_id, job_id, dialect=Dialect.REPLICATE, name=name, asked=said)

    job_id = await submitted(request, caller, submission, body=body, key=key, names=NAMES, also=keep)
    waited = _wait_s(prefer)
    ended = False
    if waited:
        ended = await request.app.state.feed.ended(caller.account_id, job_id, waited)
    found = await run_in_threadpool(_find, caller, ids.public("job", job_id), farm_url, request)
    if not ended and found["status"] == "processing":
        found |= {"status": "starting", "output": None}
    return answered(found, 201, headers={"Location": found["urls"]["get"]})


def _kept(asked: ModelPrediction) -> dict[str, Any]:
    """The input as later answers repeat it: an image that came in it is not kept a second time."""
    sent = asked.input.model_dump(mode="json", exclude_unset=True)
    return {
        name: f"{value[:64]}…" if isinstance(value, str) and value.startswith("data:") else value
        for name, value in sent.items()
    }


def _submission(
    asked: ModelPrediction, model: Model, farm_url: str, *, within: timedelta | None
) -> Submission:
    job: dict[str, Any] = {}
    if within is not None:
        job |= {"deadline": datetime.now(UTC) + within, "on_late": "fail"}
    made = asking.submission(spec_of(asked.input, model), names=NAMES, **job)
    url, wanted = asked.webhook, asked.webhook_events_filter
    if url is None and asked.webhook_completed is not None:
        url, wanted = asked.webhook_completed, ["completed"]
    kinds = [kind for name in (wanted or EVENTS) for kind in EVENTS[name]]
    if url is None or not kinds:
        return made
    hook = asking.callback(url, kinds, shape=Dialect.REPLICATE, base=farm_url, field="webhook")
    return made.model_copy(update={"webhook": hook})


def _wait_s(prefer: str | None) -> float:
    """How long to wait, of a Prefer header; what else it prefers is left to others."""
    for part in (prefer or "").split(","):
        name, _, value = part.strip().partition("=")
        if name.strip().lower() == "wait":
            seconds = value.strip().strip('"')
            if not seconds:
                return LONGEST_WAIT_S
            return min(LONGEST_WAIT_S, int(seconds)) if re.fullmatch(r"[0-9]{1,9}", seconds) else 0
    return 0


def _within(cancel_after: str | None) -> timedelta | None:
    """Raises Invalid naming the header."""
    if cancel_after is None:
        return None
    units = {"h": 3600, "m": 60, "s": 1, "": 1}
    found = re.fullmatch(r"(?:(\d{1,5})h)?(?:(\d{1,5})m)?(?:(\d{1,5})s?)?", cancel_after.strip())
    seconds = sum(int(n or 0) * units[u] for n, u in zip(found.groups(), "hms", strict=True)) if found else 0
    if not 5 <= seconds <= 86_400:
        raise Invalid([Fault("Cancel-After", cancel_after, "allowed are 5s to 24h, as 90s, 1m or 1h30m")])
    return timedelta(seconds=seconds)


def _find(caller: Caller, name: str, farm_url: str, request: Request) -> dict[str, Any]:
    with transaction() as db:
        ticket = tickets.find(db, caller.account_id, Dialect.REPLICATE, name)
        outcome = outcomes.find(db, caller.account_id, ticket.job_id)
        return shown(outcome, ticket, farm_url, request.app.state.progress)


@router.get(
    "/predictions", response_class=Response, responses={200: {"model": PredictionPage}, **ERRORS(422)}
)
def list_predictions(
    caller: Reader,
    request: Request,
    cursor: Annotated[str | None, Query(description="as in next and previous", max_length=64)] = None,
) -> Response:
    """The account's predictions, newest first."""
    side, _, edge = (cursor or "").partition("-")
    bounds: dict[str, UUID] = {}
    if cursor is not None:
        with suppress(NotFound):
            bounds = {side: ids.parse("job", edge)}
        if side not in ("before", "after") or not bounds:
            raise Invalid([Fault("cursor", cursor, "it comes from next or previous")])
    farm_url = links.base(request)
    with transaction() as db:
        mine = caller.account_id
        rows = tickets.every(db, mine, Dialect.REPLICATE, **bounds, limit=PAGE)
        found = outcomes.of(db, mine, [t.job_id for t in rows])
        results = [shown(found[t.job_id], t, farm_url, request.app.state.progress) for t in rows]
        older = rows and tickets.every(db, mine, Dialect.REPLICATE, before=rows[-1].job_id, limit=1)
        newer = rows and tickets.every(db, mine, Dialect.REPLICATE, after=rows[0].job_id, limit=1)
    url = f"{farm_url}/v1/predictions?cursor="
    return answered(
        {
            "previous": f"{url}after-{rows[0].name}" if newer else None,
            "next": f"{url}before-{rows[-1].name}" if older else None,
            "results": results,
        }
    )


@router.get(
    "/predictions/{prediction}",
    response_class=Response,
    responses={200: {"model": PredictionShown}, **ERRORS(404)},
)
def show_prediction(caller: Reader, prediction: str, request: Request) -> Response:
    """A prediction as it is."""
    return answered(_find(caller, prediction, links.base(request), request))


@router.post(
    "/predictions/{prediction}/cancel",
    response_class=Response,
    responses={200: {"model": PredictionShown}, **ERRORS(403, 404)},
)
def cancel_prediction(caller: Submitter, prediction: str, request: Request) -> Response:
    """Stop a prediction; one that has ended stays as it is."""
    with transaction() as db:
        ticket = tickets.find(db, caller.account_id, Dialect.REPLICATE, prediction)
        with suppress(Conflict):
            jobs.cancel(db, caller.account_id, ticket.job_id)
    return answered(_find(caller, prediction, links.base(request), request))
