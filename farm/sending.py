"""Sending a file of lines to the farm, bit by bit: what was cut goes on from where the farm is."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from farm.answers import Bulk
from farm.errors import Away, Conflict, Fault, Invalid, TooMany

if TYPE_CHECKING:
    from farm.client import Farm

PART = 4 << 20  # bytes of a request
PATIENCE_S = 300.0  # without any progress
LONGEST_WAIT_S = 10.0
FORMATS = {".csv": "csv", ".ndjson": "ndjson", ".jsonl": "ndjson"}
CONTENT_TYPE = {"csv": "text/csv", "ndjson": "application/x-ndjson"}


def format_of(path: Path) -> str:
    """By the file's name. Raises Invalid if that says neither."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        allowed = f"allowed are files called {', '.join(FORMATS)}"
        raise Invalid([Fault("file", path.name, allowed)]) from None


def send(
    farm: "Farm", path: Path, upload: Bulk, *, tell: Callable[[Bulk], object], patience_s: float = PATIENCE_S
) -> Bulk:
    """Send what the upload lacks of this file and make it a job. tell: called with the upload after each part.

    Goes on by itself after a cut connection, a farm that was away, or somebody else who sent the same.
    Raises Invalid with the first faults if the file is refused, Away if nothing moved for so long.
    """
    size = path.stat().st_size
    wait_s, moved = 0.2, time.monotonic()
    with path.open("rb") as file:
        while upload.status == "open":
            before = upload.received
            file.seek(before)
            part = file.read(PART)
            try:
                upload = farm.append_bulk(
                    upload.id, part, offset=before, content_type=CONTENT_TYPE[upload.format],
                    finish=before + len(part) >= size,
                )  # fmt: skip
            except (Away, TooMany, Conflict) as e:
                upload, wait_s = _again(farm, upload, e, wait_s, until=moved + patience_s)
            if upload.received > before:
                wait_s, moved = 0.2, time.monotonic()
            tell(upload)
    return upload


def _again(
    farm: "Farm", upload: Bulk, error: Exception, wait_s: float, *, until: float
) -> tuple[Bulk, float]:
    """Where the upload is after something went wrong, and how long to wait the next time."""
    if time.monotonic() > until:
        raise error
    if not (isinstance(error, Conflict) and "offset" in error.facts):
        time.sleep(max(wait_s, error.retry_after_s if isinstance(error, TooMany) else 0))
    try:
        return farm.bulk(upload.id), min(LONGEST_WAIT_S, 2 * wait_s)
    except Away:
        return upload, min(LONGEST_WAIT_S, 2 * wait_s)
