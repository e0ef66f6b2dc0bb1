"""Tells the API how far frames are and what they look like, over Redis. No rows: they may be lost, nothing waits."""

import base64
import io
import json
import logging
import threading
import time
from collections.abc import Iterable
from uuid import UUID

import redis
from PIL import Image

from farm import tokens
from farm.queue import ClaimedFrame, ClaimedPack
from farm.settings import settings
from workers.engine import Pixels

log = logging.getLogger(__name__)

EVERY_S = 0.1
PREVIEW_EVERY_S = 1.0  # of a frame
PREVIEW_SIDE = 128  # at most, in pixels
QUALITY = 75

Place = tuple[str, int]  # job and index


class Progress:
    """Publishes the latest step of each frame on the device, at most ten times a second."""

    def __init__(self) -> None:
        url = settings().broker_url.get_secret_value()
        self._redis: redis.Redis | None = (
            redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1)
            if url.startswith(("redis://", "rediss://", "unix://"))
            else None
        )
        self._lock = threading.Lock()
        self._steps: dict[Place, tuple[int, int, int]] = {}  # pack, steps done, steps in all
        self._previews: dict[Place, tuple[int, Pixels]] = {}
        self._jobs: set[UUID] = set()
        self._asked = 0.0
        self.watched: frozenset[UUID] = frozenset()  # jobs that somebody wants to see while they are rendered
        self._due = threading.Event()
        self._stop = threading.Event()
        if self._redis is not None:
            threading.Thread(target=self._run, name="progress", daemon=True).start()

    def step(self, pack: ClaimedPack, done: int, total: int) -> None:
        """Tell that all frames of a pack made a step."""
        self.steps((pack.id, frame, done, total) for frame in pack.frames)

    def steps(self, steps: Iterable[tuple[int, ClaimedFrame, int, int]]) -> None:
        """Tell of frames that made a step: pack id, frame, steps done, steps in all."""
        if self._redis is None:
            return
        with self._lock:
            for pack, frame, done, total in steps:
                self._steps[frame.job_id.hex, frame.index] = (pack, done, total)
                self._jobs.add(frame.job_id)
        self._due.set()

    def preview(self, pack_id: int, frame: ClaimedFrame, pixels: Pixels) -> None:
        """Show what a frame looks like."""
        with self._lock:
            self._previews[frame.job_id.hex, frame.index] = (pack_id, pixels)
        self._due.set()

    def close(self) -> None:
        self._stop.set()
        self._due.set()

    def _run(self) -> None:
        assert self._redis is not None
        while not self._stop.is_set():
            self._due.wait()
            self._due.clear()
            with self._lock:
                steps, self._steps = self._steps, {}
                previews, self._previews = self._previews, {}
            try:
                for message in _messages(steps, previews):
                    self._redis.publish(tokens.PROGRESS, message)
                self._ask_who_watches(self._redis)
            except (redis.RedisError, OSError) as e:
                log.debug("a step was not told: %s", e)
            self._stop.wait(EVERY_S)

    def _ask_who_watches(self, client: "redis.Redis") -> None:
        if time.monotonic() < self._asked + PREVIEW_EVERY_S:
            return
        self._asked = time.monotonic()
        with self._lock:
            jobs, self._jobs = sorted(self._jobs), set()
        watching = client.mget([tokens.watched_key(job) for job in jobs]) if jobs else []
        self.watched = frozenset(job for job, on in zip(jobs, watching, strict=True) if on)


def _messages(
    steps: dict[Place, tuple[int, int, int]], previews: dict[Place, tuple[int, Pixels]]
) -> Iterable[str]:
    if steps:
        yield json.dumps({"steps": [[*place, *step] for place, step in steps.items()]})
    for place, (pack, pixels) in previews.items():
        yield json.dumps({"preview": [*place, pack, _jpeg(pixels)]})


def _jpeg(pixels: Pixels) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return base64.b64encode(file.getvalue()).decode()
