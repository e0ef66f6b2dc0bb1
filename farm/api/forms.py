"""multipart/form-data that was read as a whole: its parts, in order."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from farm.errors import Fault, Invalid

MAX_PARTS = 200


@dataclass(frozen=True, slots=True)
class Part:
    """One field: text, or a file with its name and the type it claims."""

    name: str
    data: bytes
    filename: str | None
    content_type: str

    @property
    def text(self) -> str:
        """Raises Invalid if it is none."""
        try:
            return self.data.decode()
        except UnicodeDecodeError:
            raise Invalid([Fault(self.name, None, "it must be text in UTF-8")]) from None


def is_form(content_type: str) -> bool:
    return content_type.lower().startswith("multipart/form-data")


def parts_of(body: bytes, content_type: str) -> list[Part]:
    """The parts of a form. Raises Invalid if it cannot be read."""
    if not is_form(content_type):
        raise Invalid([Fault("body", content_type[:100], "send multipart/form-data")])
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    found: list[tuple[dict[bytes, bytes], bytearray]] = []
    header: list[bytes] = [b"", b""]

    def on_part_begin() -> None:
        if len(found) == MAX_PARTS:
            raise Invalid([Fault("body", None, f"allowed are {MAX_PARTS} fields")])
        found.append(({}, bytearray()))

    def on_header_end() -> None:
        found[-1][0][header[0].lower()] = header[1]
        header[:] = [b"", b""]

    def into(place: int) -> Any:
        def add(data: bytes, start: int, end: int) -> None:
            header[place] += data[start:end]

        return add

    callbacks: Any = {
        "on_part_begin": on_part_begin,
        "on_part_data": lambda data, start, end: found[-1][1].extend(data[start:end]),
        "on_header_field": into(0),
        "on_header_value": into(1),
        "on_header_end": on_header_end,
    }
    try:
        parser = MultipartParser(boundary, callbacks)
        parser.write(body)
        parser.finalize()
    except MultipartParseError as e:
        raise Invalid([Fault("body", None, f"the form cannot be read: {e}")]) from None
    return [_part(headers, bytes(data)) for headers, data in found]


def _part(headers: dict[bytes, bytes], data: bytes) -> Part:
    options = parse_options_header(headers.get(b"content-disposition", b""))[1]
    name, filename = options.get(b"name", b""), options.get(b"filename")
    return Part(
        name.decode("utf-8", "replace").replace("\0", ""),
        data,
        None if filename is None else filename.decode("utf-8", "replace").replace("\0", ""),
        headers.get(b"content-type", b"").decode("latin-1"),
    )


def same(parts: list[Part]) -> bytes:
    """What equal forms have in common, whatever their boundaries: to compare a repeat by."""
    return b"\n".join(p.name.encode() + b"=" + sha256(p.data).digest() for p in parts)


def digest(parts: list[Part]) -> bytes:
    return sha256(same(parts)).digest()
