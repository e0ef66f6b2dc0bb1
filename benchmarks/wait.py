"""500 clients that wait on synchronous calls of one API process, while their jobs are settled one after the other.

Each client posts a job with ?wait= and gets its answer when the job has ended; queue.settle() ends them as a worker
does, without an engine. Meanwhile somebody asks for /health/live, and the database's connections are counted. How
late an answer is counts from the commit that ended its job. The plain alternative: the same clients post and then ask
for their job four times a second.
"""

import asyncio
import hashlib
import json
import sys
import threading
import time
from dataclasses import dataclass, field

import psutil
from sqlalchemy import text

from benchmarks import harness
from benchmarks.harness import Target, quantile, say
from benchmarks.submit import api
from farm import queue
from farm.catalog import PackLimit
from farm.db import transaction
from farm.ids import public
from farm.queue import ClaimedFrame, ClaimedPack, StoredFrame
from farm.storage import image_key

CLIENTS = 500
ENV = {"FARM_READS_PER_S": "1000000", "FARM_WRITES_PER_S": "1000000", "FARM_SUBMISSIONS_PER_S": "1000000"}
LIMITS = {"starter": PackLimit(frames=4, pixels=1 << 30)}
ASK_EVERY_S = 0.25
PAUSE_S = 0.05  # between two packs: a hundred images a second at most


@dataclass(frozen=True)
class Scale:
    """How large the run is: each client waits so many times."""

    rounds: int


FULL = Scale(rounds=6)
QUICK = Scale(rounds=2)


@dataclass
class Seen:
    """What came of it. ended: when each job was committed as ended."""

    ended: dict[str, float] = field(default_factory=dict)
    answered: dict[str, float] = field(default_factory=dict)
    health: list[float] = field(default_factory=list)
    errors: int = 0
    waiting: int = 0
    most_waiting: int = 0
    connections: int = 0
    threads: int = 0
    requests: int = 0

    def late_ms(self) -> list[float]:
        return [
            1000 * max(0.0, at - self.ended[job]) for job, at in self.answered.items() if job in self.ended
        ]


def main() -> int:
    scale = QUICK if harness.options(__doc__).quick else FULL
    with harness.services(**ENV) as folder:
        with api(folder) as (_, key, pid, port):
            say(f"{CLIENTS} clients wait {scale.rounds} times each")
            ours = _run(pid, port, key, scale.rounds, waits=True)
            say("the same, and each asks four times a second")
            plain = _run(pid, port, key, scale.rounds, waits=False)
        say("checking the books")
    figures = {**ours, **{f"plain_{k}": v for k, v in plain.items()}}
    figures["cpu_of_plain"] = ours["api_cpu_ms_a_job"] / plain["api_cpu_ms_a_job"]
    return harness.report(
        "wait",
        figures,
        [
            Target("errors", at_most=0),
            Target("waiting_at_once", at_least=CLIENTS),
            Target("connections", at_most=49),
        ],
    )


def _run(pid: int, port: int, key: str, rounds: int, *, waits: bool) -> dict[str, float]:
    seen, stop = Seen(), threading.Event()
    settling = threading.Thread(target=_settle, args=(seen, stop))
    api = psutil.Process(pid)
    cpu, began = sum(api.cpu_times()[:2]), time.monotonic()
    settling.start()
    try:
        asyncio.run(_all(port, key, rounds, seen, api, waits=waits))
    finally:
        stop.set()
        settling.join()
    late = seen.late_ms()
    return {
        "errors": seen.errors + CLIENTS * rounds - len(seen.answered),
        "waiting_at_once": seen.most_waiting,
        "connections": seen.connections,
        "api_threads": seen.threads,
        "late_p50_ms": quantile(late, 0.5),
        "late_p99_ms": quantile(late, 0.99),
        "late_max_ms": max(late),
        "health_p99_ms": 1000 * quantile(seen.health, 0.99),
        "requests": seen.requests,
        "api_cpu_ms_a_job": 1000 * (sum(api.cpu_times()[:2]) - cpu) / len(late),
        "seconds": time.monotonic() - began,
    }


