"""URLs of this farm, where an image is asked for: what they stand for is taken from the store, not fetched.

Whatever the host: a signed link is good wherever it is sent, and a file's id is looked for among the account's own.
"""

from urllib.parse import urlsplit
from uuid import UUID

from farm import files, links
from farm.db import transaction
from farm.errors import FarmError, NotFound
from farm.settings import settings
from farm.spec import CONTENT_TYPE, Format
from farm.storage import open_store, read_image_key

PATH = "/v1/files/"


def behind(account_id: UUID, url: str) -> tuple[bytes, str] | None:
    """The image behind a URL of ours, and its type; None if it is no such URL, and has to be fetched."""
    try:
        path = urlsplit(url).path
    except ValueError:
        return None
    _, slash, token = path.rpartition(PATH)
    if not slash:
        return None
    token = token.removesuffix("/content")
    try:
        return _file(account_id, token) if files.ID.fullmatch(token) else _linked(token)
    except (NotFound, UnicodeError):
        return None
    except FarmError as e:
        if e.http_status < 500:  # Gone: whoever asks elsewhere would learn no more
            return None
        raise


def _file(account_id: UUID, name: str) -> tuple[bytes, str]:
    with transaction() as db:
        row = files.find(db, account_id, files.parse(name))
    return files.content(row), row.content_type


def _linked(token: str) -> tuple[bytes, str]:
    key = links.read(token)
    named = read_image_key(key)
    assert named
    data = open_store(settings().storage_url.get_secret_value()).get(key)
    return data, CONTENT_TYPE[Format(named.format)]
