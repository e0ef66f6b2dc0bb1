"""Stability's first REST API: `/v1/generation/{engine}/…`, `/v1/engines/list` and `/v1/user/balance`."""

import re
from decimal import Decimal
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field, ValidationError

from farm import budgets
from farm.accounts import Caller
from farm.answers import Answer
from farm.api import forms
from farm.api.auth import Reader, Submitter
from farm.api.bodies import Body, described, limited, read
from farm.api.dialects import artifacts, asking, served
from farm.api.dialects.answers import Responses, answered
from farm.api.dialects.artifacts import Artifact, Asked, files_of
from farm.api.dialects.served import UnknownModel, model_named, told, translated
from farm.api.inputs import AROUND, kept
from farm.api.params import IdempotencyHeader, checked_key
from farm.catalog import Model, catalog
from farm.db import transaction
from farm.errors import Fault, Invalid
from farm.faults import faults_in
from farm.features import Given
from farm.settings import settings
from farm.submissions import Submission

ENLARGED_BY = 2
UPSCALE_STRENGTH = 0.25  # of the pass that draws the detail an enlarged image lacks
UPSCALE_PROMPT = "a sharp, finely detailed picture"
# engines that only enlarge: the farm's default model stands in
UPSCALERS = ("esrgan-v1-x2plus", "stable-diffusion-x4-latent-upscaler")
UNLIMITED = 1_000_000.0  # credits of an account without a budget: their API knows no end of them
PROMPT_FIELD = re.compile(r"text_prompts\[(\d{1,2})\]\[(text|weight)\]")
NAMES_OF_STATUS = {
    400: "bad_request", 401: "unauthorized", 402: "insufficient_balance", 403: "permission_denied",
    404: "not_found", 408: "timeout", 409: "conflict", 410: "not_found", 413: "payload_too_large",
    429: "too_many_requests", 500: "internal_error", 503: "service_unavailable",
}  # fmt: skip


def errors(request: Request, error: Exception) -> Response:
    """Any error in Stability's words."""
    facts = told(request, error)
    status = 400 if facts.status == 422 else facts.status
    name = "invalid_engine" if isinstance(error, UnknownModel) else NAMES_OF_STATUS.get(status, "bad_request")
    body = {"id": facts.request, "name": name, "message": facts.detail}
    return answered(body, status, headers=facts.headers)


class StabilityError(Answer):
    id: str = Field(description="the request's, as in the farm's log")
    name: str = Field(examples=["bad_request"])
    message: str


class ArtifactsShown(Answer):
    artifacts: list[Artifact]


class Engine(Answer):
    """A model of the farm."""

    id: str
    name: str
    description: str
    type: str = "PICTURE"


class Balance(Answer):
    credits: float = Field(description="what the budgets leave, in the account's currency; 1000000: no limit")


class TextToImage(Asked):
    """The body of text-to-image."""

    # without what needs an image
    init_image_mode: None = None
    image_strength: None = None
    step_schedule_start: None = None
    step_schedule_end: None = None
    mask_source: None = None


class Enlargement(Asked):
    """The fields of a form that asks for an enlargement."""

    text_prompts: list[artifacts.TextPrompt] = Field([], max_length=20)

    NAMES: ClassVar[Any] = {**Asked.NAMES, "image": "image"}


SAID: dict[int, str] = {
    400: "a field is not allowed", 401: "no valid API key", 402: "a budget does not cover it",
    403: "this API key may not do that", 404: "there is no such engine",
    408: "the images are not there yet; the job goes on", 409: "it does not fit the state things are in",
    410: "an image was deleted meanwhile", 413: "the body is too large",
    429: "too many requests, or a full queue", 500: "no image came of it",
    503: "a service the farm stands on is away",
}  # fmt: skip
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


def documented(*statuses: int) -> Responses:
    """What may be answered beside what was asked for."""
    return {
        s: {"model": StabilityError, "description": SAID[s]} for s in sorted({401, 403, 429, 503, *statuses})
    }


IMAGES: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"model": ArtifactsShown, "content": {"image/png": BINARY}},
        **documented(400, 402, 404, 408, 409, 410, 413, 500),
    },
}
router = APIRouter(prefix="/v1", tags=["dialects"], route_class=translated(errors))
EngineId = Annotated[str, Path(max_length=127, examples=["starter"])]


