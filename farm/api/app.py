"""The FastAPI app."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Gauge
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from farm import answers
from farm.api import (
    accounts,
    budget,
    bulk,
    events,
    frames,
    health,
    images,
    inputs,
    jobs,
    keys,
    margin,
    metrics,
    models,
    outputs,
    prices,
    problems,
    provenance,
    quotes,
    reference,
    sheets,
    statements,
    usage,
    webhooks,
    workers,
)
from farm.api.dialects import (
    automatic1111,
    bedrock,
    comfyui,
    fal,
    openai,
    openai_batches,
    openai_files,
    plain,
    replicate,
    stability,
)
from farm.api.dialects import images as image_requests
from farm.api.dialects.pathkeys import KeyInPath
from farm.api.door import Door
from farm.api.feed import Feed
from farm.api.observed import Observed
from farm.api.progress import Progress
from farm.bulk.uploads import Facts
from farm.errors import FarmError
from farm.settings import settings
from farm.storage.check import at_start
from farm.submissions import Submission

BODIES = (
    Submission,
    jobs.Change,
    accounts.NewAccount,
    accounts.ChangedAccount,
    accounts.ChangedLimits,
    keys.WantedKey,
    keys.ChangedKey,
    keys.Rotation,
    statements.Closing,
    usage.NewReversal,
    prices.NewPrice,
    budget.WantedBudget,
    Facts,
    webhooks.NewWebhook,
    webhooks.ChangedWebhook,
    image_requests.Generation,
    bedrock.Invocation,
    openai_batches.NewBatch,
    stability.TextToImage,
    *replicate.BODIES,
    *fal.BODIES,
    *automatic1111.BODIES,
    *comfyui.BODIES,
    plain.Generate,
)
LINES = (answers.UsageEntry, answers.BulkError, answers.ManifestLine)  # of NDJSON
ROUTERS = (
    jobs.router,
    outputs.router,
    bulk.router,
    sheets.router,
    frames.router,
    events.router,
    webhooks.router,
    provenance.router,
    images.router,
    inputs.router,
    usage.router,
    statements.router,
    margin.router,
    models.router,
    prices.router,
    quotes.router,
    budget.router,
    accounts.router,
    keys.router,
    workers.router,
    health.router,
    metrics.router,
)
# APIs that other services already speak
DIALECTS = (
    openai.router,
    openai_files.router,
    openai_batches.router,
    bedrock.router,
    stability.router,
    replicate.router,
    automatic1111.router,
    comfyui.router,
    plain.router,
    fal.router,
)
OPEN = ("/health", "/metrics")  # what needs no key
REF = "#/components/schemas/{model}"
DESCRIPTION = """A render farm for generated images.

Send a job with `POST /v1/jobs`; it is durable when that answers 202. Look at it until its status is
`finished`, then fetch its images. Repeat a request that got no answer under the same `Idempotency-Key`: it is
accepted once.

