"""What an image was made of, and making it once more."""

import hashlib
from uuid import UUID

from fastapi import APIRouter, Request, Response

from farm import answers, ids, jobs, provenance, tokens
from farm.accounts import Caller
from farm.api import shown
from farm.api.auth import Reader, Submitting
from farm.api.params import FrameId, IdempotencyHeader, Index, JobId, checked_key, job_id
from farm.api.problems import documented
from farm.api.shown import Around
from farm.db import transaction
from farm.ids import public
from farm.provenance import Comparison, Difference, Origin
from farm.settings import settings
from farm.spec import Spec
from farm.storage import open_store

router = APIRouter(prefix="/v1", tags=["frames"])

VERSIONS = ("farm", "diffusers", "torch")


@router.get("/frames/{frame}/provenance", responses=documented(404))
def show_provenance(caller: Reader, frame: FrameId) -> answers.Provenance:
    """What made a frame's image, by the frame's id; of a rerender also whether it is the same."""
    return _found(caller, ids.parse("frm", frame))


@router.get("/jobs/{job}/frames/{index}/provenance", responses=documented(404, 422))
def show_provenance_of_job(caller: Reader, job: JobId, index: Index) -> answers.Provenance:
    """What made a frame's image, by job and index."""
    return _found(caller, ids.frame_id(job_id(job), index))


@router.post(
    "/frames/{frame}/rerender",
    status_code=202,
    responses={
        202: {"headers": {"Location": {"description": "the job", "schema": {"type": "string"}}}},
        **documented(402, 403, 404, 409, 422),
    },
)
def rerender_frame(
    caller: Submitting,
    frame: FrameId,
    request: Request,
    response: Response,
    idempotency_key: IdempotencyHeader = None,
) -> answers.Job:
    """Render a frame's spec and seed once more, as a job of one frame. Its provenance says whether it is the same."""
    key = checked_key(idempotency_key, field="Idempotency-Key")
    found = ids.parse("frm", frame)
    with transaction() as db:
        made, is_new = provenance.rerender(
            db,
            caller,
            found,
            idempotency_key=key,
            body_sha256=hashlib.sha256(b"rerender" + found.bytes).digest(),
        )
        models = jobs.models_of(db, made) if is_new else []
        answer = shown.job(db, jobs.find(db, caller.account_id, made), Around.of(request))
    tokens.wake(models)
    response.headers["Location"] = answer.urls.self
    if not is_new:
        response.headers["Idempotent-Replayed"] = "true"
    return answer


def _found(caller: Caller, frame_id: UUID) -> answers.Provenance:
    with transaction() as db:
        origin = provenance.find(db, caller.account_id, frame_id)
        compared = provenance.compare(db, origin)
    store = open_store(settings().storage_url.get_secret_value())
    apart = None if compared is None else provenance.measure(store, compared)
    return _shown(origin, compared, apart)


def _shown(origin: Origin, compared: Comparison | None, apart: Difference | None) -> answers.Provenance:
    frame, image, engine = origin.frame, origin.image, origin.engine or {}
    return answers.Provenance(
        frame=public("frm", frame.id),
        job=public("job", frame.job_id),
        index=frame.index,
        status=frame.status,
        model=frame.spec["model"],
        revision=engine.get("revision"),
        dtype=engine.get("dtype"),
        loras=[use["sha256"] for use in frame.spec.get("loras", []) if use.get("sha256")],
        inputs=list(Spec.from_json(frame.spec).inputs),
        spec=frame.spec,
        seed=frame.seed,
        seed_given=frame.seeded,
        fingerprint=frame.fingerprint.hex(),
        reused=frame.reused,
        versions={n: str(engine[n]) for n in VERSIONS if n in engine},
        sha256=image and image.sha256.hex(),
        pixel_sha256=image.pixel_sha256.hex() if image is not None and image.pixel_sha256 else None,
        rerender=compared
        and answers.Rerender(
            of=public("frm", compared.of.frame.id),
            same_pixels=compared.same_pixels,
            same_file=compared.same_file,
            largest_difference=apart and apart.largest,
            pixels_differing=apart and apart.pixels,
            versions=[
                answers.VersionChange(name=name, before=before, now=now)
                for name, (before, now) in compared.versions.items()
            ],
        ),
    )