@router.post(
    "/generation/{engine}/text-to-image",
    **IMAGES,
    openapi_extra=described(TextToImage, {"text_prompts": [{"text": "a red circle"}], "samples": 2}),
)
async def text_to_image(
    caller: Submitter,
    engine: EngineId,
    body: Body,
    request: Request,
    idempotency_key: IdempotencyHeader = None,
) -> Response:
    """Make images of weighted texts and wait for them: see docs/dialects.md."""
    model = model_named(engine)
    asked = await run_in_threadpool(read, TextToImage, body)
    wanted = artifacts.wanted(asked, model)
    return await _answer(request, caller, wanted, body=body, key=idempotency_key)


FILE = {"type": "string", "format": "binary"}


def _form(*files: str, required: tuple[str, ...]) -> dict[str, Any]:
    """A form's fields for OpenAPI."""
    texts = {"text_prompts[0][text]": {"type": "string"}, "text_prompts[0][weight]": {"type": "string"}}
    fields = {n: {"type": "string"} for n in Asked.model_fields if n not in ("text_prompts", "extras")}
    schema = {
        "type": "object",
        "properties": {**dict.fromkeys(files, FILE), **texts, **fields},
        "required": list(required),
    }
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@router.post(
    "/generation/{engine}/image-to-image",
    **IMAGES,
    openapi_extra=_form("init_image", required=("init_image", "text_prompts[0][text]")),
)
async def image_to_image(
    caller: Submitter, engine: EngineId, request: Request, idempotency_key: IdempotencyHeader = None
) -> Response:
    """Change an image by weighted texts."""
    return await _from_image(request, caller, engine, idempotency_key, masked=False)


@router.post(
    "/generation/{engine}/image-to-image/masking",
    **IMAGES,
    openapi_extra=_form(
        "init_image", "mask_image", required=("init_image", "mask_source", "text_prompts[0][text]")
    ),
)
async def image_to_image_masking(
    caller: Submitter, engine: EngineId, request: Request, idempotency_key: IdempotencyHeader = None
) -> Response:
    """Paint a part of an image anew."""
    return await _from_image(request, caller, engine, idempotency_key, masked=True)


async def _from_image(
    request: Request, caller: Caller, engine: str, key: str | None, *, masked: bool
) -> Response:
    model = model_named(engine)
    form = await _read(request, Asked, ("init_image", "mask_image") if masked else ("init_image",))
    asked, files = form.asked, form.files
    if "init_image" not in files:
        raise Invalid([Fault("init_image", None, "it is required")])
    if masked != (asked.mask_source is not None):
        allowed = "it is required" if masked else "masks are taken by …/image-to-image/masking"
        raise Invalid([Fault("mask_source", asked.mask_source, allowed)])
    images = await files_of(caller, files["init_image"], files.get("mask_image"), asked.mask_source)
    wanted = artifacts.wanted(asked, model, images)
    return await _answer(request, caller, wanted, body=form.same, key=key)


@router.post(
    "/generation/{engine}/image-to-image/upscale", **IMAGES, openapi_extra=_form("image", required=("image",))
)
async def upscale_image(
    caller: Submitter, engine: EngineId, request: Request, idempotency_key: IdempotencyHeader = None
) -> Response:
    """Enlarge an image, twice if neither width nor height is given: the model draws the detail it lacks."""
    model = catalog().default if engine in UPSCALERS else model_named(engine)
    form = await _read(request, Enlargement, ("image",))
    if "image" not in form.files:
        raise Invalid([Fault("image", None, "it is required")])
    start = await kept(caller, form.files["image"], "", field="image")
    wanted = _enlargement(form.asked, model, start)
    return await _answer(request, caller, wanted, body=form.same, key=idempotency_key)


