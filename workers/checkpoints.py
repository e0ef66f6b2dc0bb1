"""Frames in flight, saved in Redis: another worker goes on where this one stopped.

Nothing waits for it and nothing depends on it. What is lost, broken or too large costs the time to start again.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from uuid import UUID

import redis

from farm.settings import settings

log = logging.getLogger(__name__)

T = TypeVar("T")

KEPT_S = 3600  # in Redis, after it was saved last
AWAY_S = 5.0  # Redis is not asked again for this long after it did not answer
TIMEOUT_S = 1.0


def key_of(frame: UUID) -> str:
    return f"farm.saved.{frame.hex}"


class Checkpoints:
    """The states this worker saved. One thread writes them, in the order in which they came."""

    def __init__(self) -> None:
        url = settings().broker_url.get_secret_value()
        self._redis: redis.Redis | None = (
            redis.Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
            if url.startswith(("redis://", "rediss://", "unix://"))
            else None
        )
        self._sizes: dict[UUID, int] = {}  # of the writer's thread
        self._known: set[UUID] = set()  # frames of which a state may be there
        self._away_until = 0.0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[frozenset[UUID]] | None = None
        self._lock = threading.Lock()

    def fetch(self, frames: Sequence[UUID]) -> dict[UUID, bytes]:
        """The states of these frames that are there."""
        found: Any = self._ask(lambda r: r.mget([key_of(f) for f in frames])) if frames else None
        states = {f: state for f, state in zip(frames, found or [], strict=False) if state is not None}
        with self._lock:
            self._known |= states.keys()
        return states

    @property
    def busy(self) -> bool:
        """Whether the last save is still on its way: there is no use in another."""
        return self._writing is not None and not self._writing.done()

    def save(self, states: Mapping[UUID, bytes]) -> Future[frozenset[UUID]]:
        """Store states in the background, within the limits. Answers the frames whose state is stored."""
        with self._lock:
            self._known |= states.keys()
        self._writing = self._writer.submit(self._store, dict(states))
        return self._writing

    def forget(self, frames: Collection[UUID], *, ended: bool = True) -> None:
        """Remove the states of frames that ended; those that others go on with only count no longer."""
        with self._lock:
            known = [f for f in frames if f in self._known]
            self._known.difference_update(known)
        if known:
            self._writer.submit(self._remove, known, ended=ended)

    def close(self) -> None:
        """Wait for what is being written."""
        self._writer.shutdown()

    def _remove(self, frames: Sequence[UUID], *, ended: bool) -> None:
        for frame in frames:
            self._sizes.pop(frame, None)
        if ended:
            self._ask(lambda r: r.delete(*[key_of(f) for f in frames]))

    def _store(self, states: Mapping[UUID, bytes]) -> frozenset[UUID]:
        total = sum(size for f, size in self._sizes.items() if f not in states)
        fitting = {}
        for frame, state in sorted(states.items(), key=lambda item: len(item[1])):
            if (
                len(state) <= settings().checkpoint_bytes
                and total + len(state) <= settings().checkpoints_bytes
            ):
                fitting[frame] = state
                total += len(state)
        if len(fitting) < len(states):
            log.info("%d states of frames in flight are too large to be saved", len(states) - len(fitting))

        def write(r: redis.Redis) -> bool:
            pipe = r.pipeline(transaction=False)
            for frame, state in fitting.items():
                pipe.set(key_of(frame), state, ex=KEPT_S)
            return all(pipe.execute())

        if not fitting or not self._ask(write):
            return frozenset()
        self._sizes |= {frame: len(state) for frame, state in fitting.items()}
        return frozenset(fitting)

    def _ask(self, what: Callable[[redis.Redis], T]) -> T | None:
        """What Redis answers; None if it is away."""
        if self._redis is None or time.monotonic() < self._away_until:
            return None
        try:
            return what(self._redis)
        except (redis.RedisError, OSError) as e:
            self._away_until = time.monotonic() + AWAY_S
            log.warning("frames in flight are not saved while Redis is away: %s", e)
            return None
