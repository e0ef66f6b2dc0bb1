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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from uuid import UUID

from sqlalchemy.exc import IntegrityError

from farm import queue
from farm.catalog import Model
from farm.errors import Away, RenderFailed
from farm.queue import ClaimedFrame, ClaimedPack, StoredFrame
from farm.settings import settings
from farm.spec import CONTENT_TYPE, PRIORITIES, Format, Priority
from farm.storage import Store, image_key
from workers.books import book, book_directly
from workers.encode import encode, pixel_hash, provenance
from workers.engine import Pixels
from workers.leases import Leases
from workers.revived import Kept, Waiting, settle_revived

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


@dataclass(frozen=True, slots=True)
class _Item:
    """What settling is told of: one frame and its file, or that frames of a pack ended otherwise."""

    entry: _Open
    stored: StoredFrame | None = None
    data: bytes = b""


class Shelf:
    """Rendered packs on their way into the store and the books."""

    def __init__(
        self,
        store: Store,
        leases: Leases,
        *,
        reached: Callable[[str], None],
        drain: threading.Event,
        quit_now: threading.Event,
    ) -> None:
        self._store = store
        self._leases = leases
        self._reached = reached
        self._drain = drain
        self._quit = quit_now
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")
        self._stored: queues.SimpleQueue[_Item] = queues.SimpleQueue()
        self._room = threading.Condition()
        self._open: Counter[int] = Counter()  # pack id → how often it was put here and is not booked yet
        self._kept = 0  # of these, what waits until it may be stored: nobody waits for it
        self._gpu_ms: dict[int, int] = {}  # of the packs in _open
        self._waiting = Waiting(leases, again=self._store_again, back=self._give_back, drain=drain)
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
            store = partial(self._encode_and_put, entry, model, frame, pixels)
            self._encoders.submit(self._store_one, entry, frame.id, store)

    def note_time(self, pack_id: int, gpu_ms: int) -> None:
        """Note what a pack took on the device since it was put here: others of its frames did not get this far."""
        with self._room:
            if pack_id in self._gpu_ms:
                self._gpu_ms[pack_id] = gpu_ms

    def wait_for_room(self, packs: int) -> None:
        """Wait until packs were put here fewer times than this and are still on their way."""
        with self._room:
            self._room.wait_for(lambda: self._on_their_way() < packs)

    def is_full(self, packs: int) -> bool:
        """Whether wait_for_room() would wait."""
        with self._room:
            return self._on_their_way() >= packs

    def drain(self) -> None:
        """Wait until every pack is booked or given back; also what waits to be stored, if the worker drains."""
        self.wait_for_room(1)
        if self._drain.is_set():
            self._waiting.give_back()

    def _on_their_way(self) -> int:
        return self._open.total() - self._kept

    def _store_one(self, entry: _Open, frame: UUID, store: Callable[[], tuple[StoredFrame, bytes]]) -> None:
        item = _Item(entry)
        try:
            item = _Item(entry, *store())
        except GaveUp:
            self._release(entry.pack.id, frame)
        except Exception as e:
            log.exception("frame %s could not be stored", frame)
            self._fail(entry.pack.id, f"the image could not be stored: {type(e).__name__}: {e}", [frame])
        finally:  # whatever happened: a burst waits until its packs are off the shelf
            self._stored.put(item)

    def _fail_some(self, entry: _Open, bad: Sequence[tuple[ClaimedFrame, RenderFailed]]) -> None:
        try:
            for reason in sorted({str(r) for _, r in bad}):
                self._fail(entry.pack.id, reason, [f.id for f, r in bad if str(r) == reason])
        except Exception:
            log.exception("frames could not be failed; their lease runs out")
        finally:
            self._stored.put(_Item(entry))

    def _encode_and_put(
        self, entry: _Open, model: Model, frame: ClaimedFrame, pixels: Pixels
    ) -> tuple[StoredFrame, bytes]:
        data = encode(
            pixels,
            frame.spec.format,
            provenance(frame.spec, frame.seed, model, prompt=frame.prompt),
            quality=frame.spec.quality,
        )
        sha256 = hashlib.sha256(data).digest()
        key = image_key(frame.account_id, sha256, frame.spec.format)
        self._put(entry.pack.id, frame.id, key, data, CONTENT_TYPE[frame.spec.format])
        entry.stored += 1
        self._reached("half stored" if entry.stored < entry.left else "stored")
        height, width, _ = pixels.shape
        stored = StoredFrame(
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
        return stored, data

    def _put(self, pack: int, frame: UUID, key: str, data: bytes, content_type: str) -> None:
        while True:
            self._leases.progress(pack)
            try:
                return self._store.put(key, data, content_type=content_type)
            except Away as e:
                log.warning("store is away, keeping the image of frame %s: %s", frame, e)
                if self._quit.wait(RETRY_S) or self._leases.is_lost(pack):
                    raise GaveUp from e

    def _keep(self, kept: Kept) -> None:
        """Keep an image that was deleted a moment ago until it may be stored."""
        pack = kept.pack.id
        self._leases.hold(pack)
        took = self._took(pack)
        with self._room:
            self._open[pack] += 1
            self._kept += 1
        book(lambda db: queue.off_device(db, took), give_up=self._quit)
        if not self._waiting.add(kept):
            self._give_back(kept)

    def _store_again(self, kept: Kept, since: datetime) -> None:
        pack, stored = kept.pack.id, replace(kept.stored, since=since)

        def store() -> tuple[StoredFrame, bytes]:
            content_type = CONTENT_TYPE[Format(stored.format)]
            self._put(pack, stored.frame_id, stored.key, kept.data, content_type)
            return stored, kept.data

        with self._room:
            self._kept -= 1
        self._encoders.submit(self._store_one, _Open(kept.pack, 1), stored.frame_id, store)

    def _give_back(self, kept: Kept) -> None:
        try:
            self._release(kept.pack.id, kept.stored.frame_id)
        except Exception:
            log.exception("frame %s could not be given back; its lease runs out", kept.stored.frame_id)
        with self._room:
            self._kept -= 1
        self._close(_Open(kept.pack, 0))

    def _release(self, pack: int, frame: UUID) -> None:
        took = self._took(pack)
        book(lambda db: queue.release(db, [pack], frames=[frame], gpu_ms=took), give_up=self._quit)

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
            for item in batch:
                item.entry.left -= 1
                if item.entry.left == 0:
                    self._close(item.entry)

    def _is_last(self, batch: Sequence[_Item]) -> bool:
        """Nothing else is on its way: waiting for more would only delay these."""
        with self._room:
            entries_open = self._on_their_way()
        entries = {id(item.entry): item.entry for item in batch}
        return entries_open == len(entries) and sum(e.left for e in entries.values()) == len(batch)

    def _settle(self, batch: Sequence[_Item]) -> None:
        stored = [item.stored for item in batch if item.stored is not None]
        if not stored:
            return
        with self._room:
            packs = {item.entry.pack.id for item in batch}
            gpu_ms = {pack: self._gpu_ms[pack] for pack in packs}
        for pack_id in gpu_ms:
            self._leases.progress(pack_id)
        self._reached("before commit")
        refused: frozenset[str] = frozenset()
        try:
            settled = book_directly(
                lambda db: queue.settle(db, stored, gpu_ms=gpu_ms, commit=True), give_up=self._quit
            )
        except IntegrityError as e:  # an image of these was deleted once: or else it is raised again
            log.info("settling again with images that were deleted: %s", e.orig)
            done = book(lambda db: settle_revived(db, stored, gpu_ms=gpu_ms), give_up=self._quit)
            settled, refused = done or (None, refused)
        self._reached("after commit")
        if settled is None:
            return
        self.done += len(settled.done)
        early = [item for item in batch if item.stored is not None and item.stored.key in refused]
        for item in early:
            assert item.stored is not None
            self._keep(Kept(item.entry.pack, item.stored, item.data))
        if lost := len(stored) - len(early) - len(settled.done) - len(settled.cancelled):
            log.warning("%d frames had been lost to somebody else: not booked", lost)
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


def _is_urgent(item: _Item) -> bool:
    """Whether somebody waits for it: then more company is not worth the time."""
    return item.entry.pack.priority >= URGENT
