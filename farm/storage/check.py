"""The self-test: what a store can do, found out by doing it. Run when a process starts, and by `farm storage check`."""

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache

from farm.errors import Away, FarmError
from farm.storage import Finding, Store, open_store

log = logging.getLogger(__name__)

SIZE = 70_000  # more than one chunk of 64 KiB: that is where some stores put a trailer


def examine(store: Store) -> Iterator[Finding]:
    """Try one thing after the other, and say how each went. What was written is removed.

    Raises Misconfigured for a store that cannot hold images, StorageAway for one that does not answer; what was
    found before is told first.
    """
    started = time.monotonic()
    store.check()
    yield Finding("write, list, read back, delete", "ok", "the bytes came back as they were", _ms(started))
    key, data = f"check/{secrets.token_hex(16)}", secrets.token_bytes(SIZE)
    store.put(key, data, content_type="application/octet-stream")
    try:
        yield from store.extras(key, data)
    finally:
        with suppress(FarmError):
            store.delete(key)
    started = time.monotonic()
    gone = all(stored.key != key for stored in store.list(key))
    yield Finding("delete", "ok" if gone else "no", "" if gone else "it is still listed", _ms(started))


def _ms(started: float) -> int:
    return round((time.monotonic() - started) * 1000)


def at_start(url: str, *, tell: Callable[[str], None] = lambda _: None) -> None:
    """Examine the store once a process, and log what it can do. A store that is away is no reason not to start.

    tell: what is known: up, away or wrong. Raises Misconfigured for one that cannot hold images.
    """
    try:
        _examined(url)
    except Away as e:
        log.warning("the image store could not be examined: %s", e)
        tell("away")
    except FarmError as e:
        log.critical("the image store cannot be used: %s", e)
        tell("wrong")
        raise
    else:
        tell("up")


@cache
def _examined(url: str) -> None:
    found = list(examine(open_store(url)))
    log.info("the image store: %s", "; ".join(_line(f) for f in found))


def _line(finding: Finding) -> str:
    return f"{finding.what}: {finding.state}" + (f" ({finding.detail})" if finding.detail else "")
