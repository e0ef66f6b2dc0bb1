"""Files: what was made, what was uploaded, and uploading."""

import re
from pathlib import PurePosixPath
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

from farm import ids, inputs, jobs, tickets
from farm.accounts import Caller
from farm.api.auth import Reader, Submitter
from farm.api.bodies import limited
from farm.api.dialects.answers import answered
from farm.api.dialects.browsers import OwnPages
from farm.api.dialects.comfyui.errors import ERRORS, errors
from farm.api.dialects.comfyui.history import FILE
from farm.api.dialects.served import translated
from farm.api.forms import parts_of
from farm.db import transaction
from farm.errors import Conflict, Fault, Gone, Invalid, NotFound
from farm.settings import settings
from farm.spec import CONTENT_TYPE, Format
from farm.storage import open_store
from farm.tickets import is_text

AROUND = 64 << 10  # bytes of a form beside its file
MANY_NAMES = 100  # of uploads that differ and are called the same

router = APIRouter(tags=["dialects"], route_class=translated(errors), dependencies=[OwnPages])


class ComfyUploaded(BaseModel):
    """What an upload is called."""

    name: str
    subfolder: str
    type: str


@router.get(
    "/view",
    response_class=Response,
    responses={
        200: {
            "description": "the file",
            "content": {
                kind: {"schema": {"type": "string", "format": "binary"}} for kind in CONTENT_TYPE.values()
            },
        },
        **ERRORS(404, 410, 422),
    },
)
def view_comfy_file(
    caller: Reader,
    filename: Annotated[str, Query(max_length=300)],
    subfolder: Annotated[str, Query(max_length=300)] = "",
    kind: Annotated[str, Query(alias="type", description="output, temp or input", max_length=20)] = "output",
) -> Response:
    """A file of the account's: made by a prompt, or uploaded."""
    if kind not in ("output", "temp", "input"):
        raise Invalid([Fault("type", kind, "allowed are output, temp, input")])
    if kind == "input":
        key, content_type = _upload(caller, f"{subfolder}/{filename}".strip("/"))
    else:
        key, content_type = _made(caller, filename)
    try:
        data = open_store(settings().storage_url.get_secret_value()).get(key)
    except NotFound:
        raise Gone("the stored file is gone") from None
    return Response(data, media_type=content_type, headers={"X-Content-Type-Options": "nosniff"})


def _upload(caller: Caller, name: str) -> tuple[str, str]:
    with transaction() as db:
        row = tickets.input_named(db, caller.account_id, name)
        return inputs.key_of(caller.account_id, row.id), CONTENT_TYPE[Format(row.format)]


def _made(caller: Caller, name: str) -> tuple[str, str]:
    """The name says which frame it is; it is looked for among the account's own."""
    found = FILE.fullmatch(name)
    if found is None:
        raise NotFound("there is no file of this name")
    with transaction() as db:
        frame = jobs.find_frame(db, caller.account_id, UUID(hex=found[1]))
        try:
            image = jobs.image_of(db, frame)
        except Conflict:
            raise NotFound("there is no file of this name yet") from None
        return image.key, CONTENT_TYPE[Format(image.format)]


@router.post(
    "/upload/image",
    response_class=Response,
    responses={200: {"model": ComfyUploaded}, **ERRORS(403, 409, 413, 422, 429)},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "image": {"type": "string", "format": "binary"},
                            "overwrite": {"type": "string", "enum": ["true", "false"]},
                            "subfolder": {"type": "string"},
                            "type": {"type": "string", "enum": ["input"]},
                        },
                        "required": ["image"],
                    }
                }
            },
        }
    },
)
async def upload_comfy_image(caller: Submitter, request: Request) -> Response:
    """Upload an image for LoadImage. Another one of that name is kept: the answer says what this one is called."""
    body = await limited(request, settings().input_bytes + AROUND)
    content_type = request.headers.get("content-type", "")
    return await run_in_threadpool(_uploaded, caller, body, content_type)


def _uploaded(caller: Caller, body: bytes, content_type: str) -> Response:
    parts = parts_of(body, content_type)
    image = next((p for p in parts if p.name == "image" and p.filename), None)
    texts = {p.name: p.text for p in parts if p.filename is None and p.name != "image"}
    if image is None or not image.filename:
        raise Invalid([Fault("image", None, "the form needs a part of this name, a file with its name")])
    for field, value in texts.items():
        if field not in ("overwrite", "subfolder", "type"):
            raise Invalid([Fault(field, value, "allowed are image, overwrite, subfolder, type")])
    if texts.get("type", "input") not in ("", "input"):
        raise Invalid([Fault("type", texts["type"], "allowed is input")])
    folder = _folder(texts.get("subfolder", ""))
    plain = PurePosixPath(image.filename.replace("\\", "/")).name
    if not 1 <= len(plain) <= 150 or not is_text(plain):
        raise Invalid([Fault("image", plain, "a file's name of 1 to 150 characters")])
    found = inputs.look_at(image.data, _type_of(image.content_type), field="image")
    made, _ = inputs.keep(caller.account_id, image.data, found)
    overwrite = texts.get("overwrite", "").lower() in ("true", "1")
    name = _call(caller, made, folder, plain, overwrite=overwrite)
    return answered({"name": name, "subfolder": folder, "type": "input"})


def _type_of(claimed: str) -> str:
    """Clients call images what their system calls them; what one is, is seen by looking."""
    return claimed if claimed in CONTENT_TYPE.values() else ""


def _folder(text: str) -> str:
    parts = [p for p in text.replace("\\", "/").split("/") if p]
    if len(text) > 80 or not all(re.fullmatch(r"[\w .-]+", p) and p.strip(". ") for p in parts):
        raise Invalid([Fault("subfolder", text, "allowed are folders of letters, digits, '.', '_' and '-'")])
    return "/".join(parts)


def _call(caller: Caller, made: UUID, folder: str, plain: str, *, overwrite: bool) -> str:
    """The name it has from now on: another number where an image that differs has it."""
    stem, dot, end = plain.rpartition(".")
    with transaction() as db:
        for number in range(MANY_NAMES):
            name = plain if number == 0 else f"{stem or end} ({number}){dot}{end if stem else ''}"
            whole = f"{folder}/{name}" if folder else name
            if tickets.name_input(db, caller.account_id, whole, made, overwrite=overwrite):
                return name
    raise Conflict(f"there are {MANY_NAMES} uploads of this name", name=plain, input=ids.public("inp", made))
