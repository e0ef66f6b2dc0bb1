"""`/v1/images`, as OpenAI and SiliconFlow serve it: generations and edits, streamed where that is asked for.

A call waits for its images. Where the time runs out it answers 408, which clients try again: the second try waits for
the first one's job.
"""

import base64
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import ValidationError

from farm import picture
from farm.accounts import Caller
from farm.answers import ModelListed
from farm.api import forms
from farm.api.auth import Reader, Submitter
from farm.api.bodies import Body, described, limited, read
from farm.api.dialects import images, served
from farm.api.dialects.again import Call, patience_s
from farm.api.dialects.answers import Responses, answered
from farm.api.dialects.images import (
    Edit,
    Generation,
    ImagesShown,
    OpenAIErrors,
    Wanted,
    base64_of,
    error_body,
    wanted,
)
from farm.api.dialects.served import Drawn, UnknownModel, told, translated
from farm.api.inputs import AROUND, given, kept
from farm.api.params import IdempotencyHeader, checked_key
from farm.errors import BudgetExceeded, FarmError, Fault, Invalid, Refused
from farm.faults import faults_in
from farm.features import Given
from farm.picture import MaskOf
from farm.queue import FrameStatus
from farm.settings import settings

LOOK_EVERY_S = 0.5  # for previews
BREATH_S = 10.0  # a stream says at least something this often
# their clients know no 422 and no 410: what was deleted is not found there
AS_THEIRS = {422: 400, 410: 404}


def errors(request: Request, error: Exception) -> Response:
    """Any error in OpenAI's and SiliconFlow's words."""
    facts = told(request, error)
    status, code, headers = facts.status, None, dict(facts.headers)
    if isinstance(error, BudgetExceeded):  # their clients know it as this; they are told not to try again
        status, code, headers["x-should-retry"] = 429, "insufficient_quota", "false"
    elif isinstance(error, UnknownModel):
        code = "model_not_found"
    else:
        status = AS_THEIRS.get(status, status)
    param = "model" if code == "model_not_found" else facts.field
    return answered(error_body(status, facts.detail, param=param, code=code), status, headers=headers)


def documented(*statuses: int) -> Responses:
    """What may be answered beside what was asked for."""
    said = {401: "no valid API key", 503: "a service the farm stands on is away", **WORDS}
    return {
        s: {"model": OpenAIErrors, "description": said[s]}
        for s in sorted({400, 401, 403, 429, 503, *statuses})
    }


WORDS: Mapping[int, str] = {
    400: "a field is not allowed: param says which",
    403: "this API key may not do that",
    404: "there is no such model, file or batch, or no more",
    408: "the images are not there yet; the job goes on, and the same call tried again waits for it",
    409: "it does not fit the state things are in",
    413: "the body is too large",
    429: "too many requests, a full queue, or a budget that does not cover it",
    500: "no image came of it",
}
router = APIRouter(prefix="/v1", tags=["dialects"], route_class=translated(errors))
IMAGES: Mapping[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"model": ImagesShown, "content": {"text/event-stream": {}}},
        **documented(404, 408, 409, 413, 500),
    },
}


@router.post(
    "/images/generations",
    **IMAGES,
    openapi_extra=described(
        Generation,
        {"prompt": "a red circle on a blue background", "n": 2, "response_format": "b64_json"},
        {"model": "starter", "prompt": "a green square", "image_size": "96x64", "batch_size": 1, "seed": 7},
    ),
)
async def generate_images(
    caller: Submitter, body: Body, request: Request, idempotency_key: IdempotencyHeader = None
) -> Response:
    """Make images of a prompt and wait for them, as OpenAI and SiliconFlow do: see docs/dialects.md."""
    asked = await run_in_threadpool(read, Generation, body)
    image = None if asked.image is None else await given(caller, asked.image, field="image")
    return await _answer(request, caller, asked, wanted(asked, image=image), body=body, key=idempotency_key)


FILE = {"type": "string", "format": "binary"}
FORM = {
    "type": "object",
    "required": ["image", "prompt"],
    "properties": {
        "image": FILE,
        "mask": FILE,
        **{name: {"type": "string"} for name in Edit.model_fields if name not in ("image", "mask")},
    },
}


@router.post(
    "/images/edits",
    **IMAGES,
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}},
)
async def edit_images(
    caller: Submitter, request: Request, idempotency_key: IdempotencyHeader = None
) -> Response:
    """Change an image by a prompt: where its mask, or else the image itself, is transparent; or all of it."""
    body = await limited(request, 2 * settings().input_bytes + AROUND)
    content_type = request.headers.get("content-type", "")
    parts = await run_in_threadpool(forms.parts_of, body, content_type)
    asked, (image, mask) = _edit(parts)
    start = await kept(caller, image.data, image.content_type, field="image")
    hole = await _mask(caller, mask or image, start, must=mask is not None)
    return await _answer(
        request,
        caller,
        asked,
        wanted(asked, image=start, mask=hole),
        body=forms.same(parts),
        key=idempotency_key,
    )


def _edit(parts: list[forms.Part]) -> tuple[Edit, tuple[forms.Part, forms.Part | None]]:
    """The fields of a form, its image and its mask. Raises Invalid."""
    found = [p for p in parts if p.name in ("image", "image[]")]
    masks = [p for p in parts if p.name == "mask"]
    faults = []
    if len(found) != 1:
        faults.append(Fault("image", f"{len(found)} images", "send one: it is started from"))
    if len(masks) > 1:
        faults.append(Fault("mask", f"{len(masks)} masks", "allowed is one"))
    fields = {p.name: p.text for p in parts if p not in found and p not in masks}
    try:
        asked = Edit.model_validate(fields)
    except ValidationError as e:
        faults += faults_in(e, Edit)
    if faults:
        raise Invalid(faults)
    return asked, (found[0], masks[0] if masks else None)


