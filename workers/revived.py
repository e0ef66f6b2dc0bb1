"""Images that were deleted a moment ago, and were rendered again since: see farm/retention.py.

A delete that is still under way could take the file. So the image is kept until none can be, and stored anew then:
it holds up neither the device nor what is settled beside it, and its lease is kept meanwhile.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from farm import queue, retention
from farm.db import transaction
from farm.errors import DatabaseAway
from farm.queue import ClaimedPack, Settled, StoredFrame
from workers.leases import Leases

log = logging.getLogger(__name__)

LOOK_S = 1.0
MOST_BYTES = 256 << 20  # files in memory; beyond that a frame goes back, and is rendered again


@dataclass(frozen=True, slots=True)
class Kept:
    """A rendered frame whose file may not be booked yet, and the file."""

    pack: ClaimedPack
    stored: StoredFrame
    data: bytes


def settle_revived(
    db: Session, stored: Sequence[StoredFrame], *, gpu_ms: Mapping[int, int]
) -> tuple[Settled, frozenset[str]]:
    """Settle frames among whose images are some that were deleted once. Returns also the keys left out.

    What is certainly in the store anew is booked; frames of the other keys stay the worker's.
    """
    facts = [
        {
            "key": s.key,
            "pack_id": s.pack_id,
            "pixel_sha256": s.pixel_sha256.hex(),
            "bytes": s.bytes,
            "width": s.width,
            "height": s.height,
            "since": s.since and s.since.isoformat(),
        }
        for s in stored
    ]
    revived = retention.revive(db, facts)
    settled = queue.settle(db, [s for s in stored if s.key not in revived.refused], gpu_ms=gpu_ms)
    retention.bury(db, revived.images)  # those of frames that the fence left out
    return settled, revived.refused


class Waiting:
    """Images that wait until they may be stored; given back when the worker drains.

    again: store it now, and book it as stored after that time of the database. back: queue its frame again.
    """

    def __init__(
        self,
        leases: Leases,
        *,
        again: Callable[[Kept, datetime], None],
        back: Callable[[Kept], None],
        drain: threading.Event,
    ) -> None:
        self._leases = leases
        self._again = again
        self._back = back
        self._drain = drain
        self._lock = threading.Lock()
        self._kept: list[Kept] = []
        threading.Thread(target=self._run, name="revived", daemon=True).start()

    def add(self, kept: Kept) -> bool:
        """Keep an image; False if the worker drains, or has too many."""
        with self._lock:
            size_bytes = sum(len(k.data) for k in self._kept)
            if self._drain.is_set() or size_bytes + len(kept.data) > MOST_BYTES:
                return False
            self._kept.append(kept)
            return True

    def give_back(self) -> None:
        """Queue the frames of all that waits; over when this returns, whoever began it."""
        with self._lock:
            while self._kept:
                self._back(self._kept.pop())

    def _run(self) -> None:
        while not self._drain.wait(LOOK_S):
            try:
                self._look()
            except DatabaseAway as e:
                log.warning("%s", e)
            except Exception:
                log.exception("images that wait to be stored could not be looked at")
        self.give_back()

    def _look(self) -> None:
        with self._lock:
            kept = list(self._kept)
        if not kept:
            return
        for k in kept:
            self._leases.progress(k.pack.id)
        with transaction() as db:
            now, ready = retention.past_margin(db, sorted({k.stored.key for k in kept}))
        with self._lock:
            for k in [k for k in kept if k in self._kept]:
                unwanted = self._is_unwanted(k)
                if unwanted or k.stored.key in ready:
                    self._kept.remove(k)
                    if unwanted:
                        self._back(k)
                    else:
                        self._again(k, now)

    def _is_unwanted(self, kept: Kept) -> bool:
        pack = kept.pack.id
        return self._leases.is_lost(pack) or kept.stored.frame_id in self._leases.cancelled(pack)
