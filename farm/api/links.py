"""How the farm's own URLs begin, as the clients of a request reach it.

FARM_PUBLIC_URL says so. Without it the Host header does, and the scheme that X-Forwarded-Proto names where the request
came through a proxy that uvicorn trusts (FORWARDED_ALLOW_IPS; the loopback if that is not set). So a caller may forge
the URLs in its own answers, and in nobody else's: set FARM_PUBLIC_URL wherever answers pass a cache.
"""

import re

from starlette.requests import HTTPConnection

from farm.settings import settings

HOST = re.compile(r"([A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")


def base(request: HTTPConnection) -> str:
    """How clients reach the farm, without a slash at its end."""
    if settings().public_url:
        return settings().public_url.rstrip("/")
    host = request.headers.get("host", "")
    if not HOST.fullmatch(host):  # nothing that would end up elsewhere in a URL
        server = request.scope.get("server") or ("127.0.0.1", settings().api_port)
        host = f"{server[0]}:{server[1]}"
    scheme = "https" if request.scope.get("scheme") in ("https", "wss") else "http"
    return f"{scheme}://{host}"