async def _mask(caller: Caller, part: forms.Part, image: Given, *, must: bool) -> Given | None:
    """What is transparent in a mask, or in the image, as a mask of the farm's."""
    field = "mask" if must else "image"
    try:
        data = await run_in_threadpool(picture.mask, part.data, MaskOf.ALPHA)
    except ValueError as e:
        raise Invalid([Fault(field, part.content_type, str(e))]) from None
    if data is None and must:
        raise Invalid([Fault(field, None, "nothing of it is transparent: that is what is painted anew")])
    if data is None:
        return None
    hole = await kept(caller, data, "image/png", field=field)
    if (hole.width, hole.height) != (image.width, image.height):
        size = f"it must be {image.width} × {image.height}, as the image; it is {hole.width} × {hole.height}"
        raise Invalid([Fault(field, None, size)])
    return hole


@router.post("/images/variations", response_class=Response, responses=documented())
async def vary_images(caller: Submitter) -> Response:
    """Not served: a variation has no prompt. Send the image to /v1/images/edits with one."""
    raise Refused("variations are not served: send the image to /v1/images/edits with a prompt")


@router.get("/models/{model}", response_model=ModelListed, responses=documented(404))
async def show_model(caller: Reader, model: Annotated[str, Path(max_length=200)]) -> ModelListed:
    """A model by its name or alias, as OpenAI's API shows one."""
    return ModelListed(id=served.model_named(model).name)


# ------------------------------------------------------------------------------------------------ answers


async def _answer(
    request: Request, caller: Caller, asked: Generation, want: Wanted, *, body: bytes, key: str | None
) -> Response:
    began = time.monotonic()
    key = checked_key(key, field="Idempotency-Key")
    call = Call.of(request, caller, body)
    job = None if key else await call.earlier()
    if job is None:
        job = await served.submitted(
            request, caller, want.submission, body=body, key=key, names=asked.names, also=call.note
        )
    if asked.stream:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        stream = _stream(request, caller, asked, job, call=call)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
    patience = patience_s(request, settings().sync_wait_s)
    made = await served.images_of_job(request, caller, job, timeout_s=patience)
    answer = await images.shown(request, asked, made, began=began, notes=want.notes)
    await call.answered(request, job)
    return answered(answer.model_dump(mode="json", exclude_none=True))


async def _stream(
    request: Request, caller: Caller, asked: Generation, job: UUID, *, call: Call
) -> AsyncIterator[bytes]:
    """Previews while there are any, then each image; an error as an event, since the status is out by now."""
    kind = "image_edit" if isinstance(asked, Edit) else "image_generation"
    try:
        async for chunk in _previews(request, caller, asked, job, kind=kind):
            yield chunk
        made = await served.images_of_job(request, caller, job, timeout_s=0)
        for frame in made.done:
            assert frame.image
            size = f"{frame.image.width}x{frame.image.height}"
            more = {"usage": NO_TOKENS, "seed": frame.seed, "revised_prompt": frame.revised_prompt}
            data = _event(asked, await base64_of(frame), form=frame.image.format, size=size) | more
            yield _said(f"{kind}.completed", data)
        await call.answered(request, job)
    except FarmError as e:
        yield format_sse_event(data_str=bytes(errors(request, e).body).decode(), event="error")


NO_TOKENS = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


async def _previews(
    request: Request, caller: Caller, asked: Generation, job: UUID, *, kind: str
) -> AsyncIterator[bytes]:
    """Up to so many previews of each frame as are asked for, until the job has ended or the time is over."""
    deadline = time.monotonic() + settings().sync_wait_s
    told_of: dict[int, list[bytes]] = {}
    while (left := deadline - time.monotonic()) > 0:
        wait_s = min(left, LOOK_EVERY_S if asked.partial_images else BREATH_S)
        if await request.app.state.feed.ended(caller.account_id, job, wait_s):
            return
        yield b": the image is being made\n\n"
        if not asked.partial_images:
            continue
        for frame in (await run_in_threadpool(served.look, caller, job)).frames:
            seen = told_of.setdefault(frame.index, [])
            jpeg = _preview(request, frame)
            if jpeg is None or jpeg in seen[-1:] or len(seen) >= asked.partial_images:
                continue
            size = f"{frame.spec['width']}x{frame.spec['height']}"
            data = _event(asked, base64.b64encode(jpeg).decode(), form="jpeg", size=size)
            yield _said(f"{kind}.partial_image", data | {"partial_image_index": len(seen)})
            seen.append(jpeg)


def _preview(request: Request, frame: Drawn) -> bytes | None:
    if frame.status != FrameStatus.CLAIMED:
        return None
    found: bytes | None = request.app.state.progress.preview(frame.job_id, frame.index, frame.pack_id)
    return found


def _event(asked: Generation, data: str, *, form: str, size: str) -> dict[str, Any]:
    return {
        "b64_json": data,
        "created_at": int(time.time()),
        "size": size,
        "quality": asked.quality or "auto",
        "background": "opaque",
        "output_format": form,
    }


def _said(kind: str, data: Mapping[str, Any]) -> bytes:
    text = answered({"type": kind, **data}).body
    return format_sse_event(data_str=bytes(text).decode(), event=kind)
