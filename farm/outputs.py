"""What comes out of a job: a line for each frame, and archives of its images.

Jobs of a million frames are read a page at a time, each in a transaction of its own: whoever takes the lines slowly
holds no connection meanwhile.
"""

import csv
import io
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any, BinaryIO, cast
from uuid import UUID

from sqlalchemy.orm import Session

from farm import archive, ids, pricing
from farm.archive import ArchiveFormat
from farm.db import hot, transaction
from farm.errors import Damaged, NotFound
from farm.spec import CONTENT_TYPE, Format
from farm.storage import Store

PAGE = 1000
AHEAD = 8  # images of an archive that are read before they are sent
READERS = 8  # threads that read them, of all archives of this process
MANIFEST = "manifest.csv"
COLUMNS = (
    "index", "custom_id", "frame", "status", "file", "url", "sha256", "bytes", "width", "height", "content_type",
    "seed", "model", "cost", "currency", "reason",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Output:
    """A frame as a manifest shows it. key: of its image in the store, while it is kept; cost: None if not done."""

    id: UUID
    index: int
    custom_id: str | None
    status: str
    key: str | None
    format: str | None
    sha256: str | None
    bytes: int | None
    width: int | None
    height: int | None
    seed: int
    model: str
    cost: str | None
    reason: str | None
    ended_at: datetime | None

    @property
    def file(self) -> str | None:
        """What its image is called in archives and folders."""
        return self.format and archive.file_name(self.custom_id, self.index, self.format)

    @property
    def content_type(self) -> str | None:
        return self.format and CONTENT_TYPE[Format(self.format)]


def page(db: Session, job_id: UUID, *, after: int = -1, limit: int = PAGE) -> list[Output]:
    """The job's frames after an index, in order. Find the job first: this looks at no account."""
    last = ids.frame_id(job_id, after)
    return [_output(r) for r in hot(db, "manifest", {"job": job_id, "after": last, "n": limit})]


def _output(row: Any) -> Output:
    return Output(
        id=row.id, index=row.index, custom_id=row.custom_id, status=row.status, key=row.key, format=row.format,
        sha256=row.sha256 and row.sha256.hex(), bytes=row.bytes, width=row.width, height=row.height, seed=row.seed,
        model=row.model, cost=None if row.amount is None else pricing.shown(row.amount), reason=row.reason,
        ended_at=row.ended_at,
    )  # fmt: skip


def pages(job_id: UUID, *, after: int = -1, limit: int | None = None) -> Iterator[list[Output]]:
    """The job's frames after an index, all of them or so many, a page at a time."""
    left = ids.MAX_FRAMES if limit is None else limit
    while left > 0:
        with transaction() as db:
            found = page(db, job_id, after=after, limit=min(PAGE, left))
        if found:
            yield found
        if len(found) < min(PAGE, left):
            return
        after, left = found[-1].index, left - len(found)


def as_csv(rows: Iterable[Iterable[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------ archives


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, thread_name_prefix="archive")


def archived(
    job_id: UUID,
    form: ArchiveFormat,
    *,
    store: Store,
    described: Callable[[Output, str | None], Iterable[Any]],
    after: int = -1,
) -> Iterator[bytes]:
    """An archive of the images there are, and at its end a manifest of all frames; some bytes at a time.

    described: a frame's line of the manifest, given what is wrong with its image, if anything is.
    Raises StorageAway in the middle: what was sent is cut off then.
    """
    waiting: list[bytes] = []
    size = 0
    for piece in _archived(job_id, form, store, described, after):
        waiting.append(piece)
        size += len(piece)
        if size >= archive.PIECE:  # each piece sent takes a turn of a thread
            yield b"".join(waiting)
            waiting, size = [], 0
    yield b"".join(waiting)


def _archived(
    job_id: UUID,
    form: ArchiveFormat,
    store: Store,
    described: Callable[[Output, str | None], Iterable[Any]],
    after: int,
) -> Iterator[bytes]:
    made = archive.Zip() if form is ArchiveFormat.ZIP else archive.Tar()
    try:
        with tempfile.SpooledTemporaryFile(archive.IN_MEMORY) as lines:
            lines.write(as_csv([COLUMNS]).encode())
            for output, data, problem in _read(job_id, store, after):
                lines.write(as_csv([described(output, problem)]).encode())
                if data is not None:
                    yield from made.add(output.file or "", data, output.ended_at or datetime.now(UTC))
            yield from made.add_file(MANIFEST, cast(BinaryIO, lines), datetime.now(UTC))
        yield from made.end()
    finally:
        made.close()


def _read(job_id: UUID, store: Store, after: int) -> Iterator[tuple[Output, bytes | None, str | None]]:
    """Each frame with its image's bytes, some of them read ahead; or what is wrong with it."""
    ahead: deque[tuple[Output, Future[bytes] | None]] = deque()
    try:
        for found in pages(job_id, after=after):
            for output in found:
                reading = _readers().submit(store.get, output.key) if output.key else None
                ahead.append((output, reading))
                while len(ahead) > AHEAD:
                    yield _finished(*ahead.popleft())
        while ahead:
            yield _finished(*ahead.popleft())
    finally:
        for _, reading in ahead:
            if reading is not None:
                reading.cancel()


def _finished(output: Output, reading: Future[bytes] | None) -> tuple[Output, bytes | None, str | None]:
    if reading is None:
        return output, None, None
    try:
        return output, reading.result(), None
    except NotFound:
        return output, None, "the stored file is gone"
    except Damaged:
        return output, None, "the stored file is damaged"
