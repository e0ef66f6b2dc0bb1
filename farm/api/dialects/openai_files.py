"""`/v1/files`, as OpenAI has them for batches, and Replicate for inputs: the field is `file` there, `content` here.

A file's URL is taken as an input image anywhere in the farm. Batches' own files are written while they are fetched.
"""

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, Literal
from urllib.parse import urlencode
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import Field

from farm import batches, files, once
from farm.accounts import Caller
from farm.answers import Answer
from farm.api import forms
from farm.api.auth import Reader, Submitter, reader
from farm.api.bodies import limited
from farm.api.dialects import batch_output
from farm.api.dialects.answers import answered
from farm.api.dialects.openai import documented, errors
from farm.api.dialects.served import translated
from farm.api.idempotency import REPLAYED
from farm.api.inputs import AROUND
from farm.api.links import base
from farm.api.params import IdempotencyHeader, checked_key
from farm.db import transaction
from farm.errors import Conflict, FarmError, Fault, Invalid, NotFound
from farm.settings import settings
from farm.tables import File

router = APIRouter(prefix="/v1/files", tags=["dialects"], route_class=translated(errors))

PURPOSES = ("batch", "vision", "user_data", "assistants", "fine-tune", "evals")
INPUT = "input"  # of a file that came as Replicate's do
JSONL = "application/jsonl"
FileId = Annotated[str, Path(max_length=64, examples=["file-0192f0c1a2b37c4d8e5f6a7b8c000000"])]


class FileShown(Answer):
    """A file in OpenAI's shape."""

    id: str
    object: Literal["file"] = "file"
    bytes: int = Field(description="of a batch's own files 0: they are written while they are fetched")
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileOfReplicate(Answer):
    """A file in Replicate's shape."""

    id: str
    name: str
    content_type: str
    size: int
    etag: str
    checksums: dict[str, str]
    metadata: dict[str, Any]
    created_at: str
    expires_at: str | None
    urls: dict[str, str]


class FilesShown(Answer):
    object: Literal["list"] = "list"
    data: list[FileShown]
    first_id: str | None
    last_id: str | None
    has_more: bool
    results: list[FileOfReplicate] = Field(description="those that came as Replicate's do, in its shape")
    next: str | None = Field(description="as Replicate's clients ask for more")
    previous: None = None


class FileDeleted(Answer):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


BINARY = {"type": "string", "format": "binary"}
FORM = {
    "type": "object",
    "properties": {
        "file": BINARY,
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        "content": {**BINARY, "description": "as Replicate calls the file; its answer is Replicate's then"},
        "metadata": {"type": "string", "description": "of Replicate: a JSON object"},
    },
}


@router.post(
    "",
    response_class=Response,
    responses={
        200: {"model": FileShown},
        201: {"model": FileOfReplicate, "description": "it came as Replicate's files do"},
        **documented(409, 413),
    },
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}},
)
async def upload_file(
    caller: Submitter, request: Request, idempotency_key: IdempotencyHeader = None
) -> Response:
    """Send a file: requests for a batch, or an image to be named in requests by its URL."""
    key = checked_key(idempotency_key, field="Idempotency-Key")
    body = await limited(request, settings().file_bytes + AROUND)
    parts = await run_in_threadpool(forms.parts_of, body, request.headers.get("content-type", ""))
    return await run_in_threadpool(_upload, caller, parts, base(request), key)


def _upload(caller: Caller, parts: list[forms.Part], url: str, key: str | None) -> Response:
    file, facts = _facts(parts)
    made = files.put(caller.account_id, file.data, **facts)
    digest = forms.digest(parts)
    with transaction() as db:
        before = key and once.earlier(db, caller.account_id, "POST /v1/files", key, digest)
        if before:
            files.drop(db, made)
            return answered(before.answer, before.status, headers={REPLAYED: "true"})
        row = files.finish(db, made)
        status = 201 if row.purpose == INPUT else 200
        answer = shown(row, url)
        if key:
            once.keep(
                db, caller.account_id, "POST /v1/files", key, body_sha256=digest, status=status, headers={},
                answer=answer,
            )  # fmt: skip
    return answered(answer, status)


def _facts(parts: list[forms.Part]) -> tuple[forms.Part, dict[str, Any]]:
    """The file of a form, and what is kept of it. Raises Invalid."""
    named = {p.name: p for p in parts}
    if len(named) < len(parts):
        raise Invalid([Fault("body", None, "a field may come once")])
    file, replicates = named.pop("file", None), named.pop("content", None)
    if (file is None) == (replicates is None):
        raise Invalid([Fault("file", None, "it is required; Replicate's clients call it content")])
    labels, purpose, name, kind = None, INPUT, None, None
    if file is not None:
        purpose = named.pop("purpose").text if "purpose" in named else ""
        if purpose not in PURPOSES:
            raise Invalid([Fault("purpose", purpose, f"allowed are {', '.join(PURPOSES)}")])
    else:
        labels = _labels(named.pop("metadata", None))
        name, kind = (named.pop(n).text if n in named else None for n in ("filename", "type"))
    if named:
        raise Invalid([Fault(next(iter(named)), None, "there is no such field")])
    found = file or replicates
    assert found
    name = "".join(c for c in name or found.filename or "file" if c.isprintable())[:255] or "file"
    kind = "".join(c for c in kind or found.content_type if " " <= c <= "~")[:127]
    kind = kind or "application/octet-stream"
    return found, {"purpose": purpose, "filename": name, "content_type": kind, "labels": labels}


