"""How far frames on a device are, and what they look like. Workers publish it on Redis; the latest is kept here.

Both may be lost: no request waits for Redis, and while it is away frames only seem to stand still. Workers make
previews of a job only while somebody asks for them.
"""

import asyncio
import base64
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import redis.asyncio
from redis.exceptions import RedisError

from farm import tokens

log = logging.getLogger(__name__)

KEPT_S = 60.0  # a step is forgotten when none came after it for this long
WATCHED_S = 15  # a job counts as watched for this long after it was asked for
TELL_EVERY_S = 0.25
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0

Step = tuple[str, int, float]  # job, index, how far
Picture = tuple[str, int, bytes]  # job, index, JPEG


def nobody(_steps: Sequence[Step], _pictures: Sequence[Picture]) -> None:
    """Who is told as long as nobody listens."""


class Progress:
    """The latest step of each frame on a device. One task writes, every thread may read."""

    def __init__(self, url: str) -> None:
        self._url = url if url.startswith(("redis://", "rediss://", "unix://")) else ""
        self.state = "away" if self._url else "unused"
        self._steps: dict[tuple[str, int], tuple[int, float, float]] = {}  # pack, how far, when it came
        self._previews: dict[tuple[str, int], tuple[int, bytes, float]] = {}  # pack, JPEG, when it came
        self._watched: dict[UUID, float] = {}  # jobs somebody watches → when Redis was told
        self._wanted: set[UUID] = set()
        self._swept = time.monotonic()
        self.tell: Callable[[Sequence[Step], Sequence[Picture]], None] = nobody  # each time something came

    def watch(self, job_id: UUID) -> None:
        """Let workers make previews of this job for a while."""
        self._wanted.add(job_id)

    def preview(self, job_id: UUID, index: int, pack: int | None) -> bytes | None:
        """What a frame looks like in this pack, as a JPEG; None if nothing came yet. From now on its job is watched."""
        self._wanted.add(job_id)
        known = self._previews.get((job_id.hex, index))
        return None if known is None or known[0] != pack or known[2] < time.monotonic() - KEPT_S else known[1]

    def of(self, job_id: UUID, index: int, pack: int | None) -> float:
        """How far a frame is in this pack, 0 to 1; 0 if nothing is known."""
        known = self._steps.get((job_id.hex, index))
        if known is None or known[0] != pack or known[2] < time.monotonic() - KEPT_S:
            return 0.0
        return known[1]

    async def follow(self) -> None:
        """Listen until cancelled; come back when Redis does."""
        wait_s = FIRST_WAIT_S
        while self._url:
            try:
                await self._listen()
            except (RedisError, OSError, TimeoutError) as e:
                if self.state == "up":
                    wait_s = FIRST_WAIT_S
                    log.warning("no steps are shown until Redis is back: %s", e)
            self.state = "away"
            await asyncio.sleep(wait_s)
            wait_s = min(LONGEST_WAIT_S, wait_s * 2)

    async def _listen(self) -> None:
        client = redis.asyncio.Redis.from_url(
            self._url, socket_connect_timeout=2, socket_timeout=5, health_check_interval=10
        )
        async with client, client.pubsub(ignore_subscribe_messages=True) as channel:
            await channel.subscribe(tokens.PROGRESS)
            self.state = "up"
            telling = asyncio.create_task(self._tell(client))
            try:
                while True:
                    message = await channel.get_message(timeout=10)  # then asks whether Redis is still there
                    if message is not None:
                        self.take(message["data"])
            finally:
                telling.cancel()

    async def _tell(self, client: redis.asyncio.Redis) -> None:
        """Tell workers which jobs are watched."""
        while True:
            await asyncio.sleep(TELL_EVERY_S)
            now = time.monotonic()
            wanted, self._wanted = self._wanted, set()
            for job in list(wanted):
                if self._watched.get(job, 0.0) < now - WATCHED_S / 2:
                    try:
                        await client.set(tokens.watched_key(job), 1, ex=WATCHED_S)
                        self._watched[job] = now
                    except (RedisError, OSError) as e:
                        log.debug("workers do not know that a job is watched: %s", e)
            self._watched = {k: v for k, v in self._watched.items() if v > now - WATCHED_S}

    def take(self, data: bytes | str) -> None:
        """Remember what a worker said; what is no step is dropped."""
        now = time.monotonic()
        try:
            self._take(json.loads(data), now)
        except (ValueError, TypeError, KeyError, ZeroDivisionError):
            log.debug("dropped a message that is no step")
        if now - self._swept > KEPT_S:
            self._steps = {k: v for k, v in self._steps.items() if v[2] > now - KEPT_S}
            self._previews = {k: v for k, v in self._previews.items() if v[2] > now - KEPT_S}
            self._swept = now

    def _take(self, told: Any, now: float) -> None:
        steps: list[Step] = []
        pictures: list[Picture] = []
        if "preview" in told:
            job, index, pack, picture = told["preview"]
            pictures.append((str(job), int(index), base64.b64decode(picture, validate=True)))
            self._previews[pictures[0][:2]] = (int(pack), pictures[0][2], now)
        for job, index, pack, done, of in told.get("steps", []):
            steps.append((str(job), int(index), _share(done, of)))
            self._steps[steps[-1][:2]] = (int(pack), steps[-1][2], now)
        for job, index in told.get("frames", []):  # as workers of an earlier version say it
            steps.append((str(job), int(index), _share(told["step"], told["of"])))
            self._steps[steps[-1][:2]] = (int(told["pack"]), steps[-1][2], now)
        self.tell(steps, pictures)


def _share(done: float, of: float) -> float:
    return min(1.0, max(0.0, done / of))
