"""Keeps the leases of the packs in hand, as long as they make progress."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from uuid import UUID

from farm import queue
from farm.db import transaction
from farm.errors import FarmError
from farm.queue import Extended
from farm.settings import settings

log = logging.getLogger(__name__)

LOOK_S = 1.0  # how long a cancellation may take to be heard of


class Leases:
    """The packs a worker has in hand, extended once per lease/3 by a thread of its own.

    A pack that makes no progress is not extended: the sweep gives its frames to another worker. What the
    database answers is kept here for the render loop to ask: lost, cancelled, drain. Between two extensions it is
    asked for that alone.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._lock = threading.Lock()
        self._holds: dict[int, int] = {}  # pack id → in how many hands: on the device, on the shelf
        self._held: dict[int, float] = {}  # pack id → monotonic time until which it counts as making progress
        self._lost: set[int] = set()
        self._cancelled: dict[int, frozenset[UUID]] = {}
        self._priorities: Mapping[UUID, int] = {}
        self.heard = 0  # how often there was something to hear
        self._stop = threading.Event()
        self.drain = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
        self._thread.start()

    def hold(self, pack_id: int) -> None:
        """Take a pack in hand; each hold wants its drop."""
        with self._lock:
            self._holds[pack_id] = self._holds.get(pack_id, 0) + 1
            self._held[pack_id] = time.monotonic() + settings().stall_s

    def progress(self, pack_id: int, *, next_within_s: float | None = None) -> None:
        """Something moved. next_within_s: how long the next thing may take; the usual time if not said."""
        until = time.monotonic() + (next_within_s or settings().stall_s)
        with self._lock:
            if pack_id in self._held:
                self._held[pack_id] = until

    def drop(self, pack_id: int) -> None:
        with self._lock:
            self._holds[pack_id] -= 1
            if self._holds[pack_id]:
                return
            del self._holds[pack_id], self._held[pack_id]
            self._lost.discard(pack_id)
            self._cancelled.pop(pack_id, None)

    def is_lost(self, pack_id: int) -> bool:
        """Whether somebody else has this pack's frames by now."""
        with self._lock:
            return pack_id in self._lost

    def cancelled(self, pack_id: int) -> frozenset[UUID]:
        """Frames of this pack whose job was cancelled."""
        with self._lock:
            return self._cancelled.get(pack_id, frozenset())

    def priorities(self) -> Mapping[UUID, int]:
        """How urgent the frames in hand were when the database was asked last."""
        return self._priorities

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        every_s = settings().lease_s / 3
        extended = time.monotonic()
        while not self._stop.wait(min(LOOK_S, every_s)):
            now = time.monotonic()
            due = now - extended >= 0.9 * every_s
            with self._lock:
                moving = [p for p, until in self._held.items() if now < until]
            if due:
                extended = now
            if moving:
                self._ask(moving, queue.extend if due else queue.look)

    def _ask(self, moving: list[int], ask: Callable[..., Extended]) -> None:
        try:
            with transaction() as db:
                answer = ask(db, worker=self._worker, packs=moving)
        except FarmError as e:
            log.warning("could not extend the leases of packs %s: %s", moving, e)
            return
        except Exception:
            log.exception("could not extend the leases of packs %s", moving)
            return
        with self._lock:
            for pack in moving:
                if pack not in self._held:
                    continue
                if pack in answer.packs:
                    self._cancelled[pack] = answer.packs[pack]
                else:
                    self._lost.add(pack)
        self._priorities = answer.priorities or self._priorities
        self.heard += 1
        if answer.drain:
            self.drain.set()
