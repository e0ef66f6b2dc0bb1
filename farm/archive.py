"""Archives written as they are sent: ZIP and tar of files that are stored as they are, in bounded memory.

The standard library's zipfile keeps every entry in memory until its end, about 1 GB for a million; here the directory
waits in a temporary file. Sizes and sums are known before a file is sent, so no reader needs data descriptors.
"""

import re
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from enum import StrEnum
from typing import BinaryIO, Protocol

IN_MEMORY = 1 << 20  # bytes of a directory before it goes to a file
PIECE = 1 << 18
LIMIT_32, LIMIT_16 = 0xFFFFFFFF, 0xFFFF
UTF8 = 0x800
MAX_NAME = 120

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_NUMBERED = re.compile(r".*--[0-9]+|[0-9]{8}")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # Windows opens a device


class ArchiveFormat(StrEnum):
    ZIP = "zip"
    TAR = "tar"


def file_name(custom_id: str | None, index: int, extension: str) -> str:
    """A file's name made of what the account calls its frame; of the index, where it calls it nothing.

    What is not A-Z a-z 0-9 . _ - becomes _, and a name that had to be changed gets --index: names of a job stay unique.
    """
    if custom_id is None:
        return f"{index:08}.{extension}"
    safe = _UNSAFE.sub("_", custom_id).lstrip(".")[:MAX_NAME]
    if safe != custom_id or not safe or _NUMBERED.fullmatch(safe) or _RESERVED.fullmatch(safe):
        safe = f"{safe}--{index}"
    return f"{safe}.{extension}"


class Archive(Protocol):
    """An archive on its way: what add() and end() give is to be sent in that order."""

    def add(self, name: str, data: bytes, modified: datetime) -> Iterator[bytes]: ...

    def add_file(self, name: str, file: BinaryIO, modified: datetime) -> Iterator[bytes]: ...

    def end(self) -> Iterator[bytes]: ...

    def close(self) -> None: ...


class Zip:
    """A ZIP, with ZIP64 where it has to be."""

    def __init__(self) -> None:
        self._directory = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 - close() does
        self._offset = 0
        self._entries = 0

    def add(self, name: str, data: bytes, modified: datetime) -> Iterator[bytes]:
        yield self._head(name, len(data), zlib.crc32(data), modified) + data

    def add_file(self, name: str, file: BinaryIO, modified: datetime) -> Iterator[bytes]:
        size = crc = 0
        for piece in _pieces(file):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
        yield self._head(name, size, crc, modified)
        yield from _pieces(file)

    def _head(self, name: str, size: int, crc: int, modified: datetime) -> bytes:
        """The local header; the entry of the directory is kept for the end."""
        said, (date, time) = name.encode(), _dos(modified)
        large, far = size >= LIMIT_32, self._offset >= LIMIT_32
        sizes = (LIMIT_32, LIMIT_32) if large else (size, size)
        extra = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
        version = 45 if large or far else 20
        local = struct.pack(
            "<4s5H3I2H", b"PK\3\4", version, UTF8, 0, time, date, crc, *sizes, len(said), len(extra)
        )
        wide = struct.pack("<QQ", size, size) if large else b""
        wide += struct.pack("<Q", self._offset) if far else b""
        wide = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
        self._directory.write(
            struct.pack(
                "<4s6H3I5H2I", b"PK\1\2", 3 << 8 | version, version, UTF8, 0, time, date, crc, *sizes,
                len(said), len(wide), 0, 0, 0, 0o100644 << 16, LIMIT_32 if far else self._offset,
            )
            + said + wide
        )  # fmt: skip
        self._entries += 1
        self._offset += len(local) + len(said) + len(extra) + size
        return local + said + extra

    def end(self) -> Iterator[bytes]:
        size, start = self._directory.tell(), self._offset
        yield from _pieces(self._directory)
        tail = b""
        if self._entries >= LIMIT_16 or start >= LIMIT_32 or size >= LIMIT_32:
            tail = struct.pack(
                "<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, self._entries, self._entries, size, start
            )
            tail += struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
        entries = min(self._entries, LIMIT_16)
        yield tail + struct.pack(
            "<4s4H2IH", b"PK\5\6", 0, 0, entries, entries, min(size, LIMIT_32), min(start, LIMIT_32), 0
        )

    def close(self) -> None:
        self._directory.close()


class Tar:
    """A tar as POSIX has it (pax)."""

    def __init__(self) -> None:
        self._sent = 0

    def add(self, name: str, data: bytes, modified: datetime) -> Iterator[bytes]:
        yield self._head(name, len(data), modified) + data + b"\0" * self._pad(len(data))

    def add_file(self, name: str, file: BinaryIO, modified: datetime) -> Iterator[bytes]:
        size = file.seek(0, 2)
        yield self._head(name, size, modified)
        yield from _pieces(file)
        yield b"\0" * self._pad(size)

    def _head(self, name: str, size: int, modified: datetime) -> bytes:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mtime, entry.mode = size, int(modified.timestamp()), 0o644
        head = entry.tobuf(tarfile.PAX_FORMAT)
        self._sent += len(head) + size + self._pad(size)
        return head

    def _pad(self, size: int) -> int:
        return -size % tarfile.BLOCKSIZE

    def end(self) -> Iterator[bytes]:
        sent = self._sent + 2 * tarfile.BLOCKSIZE
        yield b"\0" * (2 * tarfile.BLOCKSIZE + -sent % tarfile.RECORDSIZE)

    def close(self) -> None:
        """Nothing is kept."""


def _pieces(file: BinaryIO | tempfile.SpooledTemporaryFile[bytes]) -> Iterable[bytes]:
    file.seek(0)
    while piece := file.read(PIECE):
        yield piece


def _dos(moment: datetime) -> tuple[int, int]:
    """Date and time as ZIP has them: from 1980 on, in steps of two seconds; ours are UTC."""
    at = max(moment.astimezone(UTC), datetime(1980, 1, 1, tzinfo=UTC))
    return (at.year - 1980) << 9 | at.month << 5 | at.day, at.hour << 11 | at.minute << 5 | at.second // 2