# ------------------------------------------------------------------------------------------------ the worker's part


def _settle(seen: Seen, stop: threading.Event) -> None:
    """End jobs as a worker does, once everybody waits for the first time."""
    while seen.waiting < CLIENTS and not stop.wait(0.05):
        pass
    while not stop.wait(PAUSE_S):
        with transaction() as db:
            pack = queue.claim_pack(db, models=["starter"], worker="bench", limits=LIMITS)
        if pack is None:
            continue
        with transaction() as db:
            settled = queue.settle(db, [_stored(pack, frame) for frame in pack.frames])
        with transaction() as db:
            queue.finish(db, sorted(settled.over))
        now = time.monotonic()
        seen.ended.update((public("job", f.job_id), now) for f in pack.frames)


def _stored(pack: ClaimedPack, frame: ClaimedFrame) -> StoredFrame:
    """What a worker would say of this frame, had it rendered it."""
    digest = hashlib.sha256(frame.id.bytes).digest()
    return StoredFrame(
        frame_id=frame.id,
        job_id=frame.job_id,
        pack_id=pack.id,
        key=image_key(frame.account_id, digest, "png"),
        format="png",
        sha256=digest,
        pixel_sha256=digest,
        bytes=1000,
        width=frame.spec.width,
        height=frame.spec.height,
    )


# ------------------------------------------------------------------------------------------------ the clients


async def _all(port: int, key: str, rounds: int, seen: Seen, api: psutil.Process, *, waits: bool) -> None:
    done = asyncio.Event()
    looking = [asyncio.create_task(_health(port, seen, done)), asyncio.create_task(_count(seen, api, done))]
    await asyncio.gather(*(_client(port, key, k, rounds, seen, waits=waits) for k in range(CLIENTS)))
    done.set()
    await asyncio.gather(*looking)


async def _client(port: int, key: str, place: int, rounds: int, seen: Seen, *, waits: bool) -> None:
    await asyncio.sleep(place / 250)  # they come at the rate the API takes them in
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"spec": {"prompt": "a red circle", "steps": 1}, "reuse": False}).encode()
    try:
        for _ in range(rounds):
            seen.waiting += 1
            seen.most_waiting = max(seen.most_waiting, seen.waiting)
            path = "/v1/jobs?wait=120" if waits else "/v1/jobs"
            status, job = await _call((reader, writer), seen, "POST", path, key=key, body=body)
            while not waits and status in (200, 202) and job["status"] != "finished":
                await asyncio.sleep(ASK_EVERY_S)
                status, job = await _call((reader, writer), seen, "GET", f"/v1/jobs/{job['id']}", key=key)
            seen.waiting -= 1
            if status in (200, 202) and job["status"] == "finished":
                seen.answered[job["id"]] = time.monotonic()
    except (OSError, asyncio.IncompleteReadError, ValueError):
        seen.errors += 1
    finally:
        writer.close()


async def _call(
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    seen: Seen,
    method: str,
    path: str,
    *,
    key: str,
    body: bytes = b"",
) -> tuple[int, dict[str, str]]:
    reader, writer = streams
    seen.requests += 1
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.partition(b":")[2])
        for line in answer.lower().split(b"\r\n")
        if line.startswith(b"content-length")
    )
    return int(answer.split(b" ", 2)[1]), json.loads(await reader.readexactly(length))


async def _health(port: int, seen: Seen, done: asyncio.Event) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while not done.is_set():
        began = time.monotonic()
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: bench\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        await reader.readexactly(length)
        seen.health.append(time.monotonic() - began)
        await asyncio.sleep(0.05)
    writer.close()


async def _count(seen: Seen, api: psutil.Process, done: asyncio.Event) -> None:
    """Every connection to the database, those of the sweep and of this process among them."""
    while not done.is_set():
        seen.connections = max(seen.connections, await asyncio.to_thread(_connections))
        seen.threads = max(seen.threads, api.num_threads())
        await asyncio.sleep(0.2)


def _connections() -> int:
    with transaction() as db:
        query = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        return int(db.scalar(text(query)) or 0)


if __name__ == "__main__":
    sys.exit(main())
