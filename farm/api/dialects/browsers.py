"""Pages of others: a browser sends the password it was told wherever a page asks it to, so Basic needs a second look.

The APIs here take simple requests that any page may make; ComfyUI refuses those of other origins for the same reason.
"""

from urllib.parse import urlsplit

from fastapi import Depends
from starlette.requests import HTTPConnection

from farm.errors import Forbidden


def refuse_other_pages(request: HTTPConnection) -> None:
    """Raises Forbidden for what a page of another host has a browser send with the password that it keeps."""
    origin = request.headers.get("origin")
    if origin is None or not request.headers.get("authorization", "").lower().startswith("basic"):
        return
    try:
        host = urlsplit(origin).netloc.lower()
    except ValueError:
        host = ""
    if host != request.headers.get("host", "").lower():
        raise Forbidden("a page of another host may not use the password that a browser keeps; send the key")


OwnPages = Depends(refuse_other_pages)
