"""Images that leave, and files that are fetched by link."""

import logging
from typing import Annotated

from fastapi import APIRouter, Path, Response

from farm import answers, ids, retention
from farm.api import links
from farm.api.auth import Submitter
from farm.api.params import JobId, job_id
from farm.api.problems import documented
from farm.db import transaction
from farm.errors import Gone, NotFound
from farm.settings import settings
from farm.spec import CONTENT_TYPE, Format
from farm.storage import open_store, read_image_key

log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1", tags=["frames"])

BYTES = {"schema": {"type": "string", "format": "binary"}}


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


@router.get(
    "/files/{token}",
    response_class=Response,
    responses={
        200: {"description": "the stored file", "content": dict.fromkeys(CONTENT_TYPE.values(), BYTES)},
        **{s: d for s, d in documented(404, 410).items() if s != 401},
    },
    openapi_extra={"security": []},
)
def fetch_file(
    token: Annotated[str, Path(max_length=400, description="as in a link of image-url")],
) -> Response:
    """A file, by a link that was signed for it; it needs no key."""
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
