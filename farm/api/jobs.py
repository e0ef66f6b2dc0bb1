"""Jobs: submit, find, list, cancel, pause, resume, reprioritise."""

import hashlib
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Self
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.orm import Session

from farm import answers, control, jobs, submissions, tokens
from farm.accounts import Caller
from farm.api import shown
from farm.api.auth import Reader, Submitter, submitting
from farm.api.bodies import Body, described, raw, read
from farm.api.enhancer import helped
from farm.api.inputs import taken
from farm.api.params import IdempotencyHeader, JobId, checked_key, job_id
from farm.api.problems import documented
from farm.api.shown import Around
from farm.api.waiting import Prefer, Wait, ended, reachable, waiting_s
from farm.db import transaction
from farm.errors import Fault, Invalid, NotFound
from farm.spec import PriorityNumber
from farm.submissions import Submission

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


class Change(BaseModel):
    """What may be changed of a job that has not ended: some of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra={"minProperties": 1})

    priority: PriorityNumber | None = Field(
        None, description="0 to 9, 9 most urgent; or urgent, standard, bulk; null: as it is"
    )
    start_after: control.Moment | None = Field(
        None, description="no frame is handed out before; null: from now on"
    )
    deadline: control.Moment | None = Field(None, description="it lies ahead; null: there is none any more")
    on_late: control.OnLate | None = Field(None, description="fail or demote what is not done by then")
    max_parallel: control.Parallel | None = Field(
        None, description="frames that are rendered at once, at most; null: as many as there is room for"
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError(f"say what to change: {', '.join(type(self).model_fields)}")
        return self

    def do(self, db: Session, account_id: UUID, job: UUID) -> list[str]:
        """Returns the models to wake."""
        models = [] if self.priority is None else jobs.reprioritise(db, account_id, job, self.priority)
        said = self.model_fields_set - {"priority"} - ({"on_late"} if self.on_late is None else set())
        if said:
            models += jobs.change(db, account_id, job, self.model_dump(include=said))
        return models


PARSED_HERE = 8 << 10  # bytes of a body
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


async def submit_job(
    request: Request,
    response: Response,
    *,
    idempotency_key: IdempotencyHeader = None,
    wait: Wait = None,
    prefer: Prefer = None,
) -> answers.Job:
    """Accept a job of one spec or many. It is durable when this answers."""
    caller, answer, headers = await _submitted(request, idempotency_key)
    response.headers.update(headers)
    wait_s = waiting_s(wait, prefer)
    if wait_s and not answer.ended:
        await ended(request, caller, job_id(answer.id), wait_s)
        return await run_in_threadpool(_show, caller, job_id(answer.id), request)
    return answer


async def _submitted(request: Request, key: str | None) -> tuple[Caller, answers.Job, dict[str, str]]:
    """Who submits, the job, and what the answer's headers say of it."""
    # as dependencies these two took FastAPI a tenth of the CPU time of a request
    caller, body = await submitting(request), await raw(request)
    key = checked_key(key, field="Idempotency-Key")
    # images by URL are waited for holding neither a thread nor a connection
    small = len(body) <= PARSED_HERE  # it takes less than the way to a thread and back
    submission = read(Submission, body) if small else await run_in_threadpool(read, Submission, body)
    submission = await taken(caller, submission, idempotency_key=key)
    submission = await helped(submission)
    await reachable(submission)
    answer, headers = await run_in_threadpool(
        _submit, caller, submission, body=body, request=request, key=key
    )
    return caller, answer, headers


class _Submitting(APIRoute):
    """A submission that says nothing beside its body goes a short way, to the same answer.

    What FastAPI does about parameters and answers was a tenth of the CPU time of a request.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        long_way = super().get_route_handler()

        async def handler(request: Request) -> Response:
            if request.scope["query_string"] or "prefer" in request.headers:
                return await long_way(request)
            _, answer, headers = await _submitted(request, request.headers.get("idempotency-key"))
            body = answer.model_dump_json(by_alias=True)
            return Response(body, status_code=202, headers=headers, media_type="application/json")

        return handler


router.add_api_route(
    "",
    submit_job,
    methods=["POST"],
    route_class_override=_Submitting,
    status_code=202,
    responses={
        202: {"headers": {"Location": {"description": "the job", "schema": {"type": "string"}}}},
        **documented(402, 403, 404, 409, 410, 413, 422),
    },
    openapi_extra=described(Submission, *EXAMPLES),
)


def _submit(
    caller: Caller,
    submission: Submission,
    *,
    body: bytes,
    request: Request,
    key: str | None,
) -> tuple[answers.Job, dict[str, str]]:
    with transaction() as db:
        made = submissions.accept(
            db,
            caller,
            submission,
            idempotency_key=key,
            body_sha256=hashlib.sha256(body).digest(),
            commit=True,
        )
    if made.is_new:
        tokens.wake(made.models)
    if made.row is not None:
        answer = shown.fresh_job(jobs.fresh(made.row), Around.of(request))
    else:
        with transaction() as db:  # another one: of an account with a budget the first lets nobody else in
            answer = shown.job(db, jobs.find(db, caller.account_id, made.id), Around.of(request))
    headers = {"Location": answer.urls.self}
    return answer, headers if made.is_new else headers | {"Idempotent-Replayed": "true"}


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


@router.get("/{job}", responses=documented(404, 422))
async def show_job(
    caller: Reader, job: JobId, request: Request, wait: Wait = None, prefer: Prefer = None
) -> answers.Job:
    """A job, and how far it is; once it has ended, if it is waited for and does so in time."""
    wait_s = waiting_s(wait, prefer)
    answer = await run_in_threadpool(_show, caller, job_id(job), request)
    if wait_s and not answer.ended:
        await ended(request, caller, job_id(job), wait_s)
        return await run_in_threadpool(_show, caller, job_id(job), request)
    return answer


def _show(caller: Caller, job: UUID, request: Request) -> answers.Job:
    with transaction() as db:
        return shown.job(db, jobs.find(db, caller.account_id, job), Around.of(request))


@router.patch("/{job}", responses=documented(403, 404, 409, 413, 422), openapi_extra=described(Change))
def change_job(caller: Submitter, job: JobId, body: Body, request: Request) -> answers.Job:
    """Change how urgent a job is, when it runs and how much of it at once. It counts from the next frame on."""
    change = read(Change, body)
    return _verb(caller, job, request, lambda db, j: change.do(db, caller.account_id, j))


@router.post("/{job}/cancel", responses=documented(403, 404, 409))
def cancel_job(caller: Submitter, job: JobId, request: Request) -> answers.Job:
    """Stop a job: what is not done by now is neither delivered nor billed."""
    return _verb(caller, job, request, lambda db, j: jobs.cancel(db, caller.account_id, j))


@router.post("/{job}/approve", responses=documented(403, 404, 409))
def approve_job(caller: Submitter, job: JobId, request: Request) -> answers.Job:
    """Hand out what stands behind a job's proof."""
    return _verb(caller, job, request, lambda db, j: jobs.approve(db, caller.account_id, j))


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
