"""What every dialect does the same way: submit, wait, hand out the images, and tell what went wrong.

A dialect reads its own body, says what it asks for as a Submission, and writes its own answer and errors.
"""

import json
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any
from uuid import UUID

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sqlalchemy.orm import Session
from starlette.exceptions import HTTPException

from farm import ids, jobs, links, submissions, tokens
from farm.accounts import Caller
from farm.api import enhancer, problems
from farm.api.auth import count_submission
from farm.api.inputs import taken
from farm.api.params import checked_key
from farm.api.shown import Around, content_type, images_of
from farm.api.waiting import reachable
from farm.catalog import Catalog, Model, catalog
from farm.db import transaction
from farm.errors import FarmError, Fault, Gone, Invalid, NotFound, Refused
from farm.faults import faults_of
from farm.queue import FrameStatus
from farm.settings import settings
from farm.storage import open_store
from farm.submissions import Submission
from farm.tables import Frame, Image

log = logging.getLogger(__name__)

LINK_S = 3600  # what the vendors promise of theirs
# how names begin of models that only their vendor has: the default model stands in, unless an entry has the alias
STAND_INS = ("gpt-image-", "chatgpt-image-", "dall-e-")


# ------------------------------------------------------------------------------------------------ models


class UnknownModel(NotFound):
    """The farm has no model of this name."""


def model_named(name: str | None, models: Catalog | None = None) -> Model:
    """The model of this name or alias; without one the farm's default.

    Raises UnknownModel naming those there are.
    """
    models = models or catalog()
    if name is None or name == "":
        return models.default
    found = models.named(name)
    if found is None and name.lower().startswith(STAND_INS):
        return models.default
    if found is None:
        raise UnknownModel(f"there is no model {name[:100]!r}; allowed are {', '.join(models)}")
    return found


# ------------------------------------------------------------------------------------------------ in


async def submitted(
    request: Request,
    caller: Caller,
    submission: Submission,
    *,
    body: bytes,
    key: str | None = None,
    names: Mapping[str, str] | None = None,
    also: Callable[[Session, UUID], None] | None = None,
) -> UUID:
    """Submit a job as POST /v1/jobs does, and return its id; once under an idempotency key. It counts as a submission.

    body: what a repeat under the key has to be equal to. names: what the dialect calls the spec's fields. also:
    what to store of a new job in its transaction.
    Raises what submissions.submit raises, its fields by the dialect's names.
    """
    checked_key(key, field="Idempotency-Key")
    count_submission(request)
    try:
        await reachable(submission)
        whole = await taken(caller, submission, idempotency_key=key)
        whole = await enhancer.helped(whole)
        digest = sha256(body).digest()
        return await run_in_threadpool(_submit, caller, whole, digest=digest, key=key, also=also)
    except Invalid as e:
        raise Invalid(as_called(e.faults, names or {})) from None


def _submit(
    caller: Caller,
    submission: Submission,
    *,
    digest: bytes,
    key: str | None,
    also: Callable[[Session, UUID], None] | None,
) -> UUID:
    with transaction() as db:
        made = submissions.accept(
            db, caller, submission, idempotency_key=key, body_sha256=digest, commit=also is None
        )
        if made.is_new and also is not None:
            also(db, made.id)
    if made.is_new:
        tokens.wake(made.models)
    return made.id


def as_called(faults: Iterable[Fault], names: Mapping[str, str]) -> list[Fault]:
    """Faults of `spec.width` by the name the dialect's caller wrote; what one field makes wrong is said once."""
    named = [_as_called(fault, names) for fault in faults]
    return list({(fault.field, fault.allowed): fault for fault in named}.values())


def _as_called(fault: Fault, names: Mapping[str, str]) -> Fault:
    head, _, rest = fault.field.partition(".")
    path = rest if head.startswith("spec") and rest else fault.field
    first = path.partition(".")[0].partition("[")[0]
    return replace(fault, field=names.get(path) or names.get(first) or path)


# ------------------------------------------------------------------------------------------------ out


@dataclass(frozen=True, slots=True)
class Drawn:
    """A frame as far as it is; image is there once it is done, and while it is kept."""

    id: UUID
    job_id: UUID
    index: int
    status: str
    seed: int
    reason: str | None
    spec: Mapping[str, Any]
    pack_id: int | None
    image: Image | None

    @property
    def content_type(self) -> str:
        assert self.image
        return content_type(self.image)

    @property
    def revised_prompt(self) -> str | None:
        """What was rendered, where style or prompt help made it another than was sent."""
        return self.spec["prompt"] if "original_prompt" in self.spec else None


@dataclass(frozen=True, slots=True)
class Rendered:
    """A job's frames in order. ended: nothing more will come; else the time ran out, and the job goes on."""

    job_id: UUID
    ended: bool
    status: str
    frames: list[Drawn]

    @property
    def name(self) -> str:
        return ids.public("job", self.job_id)

    @property
    def done(self) -> list[Drawn]:
        return [f for f in self.frames if f.image is not None]


