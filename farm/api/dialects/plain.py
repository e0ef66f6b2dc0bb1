"""The plain server of the guides: POST /generate, then GET /result/{job_id} until it is a picture."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from farm import ids, outcomes, tickets
from farm.api.auth import Reader, Submitter
from farm.api.bodies import Body, described, read
from farm.api.dialects import asking
from farm.api.dialects.answers import answered
from farm.api.dialects.browsers import OwnPages
from farm.api.dialects.served import model_named, submitted
from farm.api.params import IdempotencyHeader
from farm.api.problems import documented
from farm.db import transaction
from farm.errors import Gone, NotFound
from farm.settings import settings
from farm.storage import open_store
from farm.tickets import Dialect

router = APIRouter(tags=["dialects"], dependencies=[OwnPages])


class Generate(BaseModel):
    """One picture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[str, Field(strict=True)]
    negative_prompt: Annotated[str, Field(strict=True)] | None = None
    width: Annotated[int, Field(strict=True)] | None = None
    height: Annotated[int, Field(strict=True)] | None = None
    seed: Annotated[int, Field(strict=True)] | None = None
    model: Annotated[str, Field(strict=True, max_length=127)] | None = None


class Generating(BaseModel):
    """A picture that was asked for."""

    job_id: str
    status: Literal["queued", "processing"]


@router.post(
    "/generate",
    response_class=Response,
    responses={200: {"model": Generating}, **documented(402, 403, 404, 409, 410, 413, 422, 429)},
    openapi_extra=described(Generate),
)
async def generate(
    caller: Submitter, body: Body, request: Request, idempotency_key: IdempotencyHeader = None
) -> Response:
    """Ask for a picture."""
    asked = await run_in_threadpool(read, Generate, body)
    fields = asked.model_dump() | {"model": model_named(asked.model).name}

    def keep(db: Session, job_id: UUID) -> None:
        name = ids.public("job", job_id)
        tickets.write(db, caller.account_id, job_id, dialect=Dialect.PLAIN, name=name, asked={})

    submission = asking.submission(fields, names={})
    job_id = await submitted(request, caller, submission, body=body, key=idempotency_key, also=keep)
    return answered({"job_id": ids.public("job", job_id), "status": "queued"})


@router.get(
    "/result/{job_id}",
    response_class=Response,
    responses={
        200: {
            "description": "the picture, or that it is not there yet",
            "content": {
                "image/png": {"schema": {"type": "string", "format": "binary"}},
                "application/json": {"schema": {"$ref": "#/components/schemas/Generating"}},
            },
        },
        **documented(404, 410),
    },
)
def show_result(caller: Reader, job_id: str) -> Response:
    """The picture; until it is there, that it is processed. 410 if there will be none, and why."""
    with transaction() as db:
        ticket = tickets.find(db, caller.account_id, Dialect.PLAIN, job_id)
        outcome = outcomes.find(db, caller.account_id, ticket.job_id)
    if outcome.images:
        image = outcome.images[0]
        try:
            data = open_store(settings().storage_url.get_secret_value()).get(image.key)
        except NotFound:
            raise Gone("the stored file is gone", job=job_id) from None
        return Response(data, media_type="image/png", headers={"X-Content-Type-Options": "nosniff"})
    if not outcome.over:
        return answered({"job_id": job_id, "status": "processing"})
    if outcome.cancelled or outcome.late:
        raise Gone("this job was cancelled", job=job_id, status="cancelled")
    if outcome.job.done:
        raise Gone("the picture was deleted", job=job_id, status="deleted")
    raise Gone("; ".join(outcome.reasons) or "no picture was made", job=job_id, status="failed")
