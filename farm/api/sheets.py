"""A job's contact sheet."""

from fastapi import APIRouter, Response

from farm import ids, jobs, pricing, sheet
from farm.api import shown
from farm.api.auth import Reader
from farm.api.params import JobId, job_id
from farm.api.problems import documented
from farm.db import transaction
from farm.jobs import JobStatus
from farm.settings import settings
from farm.storage import open_store

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

PNG = {"image/png": {"schema": {"type": "string", "format": "binary"}}}


@router.get(
    "/{job}/sheet",
    response_class=Response,
    responses={200: {"description": "a PNG", "content": PNG}, **documented(404)},
)
def show_sheet(caller: Reader, job: JobId) -> Response:
    """A job's contact sheet: its first 400 frames with their prompts."""
    with transaction() as db:
        view = jobs.find(db, caller.account_id, job_id(job))
        frames = jobs.frames_of(db, view.id, limit=sheet.MOST)
        images = shown.images_of(db, frames)
    tiles = [
        sheet.Tile(
            index=f.index,
            status=jobs.shown_status(f, view.status == JobStatus.CANCELLED),
            prompt=f.spec["prompt"],
            seed=f.seed,
            width=f.spec["width"],
            height=f.spec["height"],
            key=images[f.id].key if f.id in images else None,
        )
        for f in frames
    ]
    heading = sheet.Heading(
        job=ids.public("job", view.id),
        name=view.name,
        models=sorted({f.spec["model"] for f in frames}),
        priority=view.priority,
        status=view.status,
        frames=view.frames,
        done=view.done,
        failed=view.failed,
        cancelled=view.cancelled,
        cost=f"{pricing.shown(view.charged)} {view.currency}",
    )
    png = sheet.draw(heading, tiles, open_store(settings().storage_url.get_secret_value()))
    return Response(png, media_type="image/png", headers={"Cache-Control": "private, no-cache"})
