"""What a web UI does around the painting of a mask: soft edges, a part painted at full size, what lies under it.

    start, mask = inpaint.cut(image, mask, touch)      what is painted, and where
    pictures = inpaint.paste(image, mask, touch, pictures)

Painted is a picture of its own; it is laid over the image it started from, through the soft mask: what the mask
leaves out stays as it was, to the pixel. The file also is the program of the process that does it, as
farm/picture.py is: it imports nothing of the farm there.
"""

import base64
import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

MAX_PIXELS = 50_000_000
MEMORY_BYTES = 2 << 30
CPU_S = 20
# how what is under a mask is filled from around it: blurred so far, laid over itself so often
FILLING = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2))


@dataclass(frozen=True, slots=True)
class Touch:
    """How a mask is used. Painted is width × height, in pixels.

    blur_x, blur_y: how soft its edges are, the Gaussian's sigma in pixels. inverted: what is black is painted. zoom:
    only the part around what is painted, and padding pixels more, at the full size. fill: what is painted starts from
    what surrounds it, not from what is there. fit: the image is cut to the shape of what is painted, not stretched.
    """

    width: int
    height: int
    blur_x: int
    blur_y: int
    inverted: bool
    zoom: bool
    padding: int
    fill: bool
    fit: bool


def cut(image: bytes, mask: bytes, touch: Touch) -> tuple[bytes, bytes]:
    """What is painted, and where of it: two PNGs, white where.

    Raises ValueError with what is wrong with the mask.
    """
    start, where = _in_child("cut", image, mask, touch)
    return start, where


def paste(image: bytes, mask: bytes, touch: Touch, pictures: list[bytes]) -> list[bytes]:
    """What was painted of cut(), laid over the image: each a file of its format. Raises ValueError as cut() does."""
    return _in_child("paste", image, mask, touch, pictures)


def _in_child(
    what: str, image: bytes, mask: bytes, touch: Touch, pictures: Sequence[bytes] = ()
) -> list[bytes]:
    from farm import picture

    files = [base64.b64encode(file).decode() for file in (image, mask, *pictures)]
    said = picture.in_child(
        json.dumps({"files": files, "touch": asdict(touch)}).encode(), what, program=__file__
    )
    return [base64.b64decode(file) for file in said["files"]]


# ------------------------------------------------------------------------------------------------ the program


def _opened(file: str) -> Any:
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    return ImageOps.exif_transpose(Image.open(BytesIO(base64.b64decode(file))))


def _shade(mask: Any, touch: Touch) -> Any:
    """The mask from 0 to 255, with soft edges: of a picture with transparency what is opaque, else what is light."""
    from PIL import ImageFilter, ImageOps

    alpha = mask.convert("RGBA").getchannel("A")
    sees_through = alpha.getextrema()[0] < 255
    shade = alpha.point(lambda a: 255 * (a > 128)) if sees_through else mask.convert("L")
    if touch.inverted:
        shade = ImageOps.invert(shade)
    if touch.blur_x or touch.blur_y:
        shade = shade.filter(ImageFilter.GaussianBlur((touch.blur_x, touch.blur_y)))
    if shade.getextrema()[1] < 128:
        raise ValueError("nothing of it is to be painted")
    return shade


def _around(shade: Any, touch: Touch) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part that is painted: of the shape of what is painted, if it can be."""
    left, top, right, bottom = shade.getbbox()
    left, top = max(0, left - touch.padding), max(0, top - touch.padding)
    right, bottom = min(shade.width, right + touch.padding), min(shade.height, bottom + touch.padding)
    ratio = touch.width / touch.height
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _grown(top, bottom, round((right - left) / ratio), shade.height)
    else:
        left, right = _grown(left, right, round((bottom - top) * ratio), shade.width)
    return left, top, right, bottom


def _grown(low: int, high: int, size: int, most: int) -> tuple[int, int]:
    """The span made as long as size, or most, about its middle, within 0 and most."""
    size = min(max(size, high - low), most)
    low = min(max(0, low - (size - (high - low)) // 2), most - size)
    return low, low + size


def _filled(image: Any, shade: Any) -> Any:
    """The image with what is under the mask made of what surrounds it."""
    from PIL import Image, ImageFilter, ImageOps

    around = Image.new("RGBa", image.size)
    around.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(shade))
    made = Image.new("RGBA", image.size)
    for radius, times in FILLING:
        blurred = around.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            made.alpha_composite(blurred)
    made.alpha_composite(around.convert("RGBA"))
    return made.convert("RGB")


def _run(what: str, files: list[str], touch: Touch) -> list[bytes]:
    from PIL import Image, ImageOps

    image, mask = _opened(files[0]).convert("RGB"), _opened(files[1])
    if mask.size != image.size:
        raise ValueError(
            f"it must be {image.width} × {image.height}, as the image; it is {mask.width} × {mask.height}"
        )
    size, shade = (touch.width, touch.height), _shade(mask, touch)
    box = _around(shade, touch) if touch.zoom else None

    def sized(whole: Any) -> Any:
        if box is None and touch.fit:
            return ImageOps.fit(whole, size, Image.Resampling.LANCZOS)
        return whole.resize(size, Image.Resampling.LANCZOS, box=box)

    if what == "cut":
        start, where = sized(image), sized(shade)
        start = _filled(start, where) if touch.fill else start
        return [_saved(start, "PNG"), _saved(where.point(lambda s: 255 * (s >= 128)), "PNG")]
    pictures = []
    for file in files[2:]:
        painted = _opened(file)
        kind = str(Image.open(BytesIO(base64.b64decode(file))).format)
        if box is None:  # twice as strong: the edge is soft outwards
            made = Image.composite(
                painted.convert("RGB"), sized(image), sized(shade).point(lambda s: min(255, 2 * s))
            )
        else:
            patch = painted.convert("RGB").resize(
                (box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS
            )
            made = image.copy()
            made.paste(patch, box[:2], shade.crop(box))
        pictures.append(_saved(made, kind))
    return pictures


def _saved(image: Any, kind: str) -> bytes:
    out = BytesIO()
    how: dict[str, dict[str, Any]] = {
        "PNG": {"compress_level": 1},
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 95},
    }
    image.save(out, kind, **how[kind])
    return out.getvalue()


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asked = json.load(sys.stdin)
    said: dict[str, Any]
    try:
        made = _run(sys.argv[1], asked["files"], Touch(**asked["touch"]))
        said = {"files": [base64.b64encode(file).decode() for file in made]}
    except ValueError as e:
        said = {"error": str(e)}
    except MemoryError:
        said = {"error": "it takes too much memory with this image"}
    print(json.dumps(said))  # noqa: T201 - what the parent reads


if __name__ == "__main__":
    main()
