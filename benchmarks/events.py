"""How soon an event reaches 1,000 listeners: streams of one API process, against each of them asking once a second.

The clock starts when the transaction that did something has committed, and stops when a listener has read it: the
sweep's relay, the notification, one query for all, and a thousand answers lie in between. Clients, API, sweep and
Postgres share the machine. The plain alternative is the same farm and the same listeners, each asking for what came
after the last event it saw, once a second.
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import psutil

from benchmarks import harness
from benchmarks.harness import Target, quantile, say
from benchmarks.submit import api
from farm import submissions
from farm.accounts import Caller
from farm.db import transaction
from farm.submissions import Submission

LISTENERS = 1000
SPEC = {"prompt": "a red circle on a blue background", "steps": 1}
ENV = {"FARM_READS_PER_S": "1000000"}
ASK_EVERY_S = 1.0
LIMIT_S = 20.0  # what takes longer counts as this


@dataclass(frozen=True)
class Scale:
    """How large the run is."""

    events: int
    plain_events: int
    every_s: float


FULL = Scale(events=40, plain_events=10, every_s=1.5)
QUICK = Scale(events=6, plain_events=2, every_s=1.2)


@dataclass
class Heard:
    """When each listener heard of each event."""

    listeners: int
    at: dict[int, list[float]] = field(default_factory=dict)
    errors: int = 0

    def hear(self, number: int) -> None:
        self.at.setdefault(number, []).append(time.monotonic())

    def by_all(self, number: int) -> bool:
        return len(self.at.get(number, ())) >= self.listeners

    def figures(self, told: dict[int, float], prefix: str = "") -> dict[str, float]:
        """From the commit to each listener: those who heard nothing took as long as we waited."""
        each = [
            at - told[number]
            for number in told
            for at in (
                *self.at.get(number, ()),
                *[told[number] + LIMIT_S] * (self.listeners - len(self.at.get(number, ()))),
            )
        ]
        return {
            f"{prefix}p50_ms": 1000 * quantile(each, 0.5),
            f"{prefix}p99_ms": 1000 * quantile(each, 0.99),
            f"{prefix}max_ms": 1000 * max(each),
        }


Client = Callable[[int, str, Heard, int], Awaitable[None]]


def main() -> int:
    scale = QUICK if harness.options(__doc__).quick else FULL
    with harness.services(**ENV) as folder, api(folder) as (owner, key, pid, port):
        say(f"{LISTENERS} streams")
        ours = asyncio.run(
            _measure(_stream, owner, key, port=port, pid=pid, events=scale.events, every_s=scale.every_s)
        )
        say(f"{LISTENERS} clients that ask once a second")
        plain = asyncio.run(
            _measure(
                _ask, owner, key, port=port, pid=pid, events=scale.plain_events, every_s=2 * scale.every_s,
                prefix="plain_",
            )
        )  # fmt: skip
    return harness.report(
        "events",
        {**ours, **plain, "of_plain": ours["p50_ms"] / plain["plain_p50_ms"]},
        [Target("max_ms", at_most=1000), Target("errors", at_most=0)],
    )


async def _measure(
    client: Client,
    owner: Caller,
    key: str,
    *,
    port: int,
    pid: int,
    events: int,
    every_s: float,
    prefix: str = "",
) -> dict[str, float]:
    """Let everybody listen, let things happen one by one, and see when each heard of them."""
    before = await asyncio.to_thread(_last, owner)
    heard = Heard(LISTENERS)
    listening = [asyncio.create_task(client(port, key, heard, before)) for _ in range(LISTENERS)]
    told: dict[int, float] = {}
    await _told(owner, told, before + 1)  # the first only says that everybody listens
    await _until(lambda: heard.by_all(before + 1), 60)
    told.clear()
    api = psutil.Process(pid)
    cpu = sum(api.cpu_times()[:2])
    began = time.monotonic()
    for k in range(events):
        number = before + 2 + k
        await _told(owner, told, number)
        await _until(lambda n=number: heard.by_all(n), LIMIT_S)
        await asyncio.sleep(max(0.0, told[number] + every_s - time.monotonic()))
    figures = heard.figures(told, prefix)
    figures[f"{prefix}api_cpu_share"] = (sum(api.cpu_times()[:2]) - cpu) / (time.monotonic() - began)
    figures[f"{prefix}api_rss_mb"] = api.memory_info().rss / 2**20
    figures[f"{prefix}errors"] = heard.errors
    for task in listening:
        task.cancel()
    await asyncio.gather(*listening, return_exceptions=True)
    return figures


async def _told(owner: Caller, told: dict[int, float], number: int) -> None:
    """Do something that is event `number`; the clock starts when it is committed."""
    await asyncio.to_thread(_submit, owner)
    told[number] = time.monotonic()


def _submit(owner: Caller) -> None:
    with transaction() as db:
        submissions.submit(db, owner, Submission(spec=SPEC, reuse=False))


def _last(owner: Caller) -> int:
    from farm import events

    del owner
    with transaction() as db:
        return events.last(db)


async def _until(reached: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not reached() and time.monotonic() < deadline:
        await asyncio.sleep(0.005)


def _request(key: str, path: str, accept: str) -> bytes:
    return (
        f"GET {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {key}\r\nAccept: {accept}\r\n\r\n"
    ).encode()


async def _stream(port: int, key: str, heard: Heard, after: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(_request(key, f"/v1/events?after={after}", "text/event-stream"))
        while line := await reader.readline():
            if line.startswith(b"id: "):
                heard.hear(int(line[4:]))
        heard.errors += 1
    finally:
        writer.close()


async def _ask(port: int, key: str, heard: Heard, after: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while True:
            asked = time.monotonic()
            writer.write(_request(key, f"/v1/events?after={after}", "application/json"))
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.partition(b":")[2])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length")
            )
            body = json.loads(await reader.readexactly(length))
            if not head.startswith(b"HTTP/1.1 200"):
                heard.errors += 1
            for event in body.get("events", ()):
                heard.hear(event["number"])
            after = body.get("next", after)
            await asyncio.sleep(max(0.0, asked + ASK_EVERY_S - time.monotonic()))
    finally:
        writer.close()


if __name__ == "__main__":
    sys.exit(main())
