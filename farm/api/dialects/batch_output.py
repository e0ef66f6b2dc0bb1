"""The files of a batch, written while they are fetched: links in them are good from then on."""

import base64
import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from farm import batches, files, links
from farm.api.dialects.images import error_body
from farm.api.dialects.served import LINK_S
from farm.batches import BatchView, Made
from farm.errors import FarmError
from farm.settings import settings
from farm.storage import open_store
from farm.tables import Frame, Image


def output_file(view: BatchView) -> str | None:
    """The id of the file with what was made; None while there is none."""
    return _file(view, batches.OUTPUT) if view.over and view.completed else None


def error_file(view: BatchView) -> str | None:
    """The id of the file with what was not; None while there is none."""
    has_errors = view.over and view.batch.lines > view.completed and view.batch.faults is None
    return _file(view, batches.ERRORS) if has_errors else None


def _file(view: BatchView, which: int) -> str:
    return files.public(batches.file_of(view.batch.id, which))


def lines(account_id: UUID, view: BatchView, *, which: int, url: str) -> Iterator[bytes]:
    """One of a batch's files. url: how clients reach the farm."""
    for made in batches.made(account_id, view.batch.id):
        images = made.images
        if bool(images) != (which == batches.OUTPUT):
            continue
        try:
            body, status = (_body(made, url), 200) if images else _error(made)
        except FarmError as e:  # the file cannot be taken back by now
            body, status = error_body(e.http_status, e.detail or e.title), e.http_status
        name = f"{batches.public(view.batch.id)}_{made.line.line}"
        answer = {"status_code": status, "request_id": name, "body": body}
        said = {"id": name, "custom_id": made.line.custom_id, "response": answer, "error": None}
        yield json.dumps(said).encode() + b"\n"


def _body(made: Made, url: str) -> dict[str, Any]:
    data = [
        _image(frame, image, url, as_base64=made.line.format == "b64_json") for frame, image in made.images
    ]
    frame, image = made.images[0]
    return {
        "created": int(image.created_at.timestamp()),
        "data": data,
        "images": data,
        "seed": frame.seed,
        "size": f"{image.width}x{image.height}",
        "output_format": image.format,
    }


def _image(frame: Frame, image: Image, url: str, *, as_base64: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"seed": frame.seed}
    if "original_prompt" in frame.spec:
        shown["revised_prompt"] = frame.spec["prompt"]
    if as_base64:
        data = open_store(settings().storage_url.get_secret_value()).get(image.key)
        return {**shown, "b64_json": base64.b64encode(data).decode()}
    return {**shown, "url": links.url(url, image.key, within_s=max(LINK_S, settings().url_s))}


def _error(made: Made) -> tuple[dict[str, Any], int]:
    """Why nothing came of a line."""
    if made.line.error is not None:
        return dict(made.line.error["body"]), int(made.line.error["status_code"])
    if any(frame.image_id is not None for frame, _ in made.frames):
        return error_body(404, "the images were deleted"), 404
    reasons = dict.fromkeys(frame.reason or "it was cancelled" for frame, _ in made.frames)
    return error_body(500, f"no image came of it: {'; '.join(reasons)[:500]}"), 500
