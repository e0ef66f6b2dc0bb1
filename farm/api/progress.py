"""How far frames on a device are. Workers publish their steps on Redis; here the latest is kept in memory.

Steps may be lost: no request waits for Redis, and while it is away frames only seem to stand still.
"""

import asyncio
import json
import logging
import time
from uuid import UUID

import redis.asyncio
from redis.exceptions import RedisError

from farm import tokens

log = logging.getLogger(__name__)

KEPT_S = 60.0  # a step is forgotten when none came after it for this long
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0


class Progress:
    """The latest step of each frame on a device. One task writes, every thread may read."""

    def __init__(self, url: str) -> None:
        self._url = url if url.startswith(("redis://", "rediss://", "unix://")) else ""
        self.state = "away" if self._url else "unused"
        self._steps: dict[tuple[str, int], tuple[int, float, float]] = {}  # pack, how far, when it came
        self._swept = time.monotonic()

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
            while True:
                message = await channel.get_message(timeout=10)  # then asks whether Redis is still there
                if message is not None:
                    self.take(message["data"])

    def take(self, data: bytes | str) -> None:
        """Remember what a worker said; what is no step is dropped."""
        now = time.monotonic()
        try:
            told = json.loads(data)
            far = min(1.0, max(0.0, told["step"] / told["of"]))
            for job, index in told["frames"]:
                self._steps[str(job), int(index)] = (int(told["pack"]), far, now)
        except (ValueError, TypeError, KeyError, ZeroDivisionError):
            log.debug("dropped a message that is no step")
        if now - self._swept > KEPT_S:
            self._steps = {k: v for k, v in self._steps.items() if v[2] > now - KEPT_S}
            self._swept = now
