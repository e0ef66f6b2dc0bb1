"""Images that leave, and files that are fetched by link."""

import logging
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.concurrency import run_in_threadpool

from farm import answers, files, ids, links, retention
from farm.api.auth import Submitter
from farm.api.dialects import openai_files
from farm.api.params import JobId, job_id
from farm.api.problems import documented
from farm.db import transaction
from farm.errors import Gone, NotFound
from farm.settings import settings
from farm.spec import CONTENT_TYPE, Format
from farm.storage import open_store, read_image_key

log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1", tags=["frames"])

ERRORS = {"$ref": "#/components/schemas/OpenAIErrors"}  # of what a file's id is answered
BYTES = {"schema": {"type": "string", "format": "binary"}}


def _either(said: dict[str, Any]) -> dict[str, Any]:
    """An error of a link, or of a file's id."""
    return {**said, "content": {**said["content"], "application/json": {"schema": ERRORS}}}


@router.delete("/jobs/{job}/images", responses=documented(403, 404, 409))
def delete_images(caller: Submitter, job: JobId) -> answers.DeletedImages:
    """Delete the images of a job that has ended: from now on they answer 410; their files go soon after.

    An image that a frame of another job shows as well stays for that one. What was charged stays charged.
    """
    with transaction() as db:
        deleted = retention.delete_images(db, caller.account_id, job_id(job))
        assert deleted.images_deleted_at
        return answers.DeletedImages(
            job=ids.public("job", deleted.id),
            images_deleted_at=deleted.images_deleted_at,
            looked_at=deleted.images_cleared,
            frames=deleted.frames,
        )


LINKED = {s: d for s, d in documented(404, 410).items() if s != 401}


@router.get(
    "/files/{token}",
    response_class=Response,
    responses={
        200: {
            "description": "the stored file; or facts of a file that was sent, in OpenAI's or Replicate's shape",
            "content": {
                **dict.fromkeys(CONTENT_TYPE.values(), BYTES),
                "application/json": {"schema": {"type": "object"}},
            },
        },
        429: {"description": "too many requests", "content": {"application/json": {"schema": ERRORS}}},
        401: {"description": "a file's id needs a key", "content": {"application/json": {"schema": ERRORS}}},
        **{s: _either(d) for s, d in LINKED.items()},
    },
    openapi_extra={"security": [{}, {"bearer": []}]},
)
async def fetch_file(
    token: Annotated[str, Path(description="as in a link of image-url; or a file's id")],
    request: Request,
) -> Response:
    """A file, by a link that was signed for it, which needs no key; or what is known of one that was sent."""
    if files.ID.fullmatch(token):
        return await openai_files.show_file(request, token)
    return await run_in_threadpool(_linked, token)


def _linked(token: str) -> Response:
    key = links.read(token)
    named = read_image_key(key)
    assert named
    try:
        data = open_store(settings().storage_url.get_secret_value()).get(key)
    except NotFound:
        raise Gone("the file was deleted") from None
    return Response(
        data,
        media_type=CONTENT_TYPE[Format(named.format)],
        headers={
            "Cache-Control": "private, max-age=300",
            "X-Content-Type-Options": "nosniff",
            "Content-Disposition": f'inline; filename="{named.sha256[:16]}.{named.format}"',
        },
    )
