"""Bulk uploads: a file at once, or bit by bit from an offset; matrices; and what was wrong with which line."""

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from farm import answers, ids, pricing, tokens
from farm.accounts import Caller
from farm.api.auth import Reader, Submitter, Submitting
from farm.api.bodies import MAX_BODY_BYTES, Body, described, limited, read
from farm.api.bulk_files import Again, room, take_in
from farm.api.params import MAX_BIGINT, IdempotencyHeader, checked_key
from farm.api.problems import documented
from farm.api.shown import Around
from farm.api.waiting import reachable
from farm.bulk import uploads
from farm.bulk.lines import value_of
from farm.bulk.matrices import Matrix
from farm.bulk.parts import Intake
from farm.bulk.uploads import Defaults, Ended, Facts, Form, Status
from farm.catalog import catalog
from farm.db import transaction
from farm.errors import (
    BudgetExceeded,
    Conflict,
    Fault,
    Invalid,
    LinesRefused,
    NotFound,
    TooLarge,
    TooMany,
)
from farm.settings import settings
from farm.tables import BulkError, BulkUpload

router = APIRouter(prefix="/v1/bulk", tags=["bulk"])

PLACES = 5000  # of a matrix
SHOWN = 100  # errors that a refusal names; all of them are in the file
TYPES = {
    "application/x-ndjson": Form.NDJSON,
    "application/ndjson": Form.NDJSON,
    "application/jsonl": Form.NDJSON,
    "text/csv": Form.CSV,
    "application/json": None,
}
UploadId = Annotated[
    str, Path(description="as in the upload's JSON", examples=["blk_0192f0c1a2b37c4d8e5f6a7b8c000000"])
]
Offset = Annotated[
    int, Query(ge=0, le=MAX_BIGINT, description="bytes that were sent before: the upload's received")
]
LINES = {"schema": {"type": "string", "format": "binary"}}
EXAMPLES = (
    {"format": "ndjson", "name": "catalogue, spring", "mode": "accept_good", "proof": 20},
    {"matrix": {"prompt": ["a (red, blue) circle"], "size": ["64x64", "128x64"], "seed": [1, 2, 3]}},
)
BODY = described(Facts, *EXAMPLES)["requestBody"]
QUERY = [
    {"name": name, "in": "query", "required": False, "schema": {"type": kind}, "description": text}
    for name, kind, text in (
        ("name", "string", "of the job"),
        ("priority", "string", "0 to 9, or urgent, standard, bulk"),
        ("mode", "string", "all_or_nothing or accept_good"),
        ("budget", "string", "the most the job may cost"),
        ("proof", "string", "images that are rendered before the rest is approved"),
        ("model", "string", "for lines that leave it out; so with every field of a spec"),
    )
]


@router.post(
    "",
    status_code=202,
    responses={
        201: {"model": answers.Bulk, "description": "an upload was started: send it with PATCH"},
        **documented(402, 403, 404, 409, 413, 422),
    },
    openapi_extra={
        "parameters": QUERY,
        "requestBody": {
            "required": True,
            "content": {**BODY["content"], "application/x-ndjson": LINES, "text/csv": LINES},
        },
    },
)
async def submit_bulk(
    caller: Submitting, request: Request, response: Response, idempotency_key: IdempotencyHeader = None
) -> answers.Bulk:
    """Send a file of lines as one job; or, as JSON, a matrix, or what is to be known of a file sent bit by bit.

    NDJSON or CSV, by the content type; what is to be known of the job stands in the query. Under an idempotency key a
    file that was cut is sent again from its start: what is there already is compared, not stored again.
    """
    key = checked_key(idempotency_key, field="Idempotency-Key")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in TYPES:
        raise Invalid([Fault("Content-Type", kind, f"allowed are {', '.join(TYPES)}")])
    form = TYPES[kind]
    if form is None:
        body = await limited(request, MAX_BODY_BYTES)
        facts = await run_in_threadpool(read, Facts, body)
        await reachable(facts)
        if facts.matrix is not None:
            ended = await _matrix(request, caller, facts, key)
            return _answered(ended, request, response)
        upload, is_new = await run_in_threadpool(_create, caller, facts, facts.format or Form.NDJSON, key)
        response.status_code = 201
        return _answered(Ended(upload, is_new=is_new), request, response)
    facts = read(Facts, json.dumps(_from_query(request)).encode())
    ended = await _file(request, caller, facts, form, key)
    return _answered(ended, request, response)


