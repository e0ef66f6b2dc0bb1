"""What follows the device: encode, store, settle, off its thread, while the next pack is on it.

An image is stored before it is booked, under a key that holds its hash; what is booked is decided by the
fence in the database. A store or a database that is away is waited for: the images are kept, nothing is
rendered twice, and no further pack is claimed meanwhile.
"""

import hashlib
import logging
import queue as queues
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from farm import queue, retention
from farm.catalog import Model
from farm.errors import Away, RenderFailed
from farm.queue import ClaimedFrame, ClaimedPack, Settled, StoredFrame
from farm.settings import settings
from farm.spec import CONTENT_TYPE, PRIORITIES, Priority
from farm.storage import Store, image_key
from workers.books import book, book_directly
from workers.encode import encode, pixel_hash, provenance
from workers.engine import Pixels
from workers.leases import Leases

log = logging.getLogger(__name__)

RETRY_S = 1.0
ENCODERS = 2
URGENT = PRIORITIES[Priority.URGENT]


class GaveUp(Exception):
    """The worker stops, or the pack is somebody else's: what is not stored yet goes back."""


@dataclass(slots=True)
class _Open:
    """Rendered frames of a pack, on their way."""

    pack: ClaimedPack
    left: int  # not yet booked
    stored: int = 0


def settle_revived(db: Session, stored: Sequence[StoredFrame], *, gpu_ms: Mapping[int, int]) -> Settled:
    """Settle frames among whose images are some that were deleted once.

    What is certainly in the store anew is booked; the rest is given back, and rendered again.
    """
    facts = [
        {
            "key": s.key,
            "pack_id": s.pack_id,
            "pixel_sha256": s.pixel_sha256.hex(),
            "bytes": s.bytes,
            "width": s.width,
            "height": s.height,
        }
        for s in stored
    ]
    revived = retention.revive(db, facts)
    settled = queue.settle(db, [s for s in stored if s.key not in revived.refused], gpu_ms=gpu_ms)
    retention.bury(db, revived.images)  # those of frames that the fence left out
    if back := [s for s in stored if s.key in revived.refused]:
        packs = sorted({s.pack_id for s in back})
        queue.release(db, packs, frames=[s.frame_id for s in back], gpu_ms=gpu_ms)
    return settled


