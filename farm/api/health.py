"""Whether the process runs, and whether it can take requests. No thread and no pooled connection is held."""

import asyncio
import logging
from functools import cache

import psycopg
from alembic.script import ScriptDirectory
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from farm.errors import DatabaseAway
from farm.settings import settings
from migrations import config

log = logging.getLogger(__name__)

router = APIRouter(prefix="/health", tags=["health"])

PATIENCE_S = 2.0


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    """What the API stands on."""

    ready: bool
    database: str = Field(description="up, away, or 'not migrated'")
    redis: str = Field(description="up, away or unused; without it jobs are taken all the same")
    store: str = Field(
        description="as it was when this process began: up, away, wrong (see the log), or unknown; jobs are taken"
    )


@router.get("/live")
async def live() -> Live:
    """The process answers; it asks nobody else."""
    return Live(live=True)


@router.get("/ready", response_model=Ready, responses={503: {"model": Ready, "description": "not ready"}})
async def ready(request: Request) -> JSONResponse:
    """The database answers within 2 s and has the tables this farm works with."""
    database = await _database()
    state = Ready(
        ready=database == "up",
        database=database,
        redis=request.app.state.progress.state,
        store=request.app.state.store,
    )
    if not state.ready:
        return JSONResponse(state.model_dump(), 503, headers={"Retry-After": str(DatabaseAway.retry_after_s)})
    return JSONResponse(state.model_dump())


async def _database() -> str:
    try:
        async with asyncio.timeout(PATIENCE_S):
            revision = await _revision()
    except psycopg.errors.UndefinedTable:
        return "not migrated"
    except (psycopg.Error, OSError, TimeoutError) as e:
        log.warning("the database does not answer: %s", type(e).__name__)
        return "away"
    # an unknown revision is a newer one: the next release's migrations run before this one's processes end
    head, known = _revisions()
    return "not migrated" if revision is None or (revision in known and revision != head) else "up"


async def _revision() -> str | None:
    """The database's migration, over a connection of its own: those of the pool may all be busy."""
    url = settings().database_url.get_secret_value()
    async with await psycopg.AsyncConnection.connect(url, connect_timeout=2) as connection:
        found = await (await connection.execute("SELECT version_num FROM alembic_version")).fetchone()
    return str(found[0]) if found else None


@cache
def _revisions() -> tuple[str | None, frozenset[str]]:
    scripts = ScriptDirectory.from_config(config(""))
    return scripts.get_current_head(), frozenset(s.revision for s in scripts.walk_revisions())
