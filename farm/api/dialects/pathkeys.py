"""A key in the path, for APIs that have no place for one: `/k/farm_…/sdapi/v1/txt2img`, `/k/farm_…/prompt`.

It becomes the request's Authorization header, and leaves the path before anything looks at that: no log, metric or
answer shows it. Only the APIs below are reached this way.
"""

import re
from urllib.parse import quote

from starlette.types import ASGIApp, Receive, Scope, Send

PATH = re.compile(r"/k/([^/]*)(/.*|)", re.DOTALL)
OPEN_TO_IT = (
    "/sdapi/v1/", "/prompt", "/history", "/queue", "/view", "/upload/image", "/interrupt", "/object_info",
    "/system_stats", "/models", "/embeddings", "/features", "/free", "/ws", "/api/", "/generate", "/result/",
)  # fmt: skip


class KeyInPath:
    """ASGI; outside of all that could log a path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and (found := PATH.fullmatch(scope["path"])):
            _take(scope, key=found[1], rest=found[2])
        await self._app(scope, receive, send)


def _take(scope: Scope, *, key: str, rest: str) -> None:
    # in place: uvicorn logs a WebSocket by what the scope says when it is accepted
    scope["path"] = rest if rest.startswith(OPEN_TO_IT) else f"/k{rest}"  # the latter is no path of ours
    scope["raw_path"] = quote(scope["path"]).encode()
    others = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
    scope["headers"] = [*others, (b"authorization", f"Bearer {quote(key)}".encode())]
