"""The farm's processes, and how to ask whether they are well."""

import json
import logging
import signal
import socket
import threading
import time
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from farm.cli import show
from farm.errors import Away, BrokerAway
from farm.settings import settings

app = typer.Typer()

LATE_S = 60.0  # a chore may take this long
PING_S = 4.0


class Process(StrEnum):
    API = "api"
    SWEEP = "sweep"
    WORKER = "worker"
    INTAKE = "intake"
    DELIVER = "deliver"


class _AsJson(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = {"at": self.formatTime(record), "level": record.levelname, "from": record.name,
                 "message": record.getMessage()}  # fmt: skip
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        return json.dumps(facts, ensure_ascii=False)


def _log() -> None:
    """Log to stderr, in UTC, as FARM_LOG_FORMAT says."""
    logging.Formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    if settings().log_format == "json":
        handler.setFormatter(_AsJson())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("alembic", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


@app.command()
def migrate(revision: Annotated[str, typer.Option(help="how far")] = "head") -> None:
    """Bring the database's schema, and the prices of the catalog, up to date."""
    from sqlalchemy.exc import OperationalError

    from farm import pricing
    from farm.catalog import catalog
    from farm.db import engine, transaction
    from farm.errors import DatabaseAway
    from migrations import upgrade

    engine()  # says so if there is no database
    try:
        upgrade(settings().database_url.get_secret_value(), revision)
    except OperationalError as e:
        raise DatabaseAway(str(e.orig).strip()) from e
    if revision == "head":
        with transaction() as db:
            started = pricing.sync(db, catalog())
        show.say(f"the schema is at {revision}; {started} prices are new")


@app.command()
def api() -> None:
    """Serve the HTTP API."""
    import uvicorn

    from farm.api.app import create_app

    _log()
    app = create_app()

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.feed.stop()  # streams and waiting calls would hold it up
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app,
        host=settings().api_host,
        port=settings().api_port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    server = Server(config)
    server.run()
    if not server.started:
        raise typer.Exit(3)


@app.command()
def sweep() -> None:
    """Run the repair, until SIGTERM."""
    from farm.sweep import run

    _log()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    run(stop, beat=_Heart("sweep").beat)


@app.command()
def deliver() -> None:
    """Tell webhooks what happened, until SIGTERM."""
    from farm.api.callbacks import SHAPES
    from farm.deliver import run

    _log()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    run(stop, SHAPES, beat=_Heart("deliver").beat)


@app.command()
def intake() -> None:
    """Take jobs that services send through Celery."""
    from farm.intake import run

    _log()
    run()


@app.command()
def flower() -> None:
    """Serve Flower; its password comes from FARM_FLOWER_PASSWORD."""
    from farm.flower import run

    _log()
    run()


@app.command()
def healthcheck(process: Process) -> None:
    """Ask a process on this machine whether it is well. Exits with 1 if not."""
    match process:
        case Process.API:
            _check_api()
        case Process.SWEEP | Process.DELIVER:
            _Heart(process).check()
        case Process.INTAKE:
            _ping(f"intake@{socket.gethostname()}")
        case Process.WORKER:
            _ping(f"*-[gc]pu[0-9]*@{socket.gethostname()}")
    show.say(f"{process} is well")


def _check_api() -> None:
    import httpx

    url = f"http://127.0.0.1:{settings().api_port}/health/live"
    try:
        httpx.get(url, timeout=5).raise_for_status()
    except httpx.HTTPError as e:
        raise Away(f"{url}: {e}") from e


class _Heart:
    """A file of our own that a process touches; the container's home is a folder in memory."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._file = Path.home() / ".cache" / "farm" / f"{process}.beat"
        self._last = 0.0

    def beat(self) -> None:
        if time.monotonic() - self._last < 1:
            return
        self._last = time.monotonic()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch()
        except OSError as e:
            logging.getLogger(__name__).warning("the health check will not know of this process: %s", e)

    def check(self) -> None:
        """Raises Away if it has not beaten for long."""
        try:
            late_s = time.time() - self._file.stat().st_mtime
        except FileNotFoundError:
            raise Away(f"no {self._process} has run here") from None
        if late_s > LATE_S:
            raise Away(f"{self._process} was last seen {late_s:.0f} s ago")


def _ping(pattern: str) -> None:
    """Ask Celery nodes of this name, twice: the first call after a restart of Redis may fail."""
    from farm import tokens

    answers: list[object] | None = None
    for attempt in (1, 2):
        try:
            answers = tokens.app().control.broadcast(
                "ping", reply=True, pattern=pattern, matcher="glob", timeout=PING_S, limit=1
            )
            break
        except Exception as e:
            if attempt == 2:
                raise BrokerAway(str(e)) from e
    if not answers:
        raise Away(f"no Celery node {pattern} answers")
