"""Frames of a job, and their images."""

import logging
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response

from farm import answers, ids, jobs, links
from farm.accounts import Caller
from farm.api import shown
from farm.api.auth import Reader
from farm.api.params import FrameId, Index, JobId, job_id
from farm.api.problems import documented
from farm.api.shown import Around
from farm.db import transaction
from farm.errors import Gone, NotFound
from farm.queue import FrameStatus
from farm.settings import settings
from farm.spec import CONTENT_TYPE
from farm.storage import open_store
from farm.tables import Image

log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1", tags=["frames"])


@router.get("/jobs/{job}/frames", responses=documented(404, 422))
def list_frames(
    caller: Reader,
    job: JobId,
    request: Request,
    *,
    first: Annotated[int, Query(ge=0, le=ids.MAX_FRAMES - 1, description="the index to start at")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    status: Annotated[FrameStatus | None, Query(description="only those of this status")] = None,
) -> answers.Frames:
    """A job's frames, in order."""
    with transaction() as db:
        view = jobs.find(db, caller.account_id, job_id(job))
        rows = jobs.frames_of(db, view.id, first=first, limit=limit, status=status)
        page = shown.frame_list(db, rows, Around.of(request))
    more = len(page) == limit and page[-1].index + 1 < view.frames
    if status is not None:  # an open frame of a job that was cancelled just now is not what was asked for
        page = [f for f in page if f.status == status]
    return answers.Frames(frames=page, next=rows[-1].index + 1 if more else None)


@router.get("/jobs/{job}/frames/{index}", responses=documented(404, 422))
def show_frame_of_job(caller: Reader, job: JobId, index: Index, request: Request) -> answers.Frame:
    """A frame, by job and index."""
    with transaction() as db:
        row = jobs.find_frame(db, caller.account_id, ids.frame_id(job_id(job), index))
        return shown.frame(db, row, Around.of(request))


@router.get("/frames/{frame}", responses=documented(404))
def show_frame(caller: Reader, frame: FrameId, request: Request) -> answers.Frame:
    """A frame, by its id."""
    with transaction() as db:
        row = jobs.find_frame(db, caller.account_id, ids.parse("frm", frame))
        return shown.frame(db, row, Around.of(request))


BYTES = {"schema": {"type": "string", "format": "binary"}}


@router.get(
    "/jobs/{job}/frames/{index}/image",
    response_class=Response,
    responses={
        200: {
            "description": "the stored file",
            "content": dict.fromkeys(CONTENT_TYPE.values(), BYTES),
            "headers": {"ETag": {"description": "its SHA-256", "schema": {"type": "string"}}},
        },
        304: {"description": "it is what If-None-Match names"},
        307: {"description": "where it is, with redirect"},
        **documented(404, 409, 410, 422),
    },
)
def show_image(
    caller: Reader,
    job: JobId,
    index: Index,
    request: Request,
    *,
    redirect: Annotated[
        bool, Query(description="answer with a link that works without a key for a while")
    ] = False,
    if_none_match: Annotated[str | None, Header(description="an ETag that is at hand")] = None,
) -> Response:
    """A frame's image as it is stored; 409 while there is none, 410 if there will be none or it was deleted."""
    image = _image(caller, job, index)
    if redirect:
        link = _link(image, job, index, request)
        return Response(status_code=307, headers={"Location": link.url, "Cache-Control": "no-store"})
    tag = f'"{image.sha256.hex()}"'
    headers = {
        "ETag": tag,
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
    }
    if if_none_match is not None and _names(if_none_match, tag):
        return Response(status_code=304, headers=headers)
    try:
        data = open_store(settings().storage_url.get_secret_value()).get(image.key)
    except NotFound:
        log.error("the store has no %s, though its row is there", image.key)
        raise Gone("the stored file is gone", job=job, index=index) from None
    headers["Content-Disposition"] = f'inline; filename="{job}-{index}.{image.format}"'
    return Response(data, media_type=shown.content_type(image), headers=headers)


@router.get(
    "/jobs/{job}/frames/{index}/preview",
    response_class=Response,
    responses={
        200: {"description": "a small JPEG", "content": {"image/jpeg": BYTES}},
        **documented(404, 422),
    },
)
def show_preview(caller: Reader, job: JobId, index: Index, request: Request) -> Response:
    """What a frame looks like while it is rendered; 404 while there is nothing to see.

    Workers make previews once somebody asks for them, one a second: ask again.
    """
    with transaction() as db:
        row = jobs.find_frame(db, caller.account_id, ids.frame_id(job_id(job), index))
    picture = request.app.state.progress.preview(row.job_id, row.index, row.pack_id) if row.pack_id else None
    if picture is None:
        raise NotFound("there is no preview of this frame now", job=job, index=index)
    return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "no-store"})


@router.get("/jobs/{job}/frames/{index}/image-url", responses=documented(404, 409, 410, 422))
def show_image_url(
    caller: Reader, job: JobId, index: Index, request: Request, response: Response
) -> answers.ImageUrl:
    """A link to a frame's image that works without a key until it expires: hand it to a browser or a service."""
    image = _image(caller, job, index)
    response.headers["Cache-Control"] = "no-store"
    return _link(image, job, index, request)


def _link(image: Image, job: str, index: int, request: Request) -> answers.ImageUrl:
    store = open_store(settings().storage_url.get_secret_value())
    expires_at = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=settings().url_s)
    url = store.url(
        image.key,
        expires_s=settings().url_s,
        content_type=shown.content_type(image),
        filename=f"{job}-{index}.{image.format}",
    )
    if url is None:
        url = f"{Around.of(request).url}/v1/files/{links.sign(image.key, expires_at)}"
    return answers.ImageUrl(url=url, expires_at=expires_at)


def _image(caller: Caller, job: str, index: int) -> Image:
    """Raises NotFound, Conflict or Gone. The connection goes back before the store is asked."""
    with transaction() as db:
        row = jobs.find_frame(db, caller.account_id, ids.frame_id(job_id(job), index))
        if shown.cancelled_among(db, [row]):
            raise Gone("this frame ended as cancelled", frame=ids.public("frm", row.id))
        return jobs.image_of(db, row)


def _names(header: str, tag: str) -> bool:
    return any(part.strip().removeprefix("W/") in (tag, "*") for part in header.split(","))
