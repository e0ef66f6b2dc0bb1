"""What comes out of a job: its manifest, and its images in one archive."""

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse

from farm import answers, ids, jobs, links, outputs
from farm.api.auth import Reader
from farm.api.links import base
from farm.api.params import JobId, job_id
from farm.api.problems import documented
from farm.archive import ArchiveFormat
from farm.db import transaction
from farm.outputs import COLUMNS, Output
from farm.settings import settings
from farm.storage import Store, open_store

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

BYTES = {"schema": {"type": "string", "format": "binary"}}
LINES = {
    "application/x-ndjson": {"schema": {"$ref": "#/components/schemas/ManifestLine"}},
    "text/csv": {"schema": {"type": "string"}},
}
ARCHIVES = {"application/zip": BYTES, "application/x-tar": BYTES}
MEDIA_TYPE = {ArchiveFormat.ZIP: "application/zip", ArchiveFormat.TAR: "application/x-tar"}

After = Annotated[
    int | None,
    Query(ge=0, le=ids.MAX_FRAMES - 1, description="only frames after this index: to go on from there"),
]


class ManifestFormat(StrEnum):
    NDJSON = "ndjson"
    CSV = "csv"


@router.get(
    "/{job}/manifest",
    response_class=StreamingResponse,
    responses={
        200: {"description": "a line for each frame, in order", "content": LINES},
        **documented(404, 422),
    },
)
def show_manifest(
    caller: Reader,
    job: JobId,
    request: Request,
    *,
    after: After = None,
    limit: Annotated[int | None, Query(ge=1, le=ids.MAX_FRAMES, description="frames at most")] = None,
    form: Annotated[
        ManifestFormat | None, Query(alias="format", description="ndjson, or csv; else as Accept says")
    ] = None,
    signed: Annotated[
        bool, Query(description="URLs that work without a key for a while, in place of those that need one")
    ] = False,
    accept: Annotated[str, Header()] = "",
) -> StreamingResponse:
    """Every frame of a job: what became of it, its image's URL and hash, its seed and what it cost.

    It is read while it is sent: a frame that ends meanwhile may be shown as open. Go on after the last whole line.
    """
    found, line = _lines(caller.account_id, job, request, signed=signed)
    as_csv = form is ManifestFormat.CSV or (form is None and "text/csv" in accept.lower())
    pages = outputs.pages(found, after=-1 if after is None else after, limit=limit)
    return StreamingResponse(
        _csv(pages, line, head=after is None) if as_csv else _ndjson(pages, line),
        media_type="text/csv; charset=utf-8" if as_csv else "application/x-ndjson",
        headers={"Cache-Control": "private, no-store"},
    )


@router.get(
    "/{job}/archive",
    response_class=StreamingResponse,
    responses={
        200: {"description": "the images there are, and manifest.csv", "content": ARCHIVES},
        **documented(404, 422),
    },
)
def fetch_archive(
    caller: Reader,
    job: JobId,
    request: Request,
    *,
    after: After = None,
    form: Annotated[ArchiveFormat, Query(alias="format", description="zip or tar")] = ArchiveFormat.ZIP,
) -> StreamingResponse:
    """A job's images in one archive, each called by its custom_id or its index. manifest.csv says which is which."""
    found, line = _lines(caller.account_id, job, request, signed=False)

    def described(output: Output, problem: str | None) -> Iterator[Any]:
        shown = line(output)
        if problem is not None:
            shown = shown.model_copy(update={"file": None, "reason": problem})
        return _row(shown)

    return StreamingResponse(
        outputs.archived(
            found, form, store=_store(), described=described, after=-1 if after is None else after
        ),
        media_type=MEDIA_TYPE[form],
        headers={
            "Content-Disposition": f'attachment; filename="{ids.public("job", found)}.{form.value}"',
            "Cache-Control": "private, no-store",
        },
    )


def _store() -> Store:
    return open_store(settings().storage_url.get_secret_value())


Line = Callable[[Output], answers.ManifestLine]


def _lines(account_id: UUID, job: str, request: Request, *, signed: bool) -> tuple[UUID, Line]:
    """The account's job, and how a frame of it is shown."""
    with transaction() as db:
        view = jobs.find(db, account_id, job_id(job))
    farm, name = base(request), ids.public("job", view.id)

    def url(output: Output) -> str | None:
        if output.key is None:
            return None
        if not signed:
            return f"{farm}/v1/jobs/{name}/frames/{output.index}/image"
        direct = _store().url(
            output.key,
            expires_s=settings().url_s,
            content_type=output.content_type or "",
            filename=output.file or "",
        )
        return direct or links.url(farm, output.key, within_s=settings().url_s)

    def line(output: Output) -> answers.ManifestLine:
        return answers.ManifestLine(
            index=output.index,
            custom_id=output.custom_id,
            frame=ids.public("frm", output.id),
            status=output.status,
            file=output.file,
            url=url(output),
            sha256=output.sha256,
            bytes=output.bytes,
            width=output.width,
            height=output.height,
            content_type=output.content_type,
            seed=output.seed,
            model=output.model,
            cost=output.cost,
            currency=view.currency,
            reason=output.reason,
        )

    return view.id, line


def _ndjson(pages: Iterator[list[Output]], line: Line) -> Iterator[str]:
    for page in pages:
        yield "".join(f"{line(output).model_dump_json()}\n" for output in page)


def _csv(pages: Iterator[list[Output]], line: Line, *, head: bool) -> Iterator[str]:
    if head:
        yield outputs.as_csv([COLUMNS])
    for page in pages:
        yield outputs.as_csv(_row(line(output)) for output in page)


def _row(line: answers.ManifestLine) -> Iterator[Any]:
    return (getattr(line, name) for name in COLUMNS)