class Shelf:
    """Rendered packs on their way into the store and the books."""

    def __init__(
        self, store: Store, leases: Leases, *, reached: Callable[[str], None], quit_now: threading.Event
    ) -> None:
        self._store = store
        self._leases = leases
        self._reached = reached
        self._quit = quit_now
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")
        self._stored: queues.SimpleQueue[tuple[_Open, StoredFrame | None]] = queues.SimpleQueue()
        self._room = threading.Condition()
        self._open: Counter[int] = Counter()  # pack id → how often it was put here and is not booked yet
        self._gpu_ms: dict[int, int] = {}  # of the packs in _open
        self.done = 0
        threading.Thread(target=self._settle_all, name="settle", daemon=True).start()

    def put(
        self,
        pack: ClaimedPack,
        model: Model,
        frames: Sequence[ClaimedFrame],
        results: Sequence[Pixels | RenderFailed],
        *,
        gpu_ms: int,
    ) -> None:
        """Take over rendered frames; returns at once. gpu_ms: what their pack took on the device so far."""
        good = [(f, r) for f, r in zip(frames, results, strict=True) if not isinstance(r, RenderFailed)]
        bad = [(f, r) for f, r in zip(frames, results, strict=True) if isinstance(r, RenderFailed)]
        entry = _Open(pack, len(good) + bool(bad))
        if not frames:
            return
        self._leases.hold(pack.id)
        with self._room:
            self._open[pack.id] += 1
            self._gpu_ms[pack.id] = gpu_ms
        if bad:
            self._encoders.submit(self._fail_some, entry, bad)
        for frame, pixels in good:
            self._encoders.submit(self._store_one, entry, model, frame, pixels)

    def note_time(self, pack_id: int, gpu_ms: int) -> None:
        """Note what a pack took on the device since it was put here: others of its frames did not get this far."""
        with self._room:
            if pack_id in self._gpu_ms:
                self._gpu_ms[pack_id] = gpu_ms

    def wait_for_room(self, packs: int) -> None:
        """Wait until packs were put here fewer times than this and are still on their way."""
        with self._room:
            self._room.wait_for(lambda: self._open.total() < packs)

    def is_full(self, packs: int) -> bool:
        """Whether wait_for_room() would wait."""
        with self._room:
            return self._open.total() >= packs

    def drain(self) -> None:
        """Wait until every pack is booked or given back."""
        self.wait_for_room(1)

    def _store_one(self, entry: _Open, model: Model, frame: ClaimedFrame, pixels: Pixels) -> None:
        stored = None
        try:
            stored = self._encode_and_put(entry, model, frame, pixels)
        except GaveUp:
            took = self._took(entry.pack.id)
            book(
                lambda db: queue.release(db, [entry.pack.id], frames=[frame.id], gpu_ms=took),
                give_up=self._quit,
            )
        except Exception as e:
            log.exception("frame %s could not be stored", frame.id)
            self._fail(entry.pack.id, f"the image could not be stored: {type(e).__name__}: {e}", [frame.id])
        finally:  # whatever happened: a burst waits until its packs are off the shelf
            self._stored.put((entry, stored))

    def _fail_some(self, entry: _Open, bad: Sequence[tuple[ClaimedFrame, RenderFailed]]) -> None:
        try:
            for reason in sorted({str(r) for _, r in bad}):
                self._fail(entry.pack.id, reason, [f.id for f, r in bad if str(r) == reason])
        except Exception:
            log.exception("frames could not be failed; their lease runs out")
        finally:
            self._stored.put((entry, None))

    def _encode_and_put(self, entry: _Open, model: Model, frame: ClaimedFrame, pixels: Pixels) -> StoredFrame:
        data = encode(
            pixels,
            frame.spec.format,
            provenance(frame.spec, frame.seed, model, prompt=frame.prompt),
            quality=frame.spec.quality,
        )
        sha256 = hashlib.sha256(data).digest()
        key = image_key(frame.account_id, sha256, frame.spec.format)
        while True:
            self._leases.progress(entry.pack.id)
            try:
                self._store.put(key, data, content_type=CONTENT_TYPE[frame.spec.format])
                break
            except Away as e:
                log.warning("store is away, keeping the image of frame %s: %s", frame.id, e)
                if self._quit.wait(RETRY_S) or self._leases.is_lost(entry.pack.id):
                    raise GaveUp from e
        entry.stored += 1
        self._reached("half stored" if entry.stored < entry.left else "stored")
        height, width, _ = pixels.shape
        return StoredFrame(
            frame_id=frame.id,
            job_id=frame.job_id,
            pack_id=entry.pack.id,
            key=key,
            format=frame.spec.format.value,
            sha256=sha256,
            pixel_sha256=pixel_hash(pixels),
            bytes=len(data),
            width=width,
            height=height,
            prompt=frame.prompt,
        )

    def _fail(self, pack_id: int, reason: str, frames: Sequence[UUID]) -> None:
        took = self._took(pack_id)
        book(lambda db: queue.fail(db, pack_id, reason, frames=frames, gpu_ms=took), give_up=self._quit)

    def _took(self, pack_id: int) -> dict[int, int]:
        """What a pack took on the device: written down if these were its last frames."""
        with self._room:
            return {pack_id: self._gpu_ms[pack_id]}

    def _settle_all(self) -> None:
        """Settle what was stored since the last time: 16 frames or what 200 ms brought; an urgent one at once.

        What came while the last ones were settled comes along: most of what settling costs, it costs once a time.
        """
        while True:
            batch = [self._stored.get()]
            until = time.monotonic() + settings().settle_ms / 1000
            while len(batch) < settings().settle_at_once:
                enough = (
                    len(batch) >= settings().settle_frames or self._is_last(batch) or _is_urgent(batch[-1])
                )
                try:
                    batch.append(
                        self._stored.get(timeout=0.0 if enough else max(0.0, until - time.monotonic()))
                    )
                except queues.Empty:
                    break
            try:
                self._settle(batch)
            except Exception:
                log.exception("frames could not be settled; their lease runs out and they are rendered again")
            for entry, _ in batch:
                entry.left -= 1
                if entry.left == 0:
                    self._close(entry)

    def _is_last(self, batch: Sequence[tuple[_Open, StoredFrame | None]]) -> bool:
        """Nothing else is on its way: waiting for more would only delay these."""
        with self._room:
            entries_open = self._open.total()
        entries = {id(e): e for e, _ in batch}
        return entries_open == len(entries) and sum(e.left for e in entries.values()) == len(batch)

    def _settle(self, batch: Sequence[tuple[_Open, StoredFrame | None]]) -> None:
        stored = [s for _, s in batch if s is not None]
        if not stored:
            return
        with self._room:
            gpu_ms = {e.pack.id: self._gpu_ms[e.pack.id] for e, _ in batch}
        for pack_id in gpu_ms:
            self._leases.progress(pack_id)
        self._reached("before commit")
        try:
            settled = book_directly(lambda db: queue.settle(db, stored, gpu_ms=gpu_ms), give_up=self._quit)
        except IntegrityError as e:  # an image of these was deleted once: or else it is raised again
            log.info("settling again with images that were deleted: %s", e.orig)
            settled = book(lambda db: settle_revived(db, stored, gpu_ms=gpu_ms), give_up=self._quit)
        self._reached("after commit")
        if settled is None:
            return
        self.done += len(settled.done)
        if refused := len(stored) - len(settled.done) - len(settled.cancelled):
            log.warning("%d frames had been lost to somebody else: not booked", refused)
        if settled.over:
            book(lambda db: queue.finish(db, sorted(settled.over)), give_up=self._quit)

    def _close(self, entry: _Open) -> None:
        self._leases.drop(entry.pack.id)
        pack = entry.pack.id
        with self._room:
            self._open[pack] -= 1
            if not self._open[pack]:
                del self._open[pack], self._gpu_ms[pack]
            self._room.notify_all()


def _is_urgent(item: tuple[_Open, StoredFrame | None]) -> bool:
    """Whether somebody waits for it: then more company is not worth the time."""
    return item[0].pack.priority >= URGENT
