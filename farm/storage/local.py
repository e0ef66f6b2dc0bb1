"""Images in a folder: the store of one machine, or of several that share a file system."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import SplitResult, unquote
from uuid import uuid4

from farm.errors import Misconfigured, NotFound, StorageAway
from farm.storage import (
    ALLOWED,
    LEFTOVER_AGE,
    SETTING,
    Finding,
    Stored,
    check_hash,
    check_key,
    check_prefix,
    is_key,
    prove,
)

LITTLE_BYTES = 1 << 30

# no retry helps: somebody has to change the folder, its rights or its mount
_PERMANENT = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


class LocalStore:
    """A folder. An object appears whole or not at all: it is written beside, synced, then renamed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._temporary = root / ".tmp"  # the same file system, and no key starts with a dot
        self._synced: set[Path] = set()  # folders whose own entries are known to be on disk

    @classmethod
    def from_url(cls, parts: SplitResult) -> "LocalStore":
        path = unquote(parts.path)
        if parts.netloc not in {"", "localhost"}:
            raise Misconfigured(f"{SETTING} needs three slashes: file:///folder.", allowed=ALLOWED)
        if parts.query or parts.fragment:
            raise Misconfigured(f"{SETTING}: write ? as %3F and # as %23.", allowed=ALLOWED)
        if not path.strip("/") or "\0" in path or not path.startswith("/"):
            raise Misconfigured(f"{SETTING} names no folder.", allowed=ALLOWED)
        return cls(Path(path))

    def put(self, key: str, data: bytes, *, content_type: str) -> None:
        target = self._root / check_key(key)
        temporary = self._temporary / uuid4().hex
        with self._reported(key):
            self._make_folder(self._temporary)
            self._make_folder(target.parent)
            try:
                _write(temporary, data)
                # also when it exists already: a fresh time keeps the orphan sweep away from it
                os.replace(temporary, target)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
            _sync(target.parent)

    def get(self, key: str) -> bytes:
        path = self._root / check_key(key)
        with self._reported(key):
            try:
                data = path.read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise NotFound(key=key) from None
        return check_hash(key, data)

    def delete(self, key: str) -> None:
        path = self._root / check_key(key)
        with self._reported(key), suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path.unlink()

    def list(self, prefix: str = "") -> Iterator[Stored]:
        check_prefix(prefix)
        self._clear_temporary()
        return self._walk(self._root, prefix)

    def url(self, key: str, *, expires_s: int, content_type: str, filename: str) -> str | None:
        check_key(key)
        return None

    def clear_leftovers(self) -> int:
        return self._clear_temporary()

    def check(self) -> None:
        self._clear_temporary()
        prove(self)

    def extras(self, key: str, data: bytes) -> Iterator[Finding]:
        yield Finding("conditional write", "unneeded", "a key holds its bytes' hash")
        yield Finding("signed URLs", "ok", "the API signs and serves them: /v1/files/…")
        yield Finding("versions", "unneeded", "a folder keeps one")
        free = shutil.disk_usage(self._root).free
        yield Finding("room", "ok" if free > LITTLE_BYTES else "no", f"{free / 2**30:.1f} GiB free")

    def _walk(self, folder: Path, prefix: str) -> Iterator[Stored]:
        with self._reported(prefix), suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:  # not sorted: a folder may hold a million
                key = Path(entry.path).relative_to(self._root).as_posix()
                if not is_key(key):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                        yield from self._walk(Path(entry.path), prefix)
                elif key.startswith(prefix) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):  # removed meanwhile
                        stat = entry.stat(follow_symlinks=False)
                        yield Stored(key, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))

    def _clear_temporary(self) -> int:
        """Remove what processes that died while writing left behind."""
        cleared = 0
        before = time.time() - LEFTOVER_AGE.total_seconds()
        with self._reported(".tmp"), suppress(FileNotFoundError), os.scandir(self._temporary) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process clears too
                    if entry.stat(follow_symlinks=False).st_mtime < before:
                        os.unlink(entry.path)
                        cleared += 1
        return cleared

    def _make_folder(self, folder: Path) -> None:
        """Make the folder durable: a synced file in a folder that a power cut takes away is lost too."""
        if folder in self._synced and folder.is_dir():
            return
        missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
        for path in reversed(missing):
            with suppress(FileExistsError):  # another thread or process was faster
                path.mkdir()
                path.chmod(0o750)
        inside = [path for path in (folder, *folder.parents) if path.is_relative_to(self._root)]
        for path in {*inside, *(path.parent for path in missing)}:
            _sync(path)
        self._synced.add(folder)

    @contextmanager
    def _reported(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            facts = {"folder": str(self._root), "key": key, "why": error.strerror or type(error).__name__}
            if error.errno in _PERMANENT:
                raise Misconfigured(
                    f"The folder of {SETTING} cannot be used.", setting=SETTING, **facts
                ) from error
            raise StorageAway(**facts) from error


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
    with open(fd, "wb") as file:
        os.fchmod(fd, 0o640)  # whatever the umask: the API may run as another user of the group
        file.write(data)
        file.flush()
        os.fsync(fd)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
