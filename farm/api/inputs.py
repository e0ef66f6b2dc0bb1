"""Input images: upload, list, remove; and taking in what a submission names by URL, before it is one."""

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from farm import answers, ids, inputs, submissions
from farm.accounts import Caller
from farm.api import forms, ours
from farm.api.auth import Reader, Submitter
from farm.api.bodies import limited
from farm.api.problems import documented
from farm.db import transaction
from farm.errors import Fault, Invalid, NotFound
from farm.features import STORED, Given, refs_of
from farm.fetch import NotFetched, fetch
from farm.inputs import InputView
from farm.settings import settings
from farm.spec import CONTENT_TYPE, Asked, Format
from farm.submissions import Submission

router = APIRouter(prefix="/v1/inputs", tags=["inputs"])

AROUND = 64 << 10  # bytes of a form beside its file
MAX_URLS = 64  # of one submission
AT_ONCE = 8  # fetched for one submission, or one upload of lines
FILE = {"schema": {"type": "string", "format": "binary"}}


@router.post(
    "",
    status_code=201,
    responses={200: {"description": "it was there already"}, **documented(403, 413, 422)},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                **dict.fromkeys(CONTENT_TYPE.values(), FILE),
                "application/octet-stream": FILE,
                "multipart/form-data": {
                    "schema": {"type": "object", "properties": {"file": FILE["schema"]}, "required": ["file"]}
                },
            },
        }
    },
)
async def upload_input(caller: Submitter, request: Request, response: Response) -> answers.Input:
    """Send an image to start frames from: PNG, JPEG or WebP, as the body or as a form's `file`.

    The same image is kept once. Name it in specs by its id or by sha256:… of the file.
    """
    body = await limited(request, settings().input_bytes + AROUND)
    content_type = request.headers.get("content-type", "")
    data, kind = body, content_type
    if content_type.lower().startswith("multipart/form-data"):
        data, kind = _file_in(body, content_type)
    view, is_new = await run_in_threadpool(_kept, caller.account_id, data, kind, field="file")
    if not is_new:
        response.status_code = 200
    response.headers["Location"] = f"/v1/inputs/{ids.public('inp', view.input.id)}"
    return _shown(view)


def _kept(account_id: UUID, data: bytes, content_type: str, *, field: str) -> tuple[InputView, bool]:
    made, is_new = inputs.keep(account_id, data, inputs.look_at(data, content_type, field=field))
    with transaction() as db:
        return inputs.find(db, account_id, made), is_new


@router.get("", responses=documented(422))
def list_inputs(
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[str | None, Query(description="an input's id: only older ones")] = None,
) -> answers.Inputs:
    """The account's input images, newest first."""
    try:
        cursor = None if before is None else ids.parse("inp", before)
    except NotFound:
        raise Invalid([Fault("before", before, "it must be an input's id, as in next")]) from None
    with transaction() as db:
        page = [_shown(v) for v in inputs.every(db, caller.account_id, before=cursor, limit=limit)]
    return answers.Inputs(inputs=page, next=page[-1].id if len(page) == limit else None)


@router.get("/{input_id}", responses=documented(404, 410))
def show_input(caller: Reader, input_id: str) -> answers.Input:
    """An input image, and how many open jobs need it."""
    with transaction() as db:
        return _shown(inputs.find(db, caller.account_id, ids.parse("inp", input_id)))


@router.delete("/{input_id}", status_code=204, responses=documented(403, 404, 409, 410))
def delete_input(caller: Submitter, input_id: str) -> None:
    """Remove an input image that no open job needs; its file goes soon after."""
    with transaction() as db:
        inputs.remove(db, caller.account_id, ids.parse("inp", input_id))


def _shown(view: InputView) -> answers.Input:
    row = view.input
    return answers.Input(
        id=ids.public("inp", row.id),
        sha256=row.sha256.hex(),
        bytes=row.bytes,
        width=row.width,
        height=row.height,
        content_type=CONTENT_TYPE[Format(row.format)],
        jobs=view.jobs,
        created_at=row.created_at,
        used_at=row.used_at,
    )


