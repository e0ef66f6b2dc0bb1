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
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from farm import answers
from farm.api import (
    accounts,
    budget,
    frames,
    health,
    images,
    inputs,
    jobs,
    margin,
    metrics,
    models,
    prices,
    problems,
    provenance,
    quotes,
    sheets,
    statements,
    usage,
    workers,
)
from farm.api.observed import Observed
from farm.api.progress import Progress
from farm.errors import FarmError
from farm.settings import settings
from farm.storage.check import at_start
from farm.submissions import Submission

BODIES = (
    Submission,
    jobs.Change,
    accounts.NewAccount,
    accounts.ChangedAccount,
    accounts.WantedKey,
    statements.Closing,
    usage.NewReversal,
    prices.NewPrice,
    budget.WantedBudget,
)
LINES = (answers.UsageEntry,)  # of NDJSON
ROUTERS = (
    jobs.router,
    sheets.router,
    frames.router,
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
    workers.router,
    health.router,
    metrics.router,
)
REF = "#/components/schemas/{model}"
DESCRIPTION = """A render farm for generated images.

Send a job with `POST /v1/jobs`; it is durable when that answers 202. Look at it until its status is
`finished`, then fetch its images. Repeat a request that got no answer under the same `Idempotency-Key`: it is
accepted once.

Amounts are text with all their digits. Times are UTC. Every error is `application/problem+json`.
"""
TAGS = [
    {"name": "jobs", "description": "One submission: one or many frames, one priority."},
    {"name": "frames", "description": "One image of a job, one seed."},
    {"name": "inputs", "description": "Images to start frames from: init images, masks, control images."},
    {"name": "usage", "description": "What was used and what it cost."},
    {"name": "prices", "description": "What a unit costs, since when and until when."},
    {"name": "budgets", "description": "What may be spent, and what of it is gone."},
    {"name": "models", "description": "What may be asked of each model."},
    {"name": "accounts", "description": "Who pays, and how they prove it."},
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
            }
            schema["security"] = [{"bearer": []}, {"basic": []}]
            for name in ("HTTPValidationError", "ValidationError"):  # we answer with a Problem
                parts["schemas"].pop(name, None)
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    _correct(operation, is_open=not path.startswith("/v1/"))
        return self.openapi_schema or {}


def _correct(operation: dict[str, Any], *, is_open: bool) -> None:
    if is_open:
        operation["security"] = []
    answers = operation["responses"]
    if "422" in answers and "application/json" in answers["422"]["content"]:
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
    # a thread that nobody waits for: neither a request nor the end of the process
    threading.Thread(target=_examine_store, args=(app,), name="store check", daemon=True).start()
    yield
    following.cancel()
    with suppress(asyncio.CancelledError):
        await following


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
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation,
    )
    app.state.registry = CollectorRegistry()
    app.state.registry.register(metrics.FarmCollector())
    app.state.store = "unknown"
    app.state.progress = Progress(settings().broker_url.get_secret_value())
    problems.install(app)
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(Observed, registry=app.state.registry)
    return app
