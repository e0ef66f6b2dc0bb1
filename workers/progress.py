"""Tells the API how far a pack is, over Redis. Steps are no rows: they may be lost, and nothing waits for them."""

import json
import logging
import threading

import redis

from farm import tokens
from farm.queue import ClaimedPack
from farm.settings import settings

log = logging.getLogger(__name__)

EVERY_S = 0.1


class Progress:
    """Publishes the latest step of the pack on the device, at most ten times a second."""

    def __init__(self) -> None:
        url = settings().broker_url.get_secret_value()
        self._redis = (
            redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1)
            if url.startswith(("redis://", "rediss://", "unix://"))
            else None
        )
        self._latest: str | None = None
        self._due = threading.Event()
        self._stop = threading.Event()
        if self._redis is not None:
            threading.Thread(target=self._run, name="progress", daemon=True).start()

    def step(self, pack: ClaimedPack, done: int, total: int) -> None:
        frames = [[f.job_id.hex, f.index] for f in pack.frames]
        self._latest = json.dumps({"pack": pack.id, "step": done, "of": total, "frames": frames})
        self._due.set()

    def close(self) -> None:
        self._stop.set()
        self._due.set()

    def _run(self) -> None:
        assert self._redis is not None
        while not self._stop.is_set():
            self._due.wait()
            self._due.clear()
            latest, self._latest = self._latest, None
            if latest is None:
                continue
            try:
                self._redis.publish(tokens.PROGRESS, latest)
            except (redis.RedisError, OSError) as e:
                log.debug("a step was not told: %s", e)
            self._stop.wait(EVERY_S)
