"""Pixels into files, with what made them inside: PNG keeps it as iTXt, WebP and JPEG as XMP.

Nothing here names a frame or a job: equal pixels with equal metadata are one file, stored once.
Runs on CPU threads beside the GPU; Pillow releases the GIL while it compresses.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from typing import Any, assert_never
from xml.etree import ElementTree as ET
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo, iTXt

from farm.catalog import Model
from farm.spec import SOMETIMES, UNSEEN, Format, Spec

# CPU time and size of one 1024² photo-like image, 2 cores, Pillow 13.0, zlib 1.2.13, 2026:
#   PNG   level 6          125 ms  2267 KiB     level 1  101 ms  2337 KiB
#         Z_RLE             66 ms  2266 KiB     filtered rows have runs, not matches: searching finds nothing
#   WebP  90, method 4     124 ms   445 KiB     method 2  67 ms   442 KiB; lossless is the default: pixels stay pixels
#   JPEG  92                 4 ms   509 KiB
_SAVE: dict[Format, dict[str, Any]] = {
    Format.PNG: {"format": "PNG", "compress_type": zlib.Z_RLE},
    # lossless, it takes quality for effort
    Format.WEBP: {"format": "WEBP", "lossless": True, "quality": 0, "method": 1},
    Format.JPEG: {"format": "JPEG", "quality": 92},
}
_WITH_QUALITY: dict[Format, dict[str, Any]] = {
    Format.WEBP: {"format": "WEBP", "method": 2},
    Format.JPEG: {"format": "JPEG"},
}
_NAMESPACE = "https://image-farm.invalid/1/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_NOT_XML = re.compile(r"[\\\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # and the escape itself
_ESCAPED = re.compile(r"\\([0-9a-f]{4})")


def encode(
    pixels: NDArray[np.uint8], fmt: Format, metadata: Mapping[str, str], *, quality: int | None = None
) -> bytes:
    """Encode RGB pixels, shape (height, width, 3), with metadata inside. Keys are ASCII names.

    quality: of JPEG, and of WebP, which is lossless without; PNG has none.
    """
    out = BytesIO()
    how = _SAVE[fmt]
    if quality is not None and fmt in _WITH_QUALITY:
        how = {**_WITH_QUALITY[fmt], "quality": quality}
    Image.fromarray(pixels).save(out, **how, **_embedded(fmt, metadata))
    return out.getvalue()


def read_metadata(data: bytes) -> dict[str, str]:
    """Read what encode() put inside; empty if there is nothing."""
    with Image.open(BytesIO(data), formats=("PNG", "WEBP", "JPEG")) as image:
        if image.format == "PNG":
            return {str(k): str(v) for k, v in image.info.items() if isinstance(v, iTXt)}
        return _from_xmp(image.info.get("xmp", b""))


def pixel_hash(pixels: NDArray[np.uint8]) -> bytes:
    """Hash the pixels, whatever file they end up in: SHA-256 of shape and raw bytes."""
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def provenance(spec: Spec, seed: int, model: Model, *, prompt: bool = False) -> dict[str, str]:
    """State what makes an image again; the prompts only when asked, since images get passed on."""
    facts = {
        "model": model.name,
        "revision": model.revision,
        "dtype": model.precision,
        "width": str(spec.width),
        "height": str(spec.height),
        "steps": str(spec.steps),
        "guidance": f"{spec.guidance:g}",
        "sampler": spec.sampler,
        "seed": str(seed),
        "engine": engine_version(),
        **_made_from(spec),
    }
    if prompt:
        facts |= {"prompt": spec.prompt, "negative_prompt": spec.negative_prompt}
    return facts


def _made_from(spec: Spec) -> dict[str, str]:
    """What a spec asks for beside text: files by their hashes."""
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in spec.to_json().items()
        if name in SOMETIMES and name not in ("quality", *UNSEEN)
    }


@cache
def versions() -> Mapping[str, str]:
    """What renders here, without importing it."""
    return {name.removeprefix("image-"): _version(name) for name in ("image-farm", "diffusers", "torch")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout that was not installed
        return "0"


def engine_version() -> str:
    return ", ".join(f"{name} {number}" for name, number in versions().items())


def engine_of(model: Model) -> dict[str, str]:
    """What renders a model here: versions, and which checkpoint. A pack keeps it."""
    return {**versions(), "revision": model.revision, "dtype": model.precision}


def _embedded(fmt: Format, metadata: Mapping[str, str]) -> dict[str, Any]:
    match fmt:
        case Format.PNG:
            info = PngInfo()
            for key, value in metadata.items():
                info.add_itxt(key, value)
            return {"pnginfo": info}
        case Format.WEBP | Format.JPEG:
            return {"xmp": _xmp(metadata)}
        case _:
            assert_never(fmt)


def _xmp(metadata: Mapping[str, str]) -> bytes:
    facts = " ".join(f"farm:{key}={quoteattr(_escape(value))}" for key, value in metadata.items())
    return (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{_RDF}">'
        f'<rdf:Description rdf:about="" xmlns:farm="{_NAMESPACE}" {facts}/></rdf:RDF></x:xmpmeta>'
    ).encode()


def _from_xmp(xmp: bytes) -> dict[str, str]:
    if not xmp or b"<!" in xmp:  # no document type, so no entities that could blow up
        return {}
    try:
        root = ET.fromstring(xmp)  # noqa: S314
    except ET.ParseError:
        return {}
    attributes = (item for element in root.iter(f"{{{_RDF}}}Description") for item in element.items())
    ours = f"{{{_NAMESPACE}}}"
    return {key.removeprefix(ours): _unescape(value) for key, value in attributes if key.startswith(ours)}


def _escape(text: str) -> str:
    return _NOT_XML.sub(lambda m: f"\\{ord(m[0]):04x}", text)


def _unescape(text: str) -> str:
    return _ESCAPED.sub(lambda m: chr(int(m[1], 16)), text)