def _from_query(request: Request) -> dict[str, Any]:
    """What the query says of the job, and of lines that leave fields out."""
    facts: dict[str, Any] = {}
    for name, text in request.query_params.items():
        if name in Defaults.model_fields:
            facts.setdefault("spec", {})[name] = value_of(name, text)
        elif name in ("proof", "max_parallel") or (name == "priority" and text.isdigit()):
            facts[name] = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else text
        elif name == "reuse":
            facts[name] = {"true": True, "false": False}.get(text, text)
        elif name in ("after", "after_ok"):
            facts[name] = [part for part in text.split(",") if part]
        elif name in ("format", "matrix", "spec", "webhook"):
            raise Invalid([Fault(name, text, "send it as JSON, and the file with PATCH")])
        else:
            facts[name] = text
    return facts


def _create(caller: Caller, facts: Facts, form: Form, key: str | None) -> tuple[BulkUpload, bool]:
    with transaction() as db:
        return uploads.create(db, caller, facts, form, key=key)


# ------------------------------------------------------------------------------------------------ a file at once


async def _file(request: Request, caller: Caller, facts: Facts, form: Form, key: str | None) -> Ended:
    upload, is_new = await run_in_threadpool(_create, caller, facts, form, key)
    known = [] if is_new else await run_in_threadpool(_chunks, upload)
    again = Again(known, key or "")
    if upload.status == Status.ACCEPTED:
        async for part in request.stream():
            again.left(part)
        again.end(whole=True)
        return Ended(upload, is_new=False)
    intake = Intake(caller, upload)
    try:
        await take_in(request, intake, final=True, unseen=again.left)
        again.end(whole=False)
        return await _finish(caller, upload.id, received=intake.received)
    except Invalid:
        if not again.differs:  # that one is another request's
            await run_in_threadpool(_discard, caller, upload.id)
        raise
    except (BudgetExceeded, TooMany, TooLarge):
        if key is None:  # nobody could go on with it
            await run_in_threadpool(_discard, caller, upload.id)
        raise


def _chunks(upload: BulkUpload) -> list[tuple[int, bytes]]:
    with transaction() as db:
        return uploads.chunks_of(db, upload.id)


def _discard(caller: Caller, upload_id: UUID) -> None:
    with transaction() as db:
        found = uploads.find(db, caller.account_id, upload_id)
        if found.status == Status.OPEN:
            uploads.discard(db, caller.account_id, upload_id)


# ------------------------------------------------------------------------------------------------ bit by bit


@router.patch(
    "/{upload}",
    responses={
        202: {"model": answers.Bulk, "description": "it was the last part, and is a job now"},
        **documented(402, 403, 404, 409, 413, 422),
    },
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/x-ndjson": LINES, "text/csv": LINES}}
    },
)
async def append_to_bulk(
    caller: Submitter,
    upload: UploadId,
    *,
    request: Request,
    response: Response,
    offset: Offset,
    finish: Annotated[bool, Query(description="these are the last bytes of the file")] = False,
) -> answers.Bulk:
    """Send the file's bytes from an offset on: where the upload is. What counts is `received` in the answer.

    It stands at the end of a line: what came behind it is to be sent again. Of two who send the same bytes the later is
    told where the upload is by then (409, `offset`).
    """
    found = await run_in_threadpool(_open, caller, _id(upload), offset)
    intake = Intake(caller, found)
    await take_in(request, intake, final=finish)
    if finish:
        ended = await _finish(caller, found.id, received=intake.received)
        response.status_code = 202
        return _answered(ended, request, response)
    return await run_in_threadpool(_show, caller, found.id, request)


