"""Single submissions over HTTP: 64 clients, one API process, Postgres and a sweep beside it.

Each client sends jobs of one frame over a connection it keeps, under an idempotency key of its own, and sends the next
when the answer is there: how many a second, how long one takes, and how much CPU time the API's process spends on it.
Then the plain alternative in the same run: a FastAPI route that reads the same body and inserts one row.
"""

import asyncio
import itertools
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from sqlalchemy import text

from benchmarks import harness
from benchmarks.harness import Target, quantile, say
from farm import accounts
from farm.accounts import Caller
from farm.db import transaction

CLIENTS = 64
SPEC = {"prompt": "a red circle on a blue background", "steps": 20, "width": 64, "height": 64}
API = "from farm.cli import main; main()"
PLAIN = """
import os, queue
from typing import Any
import psycopg, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from psycopg.types.json import Jsonb

class Job(BaseModel):
    spec: dict[str, Any]

app, free = FastAPI(), queue.SimpleQueue()
for _ in range(10):
    free.put(psycopg.connect(os.environ["FARM_DATABASE_URL"]))

@app.post("/v1/jobs", status_code=202)
def submit(job: Job) -> dict[str, Any]:
    db = free.get()
    try:
        (number,) = db.execute("INSERT INTO plain_jobs (spec) VALUES (%s) RETURNING id", [Jsonb(job.spec)]).fetchone()
        db.commit()
    finally:
        free.put(db)
    return {"id": number, "status": "queued", "spec": job.spec}

uvicorn.run(app, host="127.0.0.1", port=int(os.environ["FARM_API_PORT"]), log_config=None, access_log=False)
"""


@dataclass(frozen=True)
class Scale:
    """How long it is measured."""

    warm_s: float
    seconds: float
    plain_s: float


FULL = Scale(warm_s=5, seconds=30, plain_s=15)
QUICK = Scale(warm_s=2, seconds=8, plain_s=4)


@dataclass
class Seen:
    """What the clients saw, and what it took the server."""

    times: list[float]
    errors: int
    seconds: float
    cpu_s: float

    def figures(self, prefix: str = "") -> dict[str, float]:
        return {
            f"{prefix}jobs_per_s": len(self.times) / self.seconds,
            f"{prefix}p50_ms": 1000 * quantile(self.times, 0.5),
            f"{prefix}p99_ms": 1000 * quantile(self.times, 0.99),
            f"{prefix}api_cpu_ms": 1000 * self.cpu_s / max(1, len(self.times)),
        }


def main() -> int:
    scale = QUICK if harness.options(__doc__).quick else FULL
    rates = {f"FARM_{name}_PER_S": "100000" for name in ("WRITES", "SUBMISSIONS")}
    with harness.services(**rates) as folder:
        with transaction() as db:
            key = accounts.issue_key(db, accounts.create(db, "bench"))[1]
            db.execute(
                text("CREATE TABLE plain_jobs (id bigint GENERATED ALWAYS AS IDENTITY, spec jsonb NOT NULL)")
            )
        with harness.process([sys.executable, "-c", harness.SWEEP], log=folder / "sweep.log"):
            with serving([sys.executable, "-c", API, "api"], folder / "api.log") as (pid, port):
                say(f"{CLIENTS} clients for {scale.seconds:g} s")
                ours = asyncio.run(_all(pid, port, key, scale.warm_s, scale.seconds))
            say(f"{_jobs()} jobs are there; the plain alternative for {scale.plain_s:g} s")
            with serving([sys.executable, "-c", PLAIN], folder / "plain.log") as (pid, port):
                plain = asyncio.run(_all(pid, port, key, scale.warm_s, scale.plain_s))
        with transaction() as db:
            db.execute(text("DROP TABLE plain_jobs"))
    figures = {
        **ours.figures(),
        "errors": ours.errors,
        **plain.figures("plain_"),
        "of_plain": (len(ours.times) / ours.seconds) / (len(plain.times) / plain.seconds),
    }
    return harness.report(
        "submit",
        figures,
        [
            Target("jobs_per_s", at_least=250),
            Target("api_cpu_ms", at_most=3),
            Target("p99_ms", at_most=500),
            Target("errors", at_most=0),
        ],
    )


def _jobs() -> int:
    with transaction() as db:
        db.execute(text("SET LOCAL enable_seqscan = on"))
        return int(db.scalar(text("SELECT count(*) FROM jobs")) or 0)


@contextmanager
def api(folder: Path) -> Iterator[tuple[Caller, str, int, int]]:
    """An API process with a sweep beside it. Yields an account's caller and key, the process's id, and its port."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
    (owner,) = harness.callers(1)
    key = accounts.text_of(owner.key_id, 1)
    with (
        harness.process([sys.executable, "-c", harness.SWEEP], log=folder / "sweep.log"),
        serving([sys.executable, "-c", API, "api"], folder / "api.log") as (pid, port),
    ):
        yield owner, key, pid, port


@contextmanager
def serving(command: list[str], log: Path) -> Iterator[tuple[int, int]]:
    """Start a server on a free port. Yields its process id and the port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with harness.process(command, log=log, env={"FARM_API_PORT": str(port)}) as server:
        harness.until(lambda: _listens(port), harness.alive(server, log), limit_s=60)
        yield server.pid, port


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ the clients


async def _all(pid: int, port: int, key: str, warm_s: float, seconds: float) -> Seen:
    """Send from all clients at once. What is sent while it warms up is not counted."""
    process = psutil.Process(pid)
    begin = time.monotonic() + warm_s
    end, seen, cpu = begin + seconds, Seen([], 0, seconds, 0), [0.0, 0.0]
    requests = (_request(key, number) for number in itertools.count())

    async def look(place: int, at: float) -> None:
        await asyncio.sleep(at - time.monotonic())
        cpu[place] = sum(process.cpu_times()[:2])

    clients = [_client(port, requests, seen, begin=begin, end=end) for _ in range(CLIENTS)]
    await asyncio.gather(look(0, begin), look(1, end), *clients)
    seen.cpu_s = cpu[1] - cpu[0]
    return seen


async def _client(port: int, requests: Iterator[bytes], seen: Seen, *, begin: float, end: float) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while (started := time.monotonic()) < end:
        writer.write(next(requests))
        status = await _answer(reader)
        done = time.monotonic()
        if begin <= started and done <= end:
            seen.times.append(done - started)
            seen.errors += status != 202
    writer.close()


def _request(key: str, number: int) -> bytes:
    body = json.dumps({"spec": {**SPEC, "prompt": f"picture {number} of a red circle"}}).encode()
    head = (
        "POST /v1/jobs HTTP/1.1\r\nHost: farm\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nIdempotency-Key: {os.getpid()}-{number}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _answer(reader: asyncio.StreamReader) -> int:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(head.split("content-length:")[1].split("\r\n")[0])
    await reader.readexactly(length)
    return int(head.split(" ", 2)[1])


if __name__ == "__main__":
    sys.exit(main())