def _enlargement(asked: Asked, model: Model, image: Given) -> Submission:
    width, height = _enlarged(asked, model, image)
    weighted, prompt, negative = False, UPSCALE_PROMPT, ""
    if asked.text_prompts:
        prompt, negative, weighted = artifacts.words(asked.text_prompts, model)
    spec = {
        "prompt": prompt,
        "negative_prompt": negative or None,
        "prompt_weights": weighted or None,
        "model": model.name,
        "width": width,
        "height": height,
        "image": f"sha256:{image.sha256}",
        "strength": UPSCALE_STRENGTH if asked.strength is None else asked.strength,
        "steps": asked.steps,
        "guidance": asked.cfg_scale,
        "seed": asked.seed or None,
    }
    return asking.submission(spec, names=asked.NAMES)


def _enlarged(asked: Asked, model: Model, image: Given) -> tuple[int, int]:
    """The size asked for, of the image's shape as far as the model's multiples let it."""
    if asked.width is not None and asked.height is not None:
        raise Invalid([Fault("height", asked.height, "send width or height: the other follows")])
    factor = float(ENLARGED_BY)
    if asked.width is not None:
        factor = asked.width / image.width
    elif asked.height is not None:
        factor = asked.height / image.height
    multiple = model.side.multiple
    wide, high = (round(side * factor / multiple) * multiple for side in (image.width, image.height))
    if factor < 1 or not (model.side.allows(wide) and model.side.allows(high)):
        field = "height" if asked.height is not None else "width"
        limits = f"{model.name} makes sides of {model.side.min} to {model.side.max}, larger than the image's"
        raise Invalid([Fault(field, f"{wide} × {high}", limits)])
    return wide, high


# ------------------------------------------------------------------------------------------------ around it


@router.get("/engines/list", response_model=list[Engine], responses=documented())
async def list_engines(caller: Reader) -> list[Engine]:
    """The farm's models."""
    return [Engine(id=m.name, name=m.title, description=m.licence) for m in catalog().values()]


@router.get("/user/balance", response_model=Balance, responses=documented())
def show_balance(caller: Reader) -> Balance:
    """What the account's and the key's budgets leave."""
    with transaction() as db:
        left = [room.left for room in budgets.rooms(db, caller, Decimal(0))]
    return Balance(credits=float(min(left)) if left else UNLIMITED)


class _Form:
    """A form's fields and files, and what a repeat of it has to be equal to."""

    def __init__(self, asked: Asked, files: dict[str, bytes], same: bytes) -> None:
        self.asked, self.files, self.same = asked, files, same


async def _read(request: Request, shape: type[Asked], files: tuple[str, ...]) -> _Form:
    """Raises Invalid naming each field that is not allowed."""
    body = await limited(request, 2 * settings().input_bytes + AROUND)
    return await run_in_threadpool(_parse, body, request.headers.get("content-type", ""), shape, files)


def _parse(body: bytes, content_type: str, shape: type[Asked], files: tuple[str, ...]) -> _Form:
    parts = forms.parts_of(body, content_type)
    found: dict[str, bytes] = {}
    fields: dict[str, Any] = {}
    prompts: dict[int, dict[str, str]] = {}
    for part in parts:
        if part.name in files:
            if part.name in found:
                raise Invalid([Fault(part.name, None, "allowed is one")])
            found[part.name] = part.data
        elif match := PROMPT_FIELD.fullmatch(part.name):
            prompts.setdefault(int(match[1]), {})[match[2]] = part.text
        else:
            fields[part.name] = part.text
    if prompts:
        fields["text_prompts"] = [prompts[n] for n in sorted(prompts)]
    try:
        asked = shape.model_validate(fields)
    except ValidationError as e:
        raise Invalid(faults_in(e, shape)) from None
    return _Form(asked, found, forms.same(parts))


async def _answer(
    request: Request, caller: Caller, wanted: Submission, *, body: bytes, key: str | None
) -> Response:
    key = checked_key(key, field="Idempotency-Key")
    is_file = artifacts.as_file(request.headers.get("accept", ""), wanted)
    job = await served.submitted(request, caller, wanted, body=body, key=key, names=Asked.NAMES)
    made = await served.images_of_job(request, caller, job, timeout_s=settings().sync_wait_s)
    if is_file:
        first = made.done[0]
        headers = {"Seed": str(first.seed), "Finish-Reason": "SUCCESS"}
        return Response(await served.content(first), media_type=first.content_type, headers=headers)
    shown = ArtifactsShown(artifacts=await artifacts.of_job(made))
    return answered(shown.model_dump(mode="json"))