def _open(caller: Caller, upload_id: UUID, offset: int) -> BulkUpload:
    with transaction() as db:
        found = uploads.find(db, caller.account_id, upload_id)
    if found.status != Status.OPEN:
        raise Conflict(f"this upload is {found.status}", upload=_name(found), status=found.status)
    if found.format == Form.MATRIX:
        raise Conflict("this upload is a matrix: send it again under its key", upload=_name(found))
    if found.received != offset:
        raise Conflict(
            f"this upload has {found.received} bytes; go on from there", upload=_name(found), offset=found.received
        )  # fmt: skip
    return found


@router.post("/{upload}/finish", status_code=202, responses=documented(402, 403, 404, 409, 422))
async def finish_bulk(
    caller: Submitter, upload: UploadId, request: Request, response: Response
) -> answers.Bulk:
    """Make what was sent a job: all of it can be claimed in one step."""
    return _answered(await _finish(caller, _id(upload)), request, response)


async def _finish(caller: Caller, upload_id: UUID, *, received: int | None = None) -> Ended:
    ended = await run_in_threadpool(_finished, caller, upload_id, received)
    if ended.models:
        tokens.wake(list(ended.models))
    return ended


def _finished(caller: Caller, upload_id: UUID, received: int | None) -> Ended:
    with transaction() as db:
        ended = uploads.finish(db, caller, upload_id, received=received)
    if ended.upload.status == Status.REFUSED:
        with transaction() as db:
            errors = uploads.errors_of(db, upload_id, limit=SHOWN)
        raise _refused(ended.upload, errors)
    return ended


def _refused(upload: BulkUpload, errors: Sequence[BulkError]) -> LinesRefused:
    faults = [Fault(f"lines[{e.line}].{e.field}", e.value, e.allowed) for e in errors]
    return LinesRefused(
        faults or [Fault("lines", upload.lines, "there is no line that is an image")], upload=_name(upload)
    )


# ------------------------------------------------------------------------------------------------ to look at


@router.get("", responses=documented(422))
def list_bulk(
    caller: Reader,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[str | None, Query(description="an upload's id: only older ones")] = None,
) -> answers.Bulks:
    """The account's bulk uploads, newest first."""
    try:
        cursor = None if before is None else _id(before)
    except NotFound:
        raise Invalid([Fault("before", before, "it must be an upload's id, as in next")]) from None
    with transaction() as db:
        page = [_shown(u, request) for u in uploads.every(db, caller.account_id, before=cursor, limit=limit)]
    return answers.Bulks(uploads=page, next=page[-1].id if len(page) == limit else None)


@router.get("/{upload}", responses=documented(404))
def show_bulk(caller: Reader, upload: UploadId, request: Request) -> answers.Bulk:
    """An upload: how much of it is there."""
    return _show(caller, _id(upload), request)


@router.delete("/{upload}", status_code=204, responses=documented(403, 404, 409))
def discard_bulk(caller: Submitter, upload: UploadId) -> None:
    """Give up an upload that is no job yet."""
    with transaction() as db:
        uploads.discard(db, caller.account_id, _id(upload))


@router.get(
    "/{upload}/errors",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "a line of JSON for each field that was refused, in the order of lines",
            "content": {"application/x-ndjson": {"schema": {"$ref": "#/components/schemas/BulkError"}}},
        },
        **documented(404),
    },
)
def list_bulk_errors(caller: Reader, upload: UploadId) -> StreamingResponse:
    """What is wrong with which line: NDJSON. The first 100,000 bad lines; more are only counted."""
    with transaction() as db:
        found = uploads.find(db, caller.account_id, _id(upload)).id
    return StreamingResponse(_errors(found), media_type="application/x-ndjson")


def _errors(upload_id: UUID) -> Iterator[str]:
    after = (0, -1)
    while True:
        with transaction() as db:
            page = uploads.errors_of(db, upload_id, after=after)
        yield "".join(
            answers.BulkError(
                line=e.line, custom_id=e.custom_id, field=e.field, value=e.value, allowed=e.allowed
            ).model_dump_json()
            + "\n"
            for e in page
        )
        if len(page) < uploads.PAGE:
            return
        after = (page[-1].line, page[-1].no)


