"""`python -m tests.chaos.zygote FOLDER`: keeps processes alive, by fork, so that a death costs milliseconds.

Reads standard input, a JSON object a line: {"keep": name, "role": …, "env": …, "plan": …} starts a process,
and starts it again whenever it dies; {"drop": prefix} ends those of that prefix. A process's pid stands in
FOLDER/name.pid, what it logs in FOLDER/name.log.
When standard input closes, everything here is killed: however the test died, nothing stays behind.
"""

import json
import logging
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import boto3  # noqa: F401 - imported once, before the forks

from farm import sweep
from farm.catalog import catalog
from farm.settings import settings
from tests.chaos import clocks, faults, variants  # noqa: F401 - imported once, before the forks
from tests.chaos.faults import Plan
from workers.node import Node
from workers.run import Worker

log = logging.getLogger("chaos")


def worker(name: str, plan: Plan) -> None:
    """A worker without Celery: it looks for work by itself."""
    faults.install(plan)
    burst = Worker(name, pool="starter", models=catalog().pool("starter"), device="cpu").burst
    while True:
        try:
            burst(lambda report: None)
        except Exception:
            log.exception("a burst failed")
        time.sleep(0.05)


def node(name: str, plan: Plan) -> None:
    """A whole Celery node: a parent, and a child that has the plan."""
    faults.install(replace(plan, freezes={}))  # nobody would find its child to wake it
    Node(pool="starter", name=f"{name}@chaos").run()


def sweeper(name: str, plan: Plan) -> None:
    if plan.clock_s:
        clocks.shift(plan.clock_s)
    # files that nobody booked go soon: while their frames are rendered again to the same bytes
    sweep.CHORES = tuple(replace(c, every_s=min(c.every_s, 3)) for c in sweep.CHORES)
    sweep.run(threading.Event())


ROLES = {"worker": worker, "node": node, "sweep": sweeper}


def start(folder: Path, order: dict) -> int:
    pid = os.fork()
    if pid:
        (folder / f"{order['keep']}.pid").write_text(str(pid))
        return pid
    code = 1
    try:
        _become(folder, order)
        code = 0
    finally:
        os._exit(code)


def _become(folder: Path, order: dict) -> None:
    name = order["keep"]
    handle = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["env"])
    settings.cache_clear()
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(process)d %(threadName)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        ROLES[order["role"]](name, Plan.from_json(order["plan"]))
    except BaseException:
        log.exception("%s ended", name)
        raise


def obey(folder: Path, order: dict, kept: dict[int, dict]) -> None:
    if "keep" in order:
        kept[start(folder, order)] = order
        return
    for pid in [pid for pid, kept_as in kept.items() if kept_as["keep"].startswith(order["drop"])]:
        del kept[pid]
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    folder = Path(sys.argv[1])
    kept: dict[int, dict] = {}
    os.write(1, b"ready\n")
    buffer = b""
    while True:
        if select.select([0], [], [], 0.02)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                obey(folder, json.loads(line), kept)
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                if order := kept.pop(ended, None):
                    kept[start(folder, order)] = order
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
