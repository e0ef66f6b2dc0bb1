"""Where images live: one Store, in a local folder or in a bucket that speaks S3.

Keys are made of A-Z a-z 0-9 . _ - and /, and an image's key holds its hash: writing it again writes the
same bytes, so no store needs conditional writes, and a read can tell that it got what was stored.
"""

import hashlib
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Protocol
from urllib.parse import urlsplit
from uuid import UUID

from farm.errors import Away, Damaged, FarmError, Fault, Invalid, Misconfigured

SETTING = "FARM_STORAGE_URL"
ALLOWED = "file:///folder or s3://bucket/prefix?endpoint=https://…&region=…&sse=AES256|aws:kms&kms_key=…&storage_class=…"
LEFTOVER_AGE = timedelta(hours=1)  # what a dead process left behind goes after this; no upload takes longer

# no leading dot: that rules out .. and leaves the stores names of their own
_PART = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}"
_KEY = re.compile(rf"{_PART}(?:/{_PART})*")
_IMAGE_KEY = re.compile(r"v1/([0-9a-f]{32})/([0-9a-f]{64})\.([a-z0-9]{1,8})")
_MAX_KEY = 512  # S3 takes 1024 bytes with the prefix


@dataclass(frozen=True)
class Stored:
    """One object as a listing shows it; modified is UTC, by the store's clock."""

    key: str
    size_bytes: int
    modified: datetime


@dataclass(frozen=True)
class Finding:
    """One thing that was tried of a store: what, how it went, and what that means."""

    what: str
    state: str  # ok, no, unknown, unneeded; failed ends an examination
    detail: str = ""
    took_ms: int = 0


@dataclass(frozen=True)
class ImageKey:
    """What an image's key says."""

    account_id: UUID
    sha256: str
    format: str


class Store(Protocol):
    """What the farm asks of a place for images. Safe to share between threads, and across a fork.

    Every method raises StorageAway when the store does not answer in time, and Misconfigured when no
    retry would help.
    """

    def put(self, key: str, data: bytes, *, content_type: str) -> None:
        """Store the bytes; they are durable when this returns."""

    def get(self, key: str) -> bytes:
        """Return the bytes, all of them.

        Raises NotFound if there are none, StorageAway if an image differs from the hash in its key.
        """

    def delete(self, key: str) -> None:
        """Remove the object, if there is one, with every version that the store keeps of it."""

    def list(self, prefix: str = "") -> Iterator[Stored]:
        """Every object whose key starts with the prefix, in no promised order."""

    def url(self, key: str, *, expires_s: int, content_type: str, filename: str) -> str | None:
        """A URL under which anybody may GET the object until then; None where the API has to sign one itself."""

    def clear_leftovers(self) -> int:
        """Remove what processes that died while writing left behind an hour ago. Returns how much."""

    def check(self) -> None:
        """Prove at start-up that the store writes, lists, reads back and deletes."""

    def extras(self, key: str, data: bytes) -> Iterator[Finding]:
        """Try what this kind of store can do beside that, with an object that is there and holds the data.

        Nothing of it is needed to keep images, so that nothing raises but Misconfigured for changed bytes.
        """


def image_key(account_id: UUID, sha256: bytes | str, ext: str) -> str:
    """`v1/{account}/{sha256}.{ext}`; the hash as 32 bytes or 64 hex digits."""
    digest = sha256 if isinstance(sha256, str) else sha256.hex()
    key = f"v1/{account_id.hex}/{digest}.{ext}"
    if not _IMAGE_KEY.fullmatch(key):
        raise Invalid([Fault("key", key, "a SHA-256 in lower-case hex, and an extension like png")])
    return key


def read_image_key(key: str) -> ImageKey | None:
    """What an image's key says; None if it is not one."""
    found = _IMAGE_KEY.fullmatch(key)
    return ImageKey(UUID(hex=found[1]), found[2], found[3]) if found else None


def is_key(key: str) -> bool:
    return len(key) <= _MAX_KEY and _KEY.fullmatch(key) is not None


def check_key(key: str) -> str:
    """Return the key.

    Raises Invalid if it is not one: a key never leaves its store's folder or prefix.
    """
    if not is_key(key):
        raise Invalid([Fault("key", key, "parts of A-Z a-z 0-9 . _ - joined by /, none starting with a dot")])
    return key


def check_prefix(prefix: str) -> str:
    """Return the prefix: '', or what some key may start with. Raises Invalid otherwise."""
    if prefix and not is_key(prefix.removesuffix("/")):
        raise Invalid([Fault("prefix", prefix, "the start of a key")])
    return prefix


def check_hash(key: str, data: bytes) -> bytes:
    """Return the data. Raises Damaged if the key is an image's and holds another hash."""
    image = _IMAGE_KEY.fullmatch(key)
    if image and hashlib.sha256(data).hexdigest() != image[2]:  # 1 ms for 1.5 MB
        raise Damaged(key=key)
    return data


def prove(store: Store) -> None:
    """Write, list, read back, compare and delete one small object; clear those of checks that died."""
    before = datetime.now(UTC) - LEFTOVER_AGE
    key, data = f"check/{secrets.token_hex(16)}", secrets.token_bytes(1000)
    store.put(key, data, content_type="application/octet-stream")
    try:
        listed = {stored.key: stored for stored in store.list("check/")}
        _compare(key, data, store.get(key), listed.get(key))
    except FarmError:
        with suppress(FarmError):  # the first error says more
            store.delete(key)
        raise
    store.delete(key)
    for stored in listed.values():
        if stored.modified < before:
            store.delete(stored.key)


def _compare(key: str, data: bytes, got: bytes, listed: Stored | None) -> None:
    check_same(data, got)
    if listed is None or listed.size_bytes != len(data):
        raise Misconfigured("The store does not list what it was given.", setting=SETTING, key=key)


def check_same(data: bytes, got: bytes) -> None:
    """Raises Misconfigured if the store gave back other bytes than it was given."""
    if got != data:  # some stores write the checksum trailer of newer SDKs into the object
        raise Misconfigured(
            "The store gave back other bytes than it was given; it cannot hold images.",
            setting=SETTING,
            wrote_bytes=len(data),
            read_bytes=len(got),
        )


def delete_some(store: Store, keys: Sequence[str]) -> tuple[int, Away | None]:
    """Delete files in this order until the store is away. Returns how many went, and why not more."""
    for gone, key in enumerate(keys):
        try:
            store.delete(key)
        except Away as e:
            return gone, e
    return len(keys), None


@cache
def open_store(url: str) -> Store:
    """Open the store behind FARM_STORAGE_URL: one a process and URL, nothing is contacted yet.

    Credentials come from the usual AWS_* environment.
    Raises Misconfigured if the URL is not one; its text is never repeated, it may hold a secret.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise Misconfigured(f"{SETTING} is not a URL.", allowed=ALLOWED) from None
    if "@" in parts.netloc:
        raise Misconfigured(
            f"{SETTING} holds credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead.",
            allowed=ALLOWED,
        )
    match parts.scheme:
        case "file":
            from farm.storage.local import LocalStore

            return LocalStore.from_url(parts)
        case "s3":
            from farm.storage.s3 import S3Store

            return S3Store.from_url(parts)
    raise Misconfigured(f"{SETTING} names no store the farm knows.", allowed=ALLOWED)
