"""Which farm a command talks to, and as whom."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated

import typer

from farm.client import Farm
from farm.embedded import default_data
from farm.errors import Conflict, NotFound
from farm.settings import settings

Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="its id, the start of it, or: last")]

JOB_ID_LENGTH = len("job_") + 32
PATIENCE_S = 5.0  # somebody sits there and waits
RECENT = 200  # jobs among which the start of an id is looked for


def read_env_file() -> None:
    """Take what the environment does not say from the farm.env of this machine's `farm up`."""
    from farm.cli.up import read_env

    if "FARM_API_KEY" in os.environ or "FARM_URL" in os.environ:
        return
    try:
        found = read_env(default_data() / "farm.env")
    except OSError:  # somebody else's
        return
    for name in ("FARM_URL", "FARM_API_KEY", "FARM_ADMIN_KEY"):
        if name in found:
            os.environ.setdefault(name, found[name])
    settings.cache_clear()


def as_account() -> Farm:
    """The farm, with FARM_API_KEY."""
    return Farm(patience_s=PATIENCE_S)


def as_admin() -> Farm:
    """The farm, with FARM_ADMIN_KEY if there is one: `farm up` writes it beside the account's key."""
    return Farm(api_key=os.environ.get("FARM_ADMIN_KEY") or None, patience_s=PATIENCE_S)


@contextmanager
def on_job(job: str) -> Iterator[tuple[Farm, str]]:
    """The farm, and the whole id of the job that was meant."""
    with as_account() as farm:
        yield farm, find(farm, job)


def find(farm: Farm, job: str) -> str:
    """The id that was meant by `last`, or by the start of an id.

    Raises NotFound if there is none, Conflict if there are several.
    """
    start = job if job.startswith("job_") else f"job_{job}"
    if len(start) == JOB_ID_LENGTH:
        return start
    recent = [j.id for j in farm.jobs(limit=1 if job == "last" else RECENT)]
    found = recent if job == "last" else [j for j in recent if j.startswith(start)]
    if not found:
        raise NotFound(f"no job {job!r} among the newest {RECENT}; `farm jobs` lists them")
    if len(found) > 1:
        raise Conflict(f"{len(found)} jobs start with {start}: write more of the id")
    return found[0]


def utc(moment: datetime | None) -> datetime | None:
    """Times on the command line are UTC."""
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment
