"""Around every request: an id, a count, how long it took, what of its rates is left, an answer when something broke."""

import logging
import random
import time

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farm.api import problems
from farm.api.limits import Taken

log = logging.getLogger(__name__)

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Observed:
    """ASGI, not a BaseHTTPMiddleware: that would add a task and a queue to each request."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._count = Counter(
            "farm_http_requests", "Requests answered", ("method", "route", "status"), registry=registry
        )
        self._seconds = Histogram(
            "farm_http_request_seconds",
            "Time to the end of the answer",
            ("method", "route"),
            registry=registry,
            buckets=BUCKETS_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"{random.getrandbits(48):012x}"
        scope.setdefault("state", {})["id"] = request_id
        status, began = 0, time.monotonic()

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()), (b"x-request-id", request_id.encode()), *_rates(scope),
                ]  # fmt: skip
            await send(message)

        try:
            await self._app(scope, receive, answered)
        except ClientDisconnect:
            log.debug("request %s: the client left", request_id)
        except Exception:
            log.exception("request %s: %s broke", request_id, _route(scope))
            if not status:
                await problems.unexpected(request_id)(scope, receive, answered)
        finally:
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._count.labels(method, _route(scope), str(status or "none")).inc()
            if "streamed" not in scope["state"]:  # it lasts as long as its client likes
                self._seconds.labels(method, _route(scope)).observe(time.monotonic() - began)


def _rates(scope: Scope) -> list[tuple[bytes, bytes]]:
    """What the request has used up, as draft-ietf-httpapi-ratelimit-headers-10 has it."""
    taken: list[Taken] = scope["state"].get("rates", [])
    if not taken:
        return []
    policy, rest = (
        ", ".join(item for t in taken for item in getattr(t, part)) for part in ("policy", "rest")
    )
    return [(b"ratelimit-policy", policy.encode()), (b"ratelimit", rest.encode())]


def _route(scope: Scope) -> str:
    """The path's pattern: ids would make a series each."""
    return str(getattr(scope.get("route"), "path", "none"))
