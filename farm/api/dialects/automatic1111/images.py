"""Images: from text, from an image."""

import base64
import json
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from farm import ids, tickets
from farm.accounts import Caller
from farm.api.auth import Submitter
from farm.api.bodies import Body, described, read
from farm.api.dialects import asking
from farm.api.dialects.answers import Responses, answered
from farm.api.dialects.automatic1111.asked import NAMES, Img2Img, Txt2Img, spec_of
from farm.api.dialects.automatic1111.errors import ERRORS, WebuiRefusal, errors
from farm.api.dialects.automatic1111.masks import Masked, masked
from farm.api.dialects.automatic1111.said import WebuiImages, info_of
from farm.api.dialects.browsers import OwnPages
from farm.api.dialects.served import (
    Rendered,
    bytes_of,
    rendered,
    submitted,
    translated,
)
from farm.api.inputs import given
from farm.api.params import IdempotencyHeader
from farm.catalog import Model
from farm.errors import Fault, Invalid
from farm.settings import settings
from farm.tickets import Dialect

router = APIRouter(
    prefix="/sdapi/v1", tags=["dialects"], route_class=translated(errors), dependencies=[OwnPages]
)


SAME_SHAPE = 0.05  # how far the sides' ratio of an image may be from the frame's

MADE: Responses = {200: {"model": WebuiImages}, **ERRORS(402, 403, 404, 409, 410, 413, 422, 429)}
LATE: Responses = {
    500: {"model": WebuiRefusal, "description": "None of the images could be made"},
    504: {"model": WebuiRefusal, "description": "Not there in time; the job goes on"},
}


@router.post(
    "/txt2img", response_class=Response, responses={**MADE, **LATE}, openapi_extra=described(Txt2Img)
)
async def txt2img(
    caller: Submitter, body: Body, request: Request, idempotency_key: IdempotencyHeader = None
) -> Response:
    """Text to image; answers when the images are there."""
    return await _made(request, caller, await run_in_threadpool(read, Txt2Img, body), body, idempotency_key)


@router.post(
    "/img2img", response_class=Response, responses={**MADE, **LATE}, openapi_extra=described(Img2Img)
)
async def img2img(
    caller: Submitter, body: Body, request: Request, idempotency_key: IdempotencyHeader = None
) -> Response:
    """Image to image; answers when the images are there."""
    return await _made(request, caller, await run_in_threadpool(read, Img2Img, body), body, idempotency_key)


async def _made(request: Request, caller: Caller, asked: Txt2Img, body: bytes, key: str | None) -> Response:
    spec, model = spec_of(asked)
    over: Masked | None = None
    if isinstance(asked, Img2Img):
        if not asked.resize_mode and not (asked.mask and asked.inpaint_full_res in (None, True, 1)):
            spec["image"] = await _start(caller, spec, model)
        over = await masked(caller, asked, spec, model)
    task = (asked.force_task_id or "")[:100]

    def keep(db: Session, job_id: UUID) -> None:
        name = ids.public("job", job_id)
        tickets.write(
            db, caller.account_id, job_id,
            dialect=Dialect.AUTOMATIC1111, name=name, asked={"task": task},
        )  # fmt: skip

    submission = asking.submission(spec, names=NAMES)
    job_id = await submitted(request, caller, submission, body=body, key=key, names=NAMES, also=keep)
    found = await rendered(request, caller, job_id, timeout_s=settings().sync_wait_s)
    if not found.ended:
        words = f"the images are not there yet; the job goes on as {found.name}"
        return answered({"error": "TimedOut", "detail": words, "body": "", "errors": words}, 504)
    return await run_in_threadpool(_answer, found, model, asked, spec, over)


async def _start(caller: Caller, spec: Mapping[str, Any], model: Model) -> str:
    """The image to start from. One of another shape the web UI would stretch; the farm does not.

    Raises Invalid for that.
    """
    start = await given(caller, spec["image"], field="init_images")
    width, height = spec["width"] or model.side.default, spec["height"] or model.side.default
    if abs(start.width * height / (start.height * width) - 1) > SAME_SHAPE:
        words = f"the image is {start.width} × {start.height}: with 1 it is cut to the shape of {width} × {height}"
        raise Invalid([Fault("resize_mode", 0, words)])
    return f"sha256:{start.sha256}"


def _answer(
    found: Rendered, model: Model, asked: Txt2Img, sent: Mapping[str, Any], over: Masked | None
) -> Response:
    """The images that were made; fewer than asked for if it was interrupted. over: what they are laid over.

    Raises RenderFailed if there is none because all failed.
    """
    reasons = [f.reason for f in found.frames if f.reason]
    if not found.done and reasons:
        words = "; ".join(dict.fromkeys(map(str, reasons)))
        return answered({"error": "RenderFailed", "detail": words, "body": "", "errors": words}, 500)
    images = []
    if asked.send_images is not False:
        files = [bytes_of(f) for f in found.done]
        images = [base64.b64encode(f).decode() for f in (over.laid_over(files) if over and files else files)]
    parameters = asked.model_dump(mode="json", exclude_none=True)
    if isinstance(asked, Img2Img) and not asked.include_init_images:
        parameters |= {"init_images": None, "mask": None}
    info = json.dumps(info_of(found, model, asked, sent), default=str)
    return answered({"images": images, "parameters": parameters, "info": info})
