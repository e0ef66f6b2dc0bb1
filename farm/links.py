"""Links to files that work without a key: the farm signs them for a store that cannot, and serves them.

A link holds the file's key, until when it works, and HMAC-SHA256(FARM_SECRET) over both.
"""

import base64
import binascii
import hashlib
import hmac
from datetime import UTC, datetime, timedelta

from farm.errors import Gone, Misconfigured, NotFound
from farm.settings import settings
from farm.storage import read_image_key

PURPOSE = b"farm file link 1\n"  # an API key's secret is made of other words


def sign(key: str, expires_at: datetime) -> str:
    """The last part of a link to this file."""
    said = f"{int(expires_at.timestamp())}.{key}".encode()
    return f"{_text(said)}.{_text(_digest(said))}"


def url(farm_url: str, key: str, *, within_s: int) -> str:
    """A URL of this file that anybody may fetch for so long. farm_url: how clients reach the farm."""
    return f"{farm_url}/v1/files/{sign(key, datetime.now(UTC) + timedelta(seconds=within_s))}"


def read(token: str) -> str:
    """The key of the file that a link is to.

    Raises NotFound if we did not sign it, Gone if it has expired.
    """
    said, _, digest = token.partition(".")
    try:
        plain, signed = _bytes(said), _bytes(digest)
    except (binascii.Error, ValueError):
        raise NotFound("this is no link of ours") from None
    if not hmac.compare_digest(_digest(plain), signed) or _text(plain) != said or _text(signed) != digest:
        raise NotFound("this is no link of ours")
    expires, _, key = plain.decode().partition(".")
    if datetime.now(UTC).timestamp() >= int(expires):
        raise Gone("this link has expired; ask for another")
    if read_image_key(key) is None:
        raise NotFound("this is no link to an image")
    return key


def _digest(said: bytes) -> bytes:
    root = settings().secret.get_secret_value()
    if len(root) < 32:
        raise Misconfigured("FARM_SECRET needs 32 characters or more", setting="FARM_SECRET")
    return hmac.digest(root.encode(), PURPOSE + said, hashlib.sha256)


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
