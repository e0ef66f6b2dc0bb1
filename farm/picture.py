"""Images from outside, decoded once in a process of their own: a bomb or a crash harms nothing else.

The file also is that process's program: it imports nothing of the farm.
"""

import base64
import json
import resource
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from enum import StrEnum
from io import BytesIO
from typing import Any

MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP")
MEMORY_BYTES = (
    1 << 30
)  # address space of the child: 50 megapixels with alpha take 200 MB, and once more to convert
CPU_S = 20  # of the child
AT_ONCE = threading.Semaphore(2)  # children of one process


@dataclass(frozen=True, slots=True)
class Picture:
    """What an image file holds: png, jpeg or webp, and its size as shown (turned as EXIF says)."""

    format: str
    width: int
    height: int


class MaskOf(StrEnum):
    """What of a picture is painted anew, where another API says it otherwise than by white."""

    ALPHA = "alpha"  # what is transparent
    BLACK = "black"


def inspect(data: bytes) -> Picture:
    """Decode a file completely, and say what it is.

    Raises ValueError with what is wrong, for whoever sent it.
    """
    return Picture(**in_child(data, "look"))


def mask(data: bytes, of: MaskOf) -> bytes | None:
    """The mask that a picture makes: a PNG of its size, white where it is painted anew. None: that is nowhere.

    Raises ValueError with what is wrong, for whoever sent it.
    """
    found = in_child(data, of.value)["mask"]
    return None if found is None else base64.b64decode(found)


def in_child(data: bytes, what: str, *, program: str = __file__) -> dict[str, Any]:
    """What a program of ours says of the data, in a process of its own. Raises ValueError with what is wrong."""
    with AT_ONCE:
        try:
            done = subprocess.run(
                [sys.executable, "-I", program, what],
                input=data,
                capture_output=True,
                timeout=2 * CPU_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ValueError("it takes too long to decode") from None
    try:
        said: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise ValueError("it cannot be decoded within the farm's limits") from None
    if "error" in said:
        raise ValueError(said["error"])
    return said


def _look(data: bytes) -> tuple[dict[str, object], Any]:
    """What it is, and the picture as it is shown."""
    from PIL import Image, ImageOps

    if data.lstrip()[:5].lower() in (b"<?xml", b"<svg ", b"<svg>", b"<!doc"):
        raise ValueError("it is SVG or another text; allowed are PNG, JPEG and WebP")
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"it is too large; allowed are {MAX_PIXELS // 1_000_000} megapixels") from None
    except Exception:
        raise ValueError("it is no image the farm reads; allowed are PNG, JPEG and WebP") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it is too large; allowed are {MAX_PIXELS // 1_000_000} megapixels")
    is_photo = image.format in ("JPEG", "MPO")  # a phone's MPO is a JPEG with more behind it
    if getattr(image, "n_frames", 1) > 1 and not is_photo:
        raise ValueError("it is animated; allowed is one picture")
    if image.mode.startswith(("I", "F")):
        raise ValueError("it has more than 8 bits a channel; allowed are 8")
    try:
        image.load()
        shown = ImageOps.exif_transpose(image)
    except MemoryError:
        raise ValueError("it takes too much memory to decode") from None
    except Exception as e:
        raise ValueError(f"it is damaged or cut: {str(e)[:100]}") from None
    name = "jpeg" if is_photo else str(image.format).lower()
    return {"format": name, "width": shown.width, "height": shown.height}, shown


def _mask(image: Any, of: MaskOf) -> dict[str, object]:
    from PIL import ImageChops

    if of is MaskOf.ALPHA:
        has_alpha = "A" in image.getbands() or "transparency" in image.info
        shade = image.convert("RGBA").getchannel("A") if has_alpha else None
    else:
        shade = image.convert("L")
    painted: Any = shade and ImageChops.invert(shade)
    if painted is None or painted.getextrema()[1] < 128:
        return {"mask": None}
    out = BytesIO()
    painted.save(out, "PNG")
    return {"mask": base64.b64encode(out.getvalue()).decode()}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    what = sys.argv[1]
    try:
        said, image = _look(sys.stdin.buffer.read())
        if what != "look":
            said = _mask(image, MaskOf(what))
    except ValueError as e:
        said = {"error": str(e)}
    print(json.dumps(said))  # noqa: T201 - what the parent reads


if __name__ == "__main__":
    main()
