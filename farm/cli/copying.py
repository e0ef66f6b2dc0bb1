"""Copying a job's images to a folder or a bucket: some at a time, what is there already not again."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from farm.answers import ManifestLine
from farm.cli.jobs import write
from farm.client import Farm
from farm.errors import Damaged, Fault, Gone, Invalid, Misconfigured
from farm.outputs import COLUMNS, MANIFEST, as_csv

AT_ONCE = 8  # images on their way
TRIES = 3  # of an image that does not have the hash the farm says
OPEN_ROW = 2000  # frames in a row that are not done: those behind them are later still
OPEN = ("queued", "claimed", "waiting", "staged")
FIRST_LOOK_S, LAST_LOOK_S = 1.0, 10.0


class Place(Protocol):
    """Where images go."""

    name: str

    def has(self, line: ManifestLine) -> bool:
        """Whether the image of this line is there, whole."""

    def put(self, line: ManifestLine, data: bytes) -> None: ...

    def end(self, lines: Iterable[ManifestLine]) -> None:
        """Write the manifest of all."""


class Folder:
    """A folder on this machine. What is there counts if it has the right hash."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._path, self.name = path, str(path)

    def has(self, line: ManifestLine) -> bool:
        path = self._path / (line.file or "")
        try:
            if path.stat().st_size != line.bytes:
                return False
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == line.sha256
        except FileNotFoundError:
            return False

    def put(self, line: ManifestLine, data: bytes) -> None:
        write(self._path / (line.file or ""), data)

    def end(self, lines: Iterable[ManifestLine]) -> None:
        new = self._path / f"{MANIFEST}.new"
        with new.open("w", newline="") as file:
            file.writelines(lines_as_csv(lines))
        new.replace(self._path / MANIFEST)


class Bucket:
    """A bucket, or a folder as file:///, under the job's id. A frame's image never changes: name and size do."""

    def __init__(self, url: str, job_id: str) -> None:
        from farm.storage import open_store

        try:
            self._store = open_store(url)
        except Misconfigured as e:
            said = e.detail.replace("FARM_STORAGE_URL", "it")
            raise Invalid([Fault("TO", None, f"{said} Allowed: {e.facts['allowed']}")]) from None
        self._job, self.name = job_id, url.partition("?")[0].rstrip("/") + f"/{job_id}"
        self._there = {found.key: found.size_bytes for found in self._store.list(f"{job_id}/")}

    def has(self, line: ManifestLine) -> bool:
        return self._there.get(self._key(line)) == line.bytes

    def put(self, line: ManifestLine, data: bytes) -> None:
        content_type = line.content_type or "application/octet-stream"
        self._store.put(self._key(line), data, content_type=content_type)
        self._there[self._key(line)] = len(data)

    def _key(self, line: ManifestLine) -> str:
        return f"{self._job}/{line.file}"

    def end(self, lines: Iterable[ManifestLine]) -> None:
        data = "".join(lines_as_csv(lines)).encode()
        self._store.put(f"{self._job}/{MANIFEST}", data, content_type="text/csv; charset=utf-8")


def lines_as_csv(lines: Iterable[ManifestLine]) -> Iterator[str]:
    yield as_csv([COLUMNS])
    for line in lines:
        yield as_csv([[getattr(line, name) for name in COLUMNS]])


# ------------------------------------------------------------------------------------------------ copying


@dataclass
class Copying:
    """Images of one job on their way to a place, some at a time."""

    farm: Farm
    job_id: str
    place: Place
    tell: Callable[[], None] = lambda: None
    copied: int = 0
    there: int = 0
    bytes: int = 0
    wrong: list[str] = field(default_factory=list)
    lowest_open: int = 0  # every frame before it is seen to
    seen: set[int] = field(default_factory=set)  # and these

    def run(self, *, watch: bool) -> None:
        """Copy what is done; with watch, go on until the job has ended."""
        wait_s = FIRST_LOOK_S
        with ThreadPoolExecutor(AT_ONCE) as threads:
            while True:
                ended = not watch or self.farm.job(self.job_id).ended_at is not None
                before = self.copied
                self._pass(threads, whole=ended)
                if ended:
                    return
                wait_s = FIRST_LOOK_S if self.copied > before else min(LAST_LOOK_S, wait_s * 1.5)
                time.sleep(wait_s)

    def _pass(self, threads: ThreadPoolExecutor, *, whole: bool) -> None:
        """Look at the frames that were not done yet. whole: at all of them, however many are not."""
        moving: deque[tuple[ManifestLine, Future[int]]] = deque()
        lowest, last, in_a_row = None, self.lowest_open - 1, 0
        for line in self.farm.manifest(self.job_id, after=last if last >= 0 else None):
            last, in_a_row = line.index, 0 if line.url else in_a_row + 1
            if line.index in self.seen:
                continue
            if line.url:
                self.seen.add(line.index)
                moving.append((line, threads.submit(self._move, line)))
            elif lowest is None and line.status in OPEN:
                lowest = line.index
            while len(moving) > 2 * AT_ONCE:
                self._note(*moving.popleft())
            if not whole and in_a_row >= OPEN_ROW:
                break
        while moving:
            self._note(*moving.popleft())
        self.lowest_open = last + 1 if lowest is None else lowest
        self.seen = {index for index in self.seen if index > self.lowest_open}

    def _move(self, line: ManifestLine) -> int:
        """Copy one image unless it is there. Returns its bytes, 0 if it was."""
        if self.place.has(line):
            return 0
        for tries_left in reversed(range(TRIES)):
            data = self.farm.image(self.job_id, line.index)
            if hashlib.sha256(data).hexdigest() == line.sha256:
                break
            if not tries_left:
                raise Damaged(f"{line.file} came with another hash than the farm says", index=line.index)
        self.place.put(line, data)
        return len(data)

    def _note(self, line: ManifestLine, moving: Future[int]) -> None:
        try:
            size = moving.result()
        except (Gone, Damaged) as e:  # of this image alone; what else fails, fails for all
            self.wrong.append(f"{line.index}: {e.detail or e.title}")
            return
        self.copied, self.there = self.copied + (size > 0), self.there + (size == 0)
        self.bytes += size
        self.tell()