# ------------------------------------------------------------------------------------------------ matrices


@router.post("/preview", responses=documented(413, 422), openapi_extra={"requestBody": BODY})
def preview_bulk(
    caller: Reader, body: Body, limit: Annotated[int, Query(ge=0, le=1000)] = 20
) -> answers.BulkPreview:
    """What a matrix comes to: how many images, the first ones, and what they cost at most. Nothing is kept."""
    facts = read(Facts, body)
    matrix = _expanded(facts)
    rates: dict[str, pricing.Rate] = {}
    with transaction() as db:
        methods = {t.model.name: t.model.price.method for t in matrix.templates}
        rates = pricing.current(db, account_id=caller.account_id, currency=caller.currency, models=methods)
    costs = pricing.total(
        rates[t.model.name].amount(uploads.billed(t, rates[t.model.name]) * matrix.per_template())
        for t in matrix.templates
    )
    return answers.BulkPreview(
        count=matrix.count,
        prompts=len(matrix.prompts),
        combinations=len(matrix.templates),
        seeds=len(matrix.seeds),
        quoted=pricing.shown(costs),
        currency=caller.currency,
        specs=[
            answers.PreviewedSpec(index=n, seed=seed, spec=spec.to_json())
            for n, (spec, seed) in enumerate(matrix.shown(0, limit))
        ],
    )


def _expanded(facts: Facts) -> Matrix:
    if facts.matrix is None:
        raise Invalid([Fault("matrix", None, "it is required")])
    if facts.format is not None:
        raise Invalid([Fault("format", facts.format, "a matrix is not a file")])
    return Matrix(facts.matrix, facts.defaults(), catalog(), most=settings().max_bulk)


async def _matrix(request: Request, caller: Caller, facts: Facts, key: str | None) -> Ended:
    matrix = await run_in_threadpool(_expanded, facts)
    upload, is_new = await run_in_threadpool(_create, caller, facts, Form.MATRIX, key)
    if upload.status == Status.ACCEPTED:
        return Ended(upload, is_new=False)
    intake = Intake(caller, upload)
    try:
        while intake.received < matrix.count:
            async with room(request):
                await run_in_threadpool(_place, intake, matrix)
        return await _finish(caller, upload.id, received=matrix.count)
    except (BudgetExceeded, TooMany, Invalid):
        if key is None or is_new:
            await run_in_threadpool(_discard, caller, upload.id)
        raise


def _place(intake: Intake, matrix: Matrix) -> None:
    rows = matrix.rows(intake.received, PLACES)
    intake.rows(rows)


# ------------------------------------------------------------------------------------------------ answers


def _id(shown: str) -> UUID:
    """Raises NotFound if it is no upload's."""
    value = ids.parse("blk", shown)
    if ids.job_of(value) != value:
        raise NotFound(id=shown)
    return value


def _name(upload: BulkUpload) -> str:
    return ids.public("blk", upload.id)


def _show(caller: Caller, upload_id: UUID, request: Request) -> answers.Bulk:
    with transaction() as db:
        return _shown(uploads.find(db, caller.account_id, upload_id), request)


def _answered(ended: Ended, request: Request, response: Response) -> answers.Bulk:
    shown = _shown(ended.upload, request)
    response.headers["Location"] = shown.urls.self
    if not ended.is_new:
        response.headers["Idempotent-Replayed"] = "true"
    return shown


def _shown(upload: BulkUpload, request: Request) -> answers.Bulk:
    name = _name(upload)
    job = ids.public("job", upload.id) if upload.status == Status.ACCEPTED else None
    farm = Around.of(request).url
    url = f"{farm}/v1/bulk/{name}"
    return answers.Bulk(
        id=name,
        status=upload.status,
        mode=upload.mode,
        format=upload.format,
        name=upload.facts.get("name"),
        received=upload.received,
        lines=upload.lines,
        good=upload.good,
        bad=upload.bad,
        job=job,
        created_at=upload.created_at,
        ended_at=upload.ended_at,
        urls=answers.BulkUrls(self=url, errors=f"{url}/errors", job=job and f"{farm}/v1/jobs/{job}"),
    )
