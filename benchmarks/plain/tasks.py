"""What people build first: a Celery task an image, on the same stock pipeline; the result is a PNG on disk.

A broker database and a queue of its own, prefork with one child, one thread. It has nothing of the farm's: no
books, no leases, no fsync.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import redis
from celery import Celery
from celery.signals import worker_process_init

from benchmarks.harness import alive, process, until
from benchmarks.plain.loop import Call, load, render

BROKER = os.environ.get("PLAIN_BROKER_URL", "")
TIMES = "plain.times"  # a list in Redis: when each task began and ended
DATABASE = 1  # of the same Redis; the farm has 0

app = Celery("plain", broker=BROKER)
if "PLAIN_PRIORITIES" in os.environ:  # what makes priorities hold on Redis; without them it would only cost
    app.conf.update(
        worker_prefetch_multiplier=1,
        task_acks_late=True,
        broker_transport_options={"priority_steps": list(range(10)), "queue_order_strategy": "priority"},
    )
app.conf.update(
    task_ignore_result=True,
    task_default_queue="plain",
    worker_proc_alive_timeout=300,  # the child loads torch and the checkpoint
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)
_loaded: dict[str, Any] = {}


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _load(**_: object) -> None:
    _loaded["pipeline"] = load(os.environ["PLAIN_MODEL"])
    _loaded["config"] = _loaded["pipeline"].scheduler.config
    _loaded["redis"] = redis.Redis.from_url(BROKER)


@app.task(name="plain.render")  # type: ignore[untyped-decorator]
def render_one(call: dict[str, Any], name: str = "") -> None:
    """Render one image and save it."""
    began = time.time()
    (image,) = render(_loaded["pipeline"], _loaded["config"], Call(**call))
    image.save(Path(os.environ["PLAIN_FOLDER"]) / f"{uuid4().hex}.png")
    _loaded["redis"].rpush(TIMES, f"{began} {time.time()} {name}")


class Plain:
    """The worker, seen from outside."""

    def __init__(self, broker_url: str, check: Any) -> None:
        self._redis = redis.Redis.from_url(broker_url)
        self._check = check
        self._app = Celery("plain", broker=broker_url)

    def seconds(self, calls: Sequence[Call]) -> float:
        """Send a task for each of these. Returns the seconds from the first's start to the last's end."""
        self.send(calls)
        times = self.times(len(calls))
        return max(end for _, end, _ in times) - min(began for began, _, _ in times)

    def send(self, calls: Sequence[Call]) -> None:
        """Send a task for each of these, and forget what was before."""
        self._redis.delete(TIMES)
        for call in calls:
            self._app.send_task("plain.render", args=[asdict(call)], queue="plain", priority=9)

    def send_urgent(self, call: Call, name: str) -> None:
        """Send a task of the top priority: 0 on Redis."""
        self._app.send_task("plain.render", args=[asdict(call), name], queue="plain", priority=0)

    def left(self, of: int) -> int:
        """How many of these tasks have not ended."""
        return of - int(self._redis.llen(TIMES))

    def times(self, tasks: int) -> list[tuple[float, float, str]]:
        """When each of so many tasks began and ended, and its name, once all have."""
        until(lambda: not self.left(tasks), self._check, limit_s=1800, every_s=0.1)
        lines = [line.decode().split(" ") for line in self._redis.lrange(TIMES, 0, -1)]
        return [(float(began), float(end), name) for began, end, name in lines]


@contextmanager
def plain_celery(model: str, folder: Path, *, priorities: bool = False) -> Iterator[Plain]:
    """Run the worker; its child loads the checkpoint before it takes the first task."""
    from farm.settings import settings

    broker_url = urlsplit(settings().broker_url.get_secret_value())._replace(path=f"/{DATABASE}").geturl()
    images, log = folder / "plain-images", folder / "plain.log"
    images.mkdir(exist_ok=True)
    env = {"PLAIN_BROKER_URL": broker_url, "PLAIN_MODEL": model, "PLAIN_FOLDER": str(images)}
    if priorities:
        env["PLAIN_PRIORITIES"] = "1"
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.plain.tasks", "worker", "-Q", "plain"]
    prefork = ["-P", "prefork", "-c", "1", "--without-gossip", "--without-mingle", "-l", "WARNING"]
    with process([*command, *prefork], log=log, env=env) as child:
        yield Plain(broker_url, alive(child, log))