async def rendered(request: Request, caller: Caller, job_id: UUID, *, timeout_s: float) -> Rendered:
    """Wait until a job has ended or the time is over, holding neither thread nor connection; then look at it."""
    await request.app.state.feed.ended(caller.account_id, job_id, timeout_s)
    return await run_in_threadpool(look, caller, job_id)


class StillRendering(Refused):
    """The images are not there yet; the job goes on."""

    http_status = 408


class NotRendered(Refused):
    """No image came of it; nothing was charged."""

    http_status = 500


async def images_of_job(request: Request, caller: Caller, job_id: UUID, *, timeout_s: float) -> Rendered:
    """Wait for a job's images, and hand out those there are once it has ended: one at least.

    Raises StillRendering with the job's id if the time runs out, NotRendered with the reason if there is none.
    """
    made = await rendered(request, caller, job_id, timeout_s=timeout_s)
    if not made.ended:
        raise StillRendering(
            f"the images are not there yet; they go on being made as {made.name}", job=made.name
        )
    if not made.done:
        reasons = dict.fromkeys(f.reason or f"it is {f.status}" for f in made.frames)
        raise NotRendered(f"no image came of {made.name}: {'; '.join(reasons)[:500]}", job=made.name)
    return made


def look(caller: Caller, job_id: UUID) -> Rendered:
    """A job's frames as they are now. Raises NotFound for another account's job."""
    with transaction() as db:
        view = jobs.find(db, caller.account_id, job_id)
        rows = jobs.frames_of(db, job_id, limit=view.frames)
        images = images_of(db, rows)
        is_cancelled = view.status == jobs.JobStatus.CANCELLED
        frames = [_drawn(row, images.get(row.id), is_cancelled=is_cancelled) for row in rows]
    has_ended = view.ended_at is not None or all(f.status in ENDED for f in frames)
    return Rendered(job_id, has_ended, view.status, frames)


ENDED = (FrameStatus.DONE, FrameStatus.FAILED, FrameStatus.CANCELLED, "rejected")


def _drawn(row: Frame, image: Image | None, *, is_cancelled: bool) -> Drawn:
    return Drawn(
        id=row.id,
        job_id=row.job_id,
        index=row.index,
        status=jobs.shown_status(row, is_cancelled),
        seed=row.seed,
        reason=row.reason,
        spec=row.spec,
        pack_id=row.pack_id,
        image=image if row.status == FrameStatus.DONE else None,
    )


async def content(frame: Drawn) -> bytes:
    """The image's file. Raises Gone if it was deleted meanwhile."""
    return await run_in_threadpool(bytes_of, frame)


def bytes_of(frame: Drawn) -> bytes:
    assert frame.image
    try:
        return open_store(settings().storage_url.get_secret_value()).get(frame.image.key)
    except NotFound:
        raise Gone("the stored file is gone", frame=ids.public("frm", frame.id)) from None


def link(request: Request, frame: Drawn, *, within_s: int = LINK_S) -> str:
    """A URL of the image that anybody may fetch for so long, with a key or without: never a redirect."""
    assert frame.image
    return links.url(Around.of(request).url, frame.image.key, within_s=max(within_s, settings().url_s))


# ------------------------------------------------------------------------------------------------ errors


@dataclass(frozen=True, slots=True)
class Told:
    """What went wrong, in words that may leave the farm; headers go along with whatever body is made of it."""

    status: int
    title: str
    detail: str
    field: str | None
    kind: type[Exception]
    request: str
    headers: Mapping[str, str]


def told(request: Request, error: Exception) -> Told:
    """The facts of an error for a dialect to shape, logged as the native API would."""
    if isinstance(error, RequestValidationError):
        error = Invalid(faults_of(error.errors()))
    if isinstance(error, HTTPException):
        detail = str(error.detail)
        headers = dict(error.headers or {})
        return Told(error.status_code, detail, detail, None, type(error), request.state.id, headers)
    if not isinstance(error, FarmError):
        log.error("request %s broke", request.state.id, exc_info=error)
        error = FarmError()
    answer = problems.of(error, request.state.id)
    body = json.loads(bytes(answer.body))
    kept = {k: v for k, v in answer.headers.items() if not k.startswith("content-")}
    field = error.faults[0].field if isinstance(error, Invalid) and error.faults else None
    return Told(answer.status_code, body["title"], body["detail"], field, type(error), request.state.id, kept)


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def translated(errors: Callable[[Request, Exception], Response]) -> type[APIRoute]:
    """A route whose every error leaves as `errors` writes it: a wrong body or key, and what broke, too."""

    class Translated(APIRoute):
        def get_route_handler(self) -> Handler:
            inner = super().get_route_handler()

            async def handler(request: Request) -> Response:
                try:
                    return await inner(request)
                except (FarmError, RequestValidationError, HTTPException) as e:
                    return errors(request, e)

            return handler

    return Translated