Amounts are text with all their digits. Times are UTC. Every error is `application/problem+json`.
"""
SIGV4 = {
    "type": "apiKey",
    "in": "header",
    "name": "Authorization",
    "description": "AWS Signature Version 4: the access key id is an API key's id, the secret key its secret",
}
TAGS = [
    {"name": "jobs", "description": "One submission: one or many frames, one priority."},
    {"name": "bulk", "description": "A file of lines, or a matrix, as one job."},
    {"name": "frames", "description": "One image of a job, one seed."},
    {"name": "events", "description": "What happened, and what happens: as pages, and as it happens."},
    {"name": "webhooks", "description": "Who is told of it: signed, tried again, and written down."},
    {"name": "inputs", "description": "Images to start frames from: init images, masks, control images."},
    {"name": "usage", "description": "What was used and what it cost."},
    {"name": "prices", "description": "What a unit costs, since when and until when."},
    {"name": "budgets", "description": "What may be spent, and what of it is gone."},
    {"name": "models", "description": "What may be asked of each model."},
    {"name": "accounts", "description": "Who pays, and how they prove it."},
    {"name": "dialects", "description": "APIs that other services already speak: see docs/dialects.md."},
    {"name": "admin", "description": "Needs a key with role admin."},
    {"name": "health", "description": "For probes and Prometheus; no key."},
]


class Api(FastAPI):
    """FastAPI, with the schemas of bodies that are parsed off the event loop."""

    def openapi(self) -> dict[str, Any]:
        if not self.openapi_schema:
            schema = super().openapi()
            parts = schema.setdefault("components", {})
            parts.setdefault("schemas", {}).update(_schemas())
            parts["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer", "description": "an API key: farm_…"},
                "basic": {"type": "http", "scheme": "basic", "description": "an API key as the password"},
                "sigv4": SIGV4,
            }
            schema["security"] = [{"bearer": []}, {"basic": []}]
            for name in ("HTTPValidationError", "ValidationError"):  # we answer with a Problem
                parts["schemas"].pop(name, None)
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    _correct(operation, is_open=path.startswith(OPEN))
        return self.openapi_schema or {}


def _correct(operation: dict[str, Any], *, is_open: bool) -> None:
    if is_open:
        operation.setdefault("security", [])
    answers = operation["responses"]
    if "HTTPValidationError" in str(answers.get("422")):
        del answers["422"]  # FastAPI's own: a path's text parameter is never invalid, only unknown


def _schemas() -> dict[str, Any]:
    wanted: list[tuple[type[BaseModel], Any]] = [
        *((m, "validation") for m in (*BODIES, problems.Problem)),
        *((m, "serialization") for m in LINES),
    ]
    _, schema = models_json_schema(wanted, ref_template=REF)
    found: dict[str, Any] = schema["$defs"]
    found["Submission"]["oneOf"] = [{"required": ["spec"]}, {"required": ["specs"]}]
    return found


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    # a thread more than connections would only wait for one of them, and fail after 5 s
    current_default_thread_limiter().total_tokens = settings().pool_size
    following = asyncio.create_task(app.state.progress.follow())
    noting = asyncio.create_task(app.state.door.follow())
    feeding = asyncio.create_task(app.state.feed.follow())
    # a thread that nobody waits for: neither a request nor the end of the process
    threading.Thread(target=_examine_store, args=(app,), name="store check", daemon=True).start()
    yield
    following.cancel()
    noting.cancel()
    feeding.cancel()
    for task in (following, noting, feeding):
        with suppress(asyncio.CancelledError):
            await task


def _examine_store(app: FastAPI) -> None:
    def tell(state: str) -> None:
        app.state.store = state

    with suppress(FarmError):  # it is logged, and /health/ready says it
        at_start(settings().storage_url.get_secret_value(), tell=tell)


def _operation(route: APIRoute) -> str:
    return route.name


def _version() -> str:
    try:
        return version("image-farm")
    except PackageNotFoundError:
        return "0"


def create_app() -> FastAPI:
    """The API of this process, ready for uvicorn. Nothing is contacted yet."""
    app = Api(
        title="Image farm",
        version=_version(),
        description=DESCRIPTION,
        openapi_tags=TAGS,
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation,
    )
    app.state.registry = CollectorRegistry()
    app.state.registry.register(metrics.FarmCollector())
    app.state.store = "unknown"
    app.state.door = Door()
    app.state.progress = Progress(settings().broker_url.get_secret_value())
    app.state.feed = Feed(app.state.progress)
    for name, says, count in (
        ("farm_streams", "Streams that are open", lambda: app.state.feed.listeners),
        ("farm_waiting_calls", "Calls that wait for the end of a job", lambda: app.state.feed.waiters),
    ):
        Gauge(name, says, registry=app.state.registry).set_function(count)
    problems.install(app)
    for router in (*ROUTERS, *DIALECTS):
        app.include_router(router)
    reference.install(app)
    app.add_middleware(Observed, registry=app.state.registry)
    app.add_middleware(KeyInPath)  # the outermost: nothing sees a path with a key
    return app
