"""Reading what is long from the farm, as it comes: a job's manifest, across connections that break; and its archive."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from farm.answers import ManifestLine
from farm.errors import Away, FarmError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
SILENT_S = 60.0  # the store may have to be asked again and again for an image
AGAIN = (429, 502, 503, 504)

Refused = Callable[[httpx.Response], FarmError]


def manifest(
    http: httpx.Client,
    path: str,
    *,
    after: int | None,
    limit: int | None,
    signed: bool,
    patience_s: float,
    refused: Refused,
) -> Iterator[ManifestLine]:
    """A job's lines after an index; goes on after the last whole line where its connection broke.

    patience_s: how long the farm may not answer at all. Raises what refused makes of an answer that is none, Away.
    """
    last, left = after, limit
    give_up, wait_s = time.monotonic() + patience_s, FIRST_WAIT_S
    while left is None or left > 0:
        asked: dict[str, Any] = {"after": last, "limit": left, "signed": signed or None, "format": "ndjson"}
        try:
            with _opened(http, path, asked, refused) as answer:
                for line in answer.iter_lines():
                    found = ManifestLine.model_validate_json(line)
                    give_up, wait_s = time.monotonic() + patience_s, FIRST_WAIT_S
                    last, left = found.index, None if left is None else left - 1
                    yield found
                return
        except (httpx.TransportError, Away) as e:
            if time.monotonic() + wait_s > give_up:
                raise e if isinstance(e, Away) else Away(f"the farm does not answer: {e}") from e
        time.sleep(wait_s)
        wait_s = min(LONGEST_WAIT_S, wait_s * 2)


def pieces(http: httpx.Client, path: str, *, params: dict[str, Any], refused: Refused) -> Iterator[bytes]:
    """An answer's bytes as they come.

    Raises Away if it breaks off: what came is of no use then.
    """
    try:
        with _opened(http, path, params, refused) as answer:
            yield from answer.iter_raw()
    except httpx.TransportError as e:
        raise Away(f"the farm broke off in the middle: {e or type(e).__name__}") from e


@contextmanager
def _opened(
    http: httpx.Client, path: str, params: dict[str, Any], refused: Refused
) -> Iterator[httpx.Response]:
    """An answer that is read as it comes. Raises what refused makes of one that is none; Away for one that may pass."""
    said = {k: v for k, v in params.items() if v is not None}
    headers, timeout = {"Accept-Encoding": "identity"}, httpx.Timeout(SILENT_S, connect=5)
    with http.stream("GET", path, params=said, headers=headers, timeout=timeout) as answer:
        if not answer.is_success:
            answer.read()
            error = refused(answer)
            raise Away(str(error)) if answer.status_code in AGAIN else error
        yield answer