def _labels(part: forms.Part | None) -> dict[str, Any] | None:
    if part is None:
        return None
    try:
        found = json.loads(part.text)
        text = json.dumps(found)
    except (ValueError, RecursionError):
        raise Invalid([Fault("metadata", None, "it must be a JSON object")]) from None
    if not isinstance(found, dict) or len(text) > 16_384 or "\\u0000" in text or "\\ud" in text:
        allowed = "allowed is a JSON object of up to 16384 characters, without NUL and half characters"
        raise Invalid([Fault("metadata", None, allowed)])
    return found


@router.get("", response_model=FilesShown, responses=documented(404))
def list_files(
    caller: Reader,
    request: Request,
    *,
    after: Annotated[str | None, Query(max_length=64, description="a file's id: those after it")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    order: Annotated[Literal["asc", "desc"], Query(description="by when they came")] = "desc",
    purpose: Annotated[str | None, Query(max_length=63)] = None,
) -> FilesShown:
    """The account's files, newest first; batches' own are told of by their batch."""
    try:
        cursor = None if after is None else files.parse(after)
    except NotFound:
        raise Invalid([Fault("after", after, "it must be a file's id, as in last_id")]) from None
    wanted = None if purpose is None else purpose.replace("\0", "")
    with transaction() as db:
        rows = files.every(
            db, caller.account_id, after=cursor, purpose=wanted, limit=limit + 1, oldest_first=order == "asc"
        )
    has_more, url = len(rows) > limit, base(request)
    data = [_shown(row) for row in rows[:limit]]
    return FilesShown(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=has_more,
        results=[_of_replicate(row, url) for row in rows[:limit] if row.purpose == INPUT],
        next=f"{url}/v1/files?{_more(request, data[-1].id)}" if has_more else None,
    )


def _more(request: Request, last: str) -> str:
    """The query of the next page."""
    return urlencode({**request.query_params, "after": last})


# {token}: OpenAPI knows one name for a place in a path, and signed links have it too
@router.delete(
    "/{token}",
    response_model=FileDeleted,
    responses={
        204: {"description": "it is deleted; it came as Replicate's files do"},
        **documented(404, 409),
    },
)
def delete_file(caller: Submitter, token: FileId) -> FileDeleted | Response:
    """Delete a file. What was made from it stays."""
    file_id = files.parse(token)
    with transaction() as db:
        if (place := batches.of_file(file_id)) is not None:
            batches.find(db, caller.account_id, place[0])
            raise Conflict("a batch's own files go when the images of its jobs are deleted")
        came_as = files.find(db, caller.account_id, file_id).purpose
        files.remove(db, caller.account_id, file_id)
    return Response(status_code=204) if came_as == INPUT else FileDeleted(id=token)


@router.get(
    "/{file}/content",
    response_class=Response,
    responses={
        200: {"description": "the file", "content": {"application/octet-stream": {"schema": BINARY}}},
        **documented(404),
    },
)
async def show_file_content(caller: Reader, file: FileId, request: Request) -> Response:
    """A file as it came, or a batch's results: a line for each request, written while it is fetched."""
    row = await run_in_threadpool(_find, caller, files.parse(file))
    if isinstance(row, File):
        data = await run_in_threadpool(files.content, row)
        return Response(data, media_type="application/octet-stream")
    lines = batch_output.lines(caller.account_id, row[0], which=row[1], url=base(request))
    return StreamingResponse(lines, media_type="application/octet-stream")


async def show_file(request: Request, file: str) -> Response:
    """What GET /v1/files/{id} answers: farm/api/images.py, whose signed links have the same path."""
    try:
        caller = await reader(request)
        row = await run_in_threadpool(_find, caller, files.parse(file))
    except FarmError as e:
        return errors(request, e)
    if isinstance(row, File):
        return answered(shown(row, base(request)))
    return answered(_of_batch(*row).model_dump(mode="json"))


def _find(caller: Caller, file_id: UUID) -> File | tuple[batches.BatchView, int]:
    """A file, or the batch whose file it is and which. Raises NotFound, Gone."""
    place = batches.of_file(file_id)
    with transaction() as db:
        if place is None:
            return files.find(db, caller.account_id, file_id)
        view = batches.find(db, caller.account_id, place[0])
    if files.public(file_id) not in (batch_output.output_file(view), batch_output.error_file(view)):
        raise NotFound(file=files.public(file_id))
    return view, place[1]


def shown(row: File, url: str) -> Mapping[str, Any]:
    """A file in the shape of the API it came by."""
    made = _of_replicate(row, url) if row.purpose == INPUT else _shown(row)
    return made.model_dump(mode="json")


def _of_replicate(row: File, url: str) -> FileOfReplicate:
    name = files.public(row.id)
    expires_at = row.created_at + timedelta(days=settings().file_days)
    return FileOfReplicate(
        id=name,
        name=row.filename,
        content_type=row.content_type,
        size=row.bytes,
        etag=row.sha256.hex(),
        checksums={"sha256": row.sha256.hex()},
        metadata=row.labels or {},
        created_at=row.created_at.isoformat(),
        expires_at=expires_at.isoformat(),
        urls={"get": f"{url}/v1/files/{name}"},
    )


def _shown(row: File) -> FileShown:
    return FileShown(
        id=files.public(row.id),
        bytes=row.bytes,
        created_at=int(row.created_at.timestamp()),
        expires_at=int(row.created_at.timestamp() + settings().file_days * 86_400),
        filename=row.filename,
        purpose=row.purpose,
    )


def _of_batch(view: batches.BatchView, which: int) -> FileShown:
    assert view.ended_at
    kind = "output" if which == batches.OUTPUT else "errors"
    return FileShown(
        id=files.public(batches.file_of(view.batch.id, which)),
        bytes=0,
        created_at=int(view.ended_at.timestamp()),
        expires_at=None,
        filename=f"{batches.public(view.batch.id)}_{kind}.jsonl",
        purpose="batch_output",
    )
