"""Jobs: submit, find, list, cancel, pause, resume, reprioritise; and their events."""

import hashlib
from collections.abc import Callable
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from farm import answers, events, ids, jobs, submissions, tokens
from farm.accounts import Caller
from farm.api import shown
from farm.api.auth import Reader, Submitter
from farm.api.bodies import Body, described, read
from farm.api.inputs import taken
from farm.api.params import MAX_BIGINT, IdempotencyHeader, JobId, checked_key, job_id
from farm.api.problems import documented
from farm.api.shown import Around
from farm.db import transaction
from farm.errors import Fault, Invalid, NotFound
from farm.spec import PriorityNumber
from farm.submissions import Submission

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


class Change(BaseModel):
    """What may be changed of a job that has not ended."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    priority: PriorityNumber = Field(description="0 to 9, 9 most urgent; or urgent, standard, bulk")


EXAMPLES = (
    {"spec": {"prompt": "a red circle on a blue background", "count": 4}},
    {
        "name": "catalogue, spring",
        "priority": "urgent",
        "specs": [
            {"prompt": "a green square", "width": 128, "height": 64, "steps": 30, "seed": 7},
            {"prompt": "a yellow triangle", "format": "webp"},
        ],
    },
)


@router.post(
    "",
    status_code=202,
    responses={
        202: {"headers": {"Location": {"description": "the job", "schema": {"type": "string"}}}},
        **documented(402, 403, 404, 409, 410, 413, 422),
    },
    openapi_extra=described(Submission, *EXAMPLES),
)
async def submit_job(
    caller: Submitter,
    body: Body,
    request: Request,
    response: Response,
    idempotency_key: IdempotencyHeader = None,
) -> answers.Job:
    """Accept a job of one spec or many. It is durable when this answers."""
    key = checked_key(idempotency_key, field="Idempotency-Key")
    # images by URL are waited for holding neither a thread nor a connection
    submission = await run_in_threadpool(read, Submission, body)
    submission = await taken(caller, submission, idempotency_key=key)
    return await run_in_threadpool(
        _submit, caller, submission, body=body, request=request, response=response, key=key
    )


def _submit(
    caller: Caller,
    submission: Submission,
    *,
    body: bytes,
    request: Request,
    response: Response,
    key: str | None,
) -> answers.Job:
    with transaction() as db:
        made, is_new = submissions.submit(
            db, caller, submission, idempotency_key=key, body_sha256=hashlib.sha256(body).digest()
        )
    with transaction() as db:  # another one: of an account with a budget the first lets nobody else in
        models = jobs.models_of(db, made) if is_new else []
        answer = shown.job(db, jobs.find(db, caller.account_id, made), Around.of(request))
    tokens.wake(models)
    response.headers["Location"] = answer.urls.self
    if not is_new:
        response.headers["Idempotent-Replayed"] = "true"
    return answer


@router.get("", responses=documented(422))
def list_jobs(
    caller: Reader,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[str | None, Query(description="a job's id: only older ones")] = None,
    idempotency_key: Annotated[str | None, Query(description="only the job it was sent under")] = None,
) -> answers.Jobs:
    """The account's jobs, newest first."""
    key = checked_key(idempotency_key, field="idempotency_key")
    cursor = None if before is None else _cursor(before)
    with transaction() as db:
        views = jobs.every(db, caller.account_id, before=cursor, key=key, limit=limit)
        page = shown.job_list(db, views, Around.of(request))
    return answers.Jobs(jobs=page, next=page[-1].id if len(page) == limit else None)


def _cursor(before: str) -> UUID:
    try:
        return job_id(before)
    except NotFound:
        raise Invalid([Fault("before", before, "it must be a job's id, as in next")]) from None


@router.get("/{job}", responses=documented(404))
def show_job(caller: Reader, job: JobId, request: Request) -> answers.Job:
    """A job, and how far it is."""
    with transaction() as db:
        return shown.job(db, jobs.find(db, caller.account_id, job_id(job)), Around.of(request))


@router.patch("/{job}", responses=documented(403, 404, 409, 413, 422), openapi_extra=described(Change))
def change_job(caller: Submitter, job: JobId, body: Body, request: Request) -> answers.Job:
    """Move a job to another priority: its next frame is handed out as such."""
    change = read(Change, body)
    return _verb(
        caller, job, request, lambda db, j: jobs.reprioritise(db, caller.account_id, j, change.priority)
    )


@router.post("/{job}/cancel", responses=documented(403, 404, 409))
def cancel_job(caller: Submitter, job: JobId, request: Request) -> answers.Job:
    """Stop a job: what is not done by now is neither delivered nor billed."""
    return _verb(caller, job, request, lambda db, j: jobs.cancel(db, caller.account_id, j))


@router.post("/{job}/pause", responses=documented(403, 404, 409))
def pause_job(caller: Submitter, job: JobId, request: Request) -> answers.Job:
    """Hand out no further frame of a job; those on a device are finished."""
    return _verb(caller, job, request, lambda db, j: jobs.pause(db, caller.account_id, j))


@router.post("/{job}/resume", responses=documented(403, 404, 409))
def resume_job(caller: Submitter, job: JobId, request: Request) -> answers.Job:
    """Hand out a paused job's frames again."""
    return _verb(caller, job, request, lambda db, j: jobs.resume(db, caller.account_id, j))


def _verb(
    caller: Caller, job: str, request: Request, do: Callable[[Session, UUID], list[str] | None]
) -> answers.Job:
    """Do it to the job, wake the models it names, and show the job as it is now."""
    with transaction() as db:
        found = job_id(job)
        models = do(db, found)
        db.flush()
        answer = shown.job(db, jobs.find(db, caller.account_id, found), Around.of(request))
    if models:
        tokens.wake(models)
    return answer


@router.get("/{job}/events", responses=documented(404, 422))
def list_events(
    caller: Reader,
    job: JobId,
    after: Annotated[int, Query(ge=0, le=MAX_BIGINT, description="the number of the last one seen")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> answers.Events:
    """What happened to a job, in order."""
    with transaction() as db:
        found = jobs.find(db, caller.account_id, job_id(job)).id
        rows = events.after(db, after, account_id=caller.account_id, job_id=found, limit=limit)
    page = [
        answers.Event(
            number=e.number,
            kind=e.kind,
            job=job,
            frame=e.frame_id and ids.public("frm", e.frame_id),
            data=e.data,
            at=e.at,
        )
        for e in rows
    ]
    return answers.Events(events=page, next=page[-1].number if page else after)