def _file_in(body: bytes, content_type: str) -> tuple[bytes, str]:
    """The one file of a form, and the type it claims."""
    for part in forms.parts_of(body, content_type):
        if part.name == "file":
            return part.data, part.content_type
    raise Invalid([Fault("file", None, "the form needs a part of this name, with the image")])


# ------------------------------------------------------------------------------------------------ by URL


async def taken(caller: Caller, submission: Submission, *, idempotency_key: str | None) -> Submission:
    """The submission with its data and https URLs taken in: specs name inputs of the account alone.

    Nothing is fetched for one that was accepted before under its idempotency key.
    Raises Invalid naming each field whose image is not taken.
    """
    named = [(f"{path}.{at}", ref) for path, asked in submission.asked() for at, ref in refs_of(asked)]
    urls = {ref: field for field, ref in reversed(named) if not STORED.fullmatch(ref)}
    if not urls or (idempotency_key and await run_in_threadpool(_came_before, caller, idempotency_key)):
        return submission
    if len(urls) > MAX_URLS:
        raise Invalid(
            [Fault("specs", f"{len(urls)} images by URL", f"allowed are {MAX_URLS} in one submission")]
        )
    found = await fetched(caller.account_id, urls)
    faults = [fault for r in found.values() if isinstance(r, Invalid) for fault in r.faults]
    if faults:
        raise Invalid(faults)
    names = {ref: str(name) for ref, name in found.items()}
    if submission.spec is not None:
        return submission.model_copy(update={"spec": renamed(submission.spec, names)})
    return submission.model_copy(update={"specs": [renamed(a, names) for a in submission.specs or []]})


async def fetched(account_id: UUID, urls: Mapping[str, str]) -> dict[str, str | Invalid]:
    """Take in images by URL, some at a time. urls: the field that names each.

    Returns the name of each as an input of the account, or why it is not taken. Raises TooLarge, StorageAway.
    """
    room = asyncio.Semaphore(AT_ONCE)

    async def take(ref: str, field: str) -> str | Invalid:
        async with room:
            try:
                return await _take(account_id, ref, field)
            except Invalid as e:
                return e

    results = await asyncio.gather(*(take(ref, field) for ref, field in urls.items()))
    return dict(zip(urls, results, strict=True))


async def _take(account_id: UUID, ref: str, field: str) -> str:
    if ref.startswith("data:"):
        data, kind = await run_in_threadpool(inputs.data_of, ref, field=field)
    elif (own := await run_in_threadpool(ours.behind, account_id, ref)) is not None:
        data, kind = own
    else:
        try:
            data, kind = await fetch(ref, max_bytes=settings().input_bytes, within_s=settings().fetch_s)
        except NotFetched as e:
            raise Invalid([Fault(field, ref, str(e))]) from None
    await run_in_threadpool(_kept, account_id, data, kind, field=field)
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


async def given(caller: Caller, ref: str, *, field: str) -> Given:
    """The input that a field names, taken in if it is a URL.

    Raises Invalid naming the field; NotFound and Gone as inputs.known() does.
    """
    name = ref if STORED.fullmatch(ref) else await _take(caller.account_id, ref, field)
    return await run_in_threadpool(_known, caller.account_id, name)


async def kept(caller: Caller, data: bytes, content_type: str, *, field: str) -> Given:
    """An image that was sent, as an input of the account. Raises Invalid naming the field, TooLarge, StorageAway."""
    view, _ = await run_in_threadpool(_kept, caller.account_id, data, content_type, field=field)
    return Given(view.input.sha256.hex(), view.input.width, view.input.height)


def _known(account_id: UUID, name: str) -> Given:
    with transaction() as db:
        return inputs.known(db, account_id, {name})[name]


def _came_before(caller: Caller, key: str) -> bool:
    with transaction() as db:
        return submissions.came_before(db, caller, key)


def renamed(asked: Asked, names: Mapping[str, str]) -> Asked:
    """What is asked for, with its images named as they are called there; others stay as they are."""
    new: dict[str, object] = {n: names[r] for n in ("image", "mask") if (r := getattr(asked, n)) in names}
    if any(c.image in names for c in asked.control):
        new["control"] = tuple(
            c.model_copy(update={"image": names.get(c.image, c.image)}) for c in asked.control
        )
    return asked.model_copy(update=new) if new else asked
