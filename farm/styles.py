"""One table of styles, aspect ratios and named sizes, for the native API and every dialect.

A style is words beside the prompt. A size that is meant as a shape is fitted to what a model allows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from farm.catalog import Model, Side


@dataclass(frozen=True, slots=True)
class Style:
    """What is added to the prompt, and to the negative prompt of a model that takes one."""

    prompt: str
    negative: str = ""


STYLES: Mapping[str, Style] = {
    "3d-model": Style(
        "rendered 3D model, clean geometry, soft studio light", "flat drawing, painting, photo grain"
    ),
    "analog-film": Style(
        "photo on analogue film, visible grain, faded colours, gentle light leaks", "digital look, drawing"
    ),
    "anime": Style(
        "anime artwork, clean outlines, cel shading, bright colours", "photo, 3D render, dull colours"
    ),
    "cinematic": Style(
        "film still, shallow depth of field, dramatic light, wide-screen colour grading", "drawing, cartoon"
    ),
    "comic-book": Style(
        "comic book page art, bold ink outlines, halftone shading, strong colours", "photo, soft edges"
    ),
    "digital-art": Style("digital illustration, fine detail, vivid light", "photo, blurry"),
    "enhance": Style(
        "sharp, richly detailed, balanced light, professional finish", "blurry, noisy, washed out"
    ),
    "fantasy-art": Style(
        "fantasy painting, otherworldly light, epic atmosphere, intricate detail", "modern, plain, photo"
    ),
    "isometric": Style(
        "isometric view, equal angles, neat miniature scene, crisp edges", "perspective distortion"
    ),
    "line-art": Style("line drawing, clean black contours, plain ground", "shading, colour fill, photo"),
    "low-poly": Style("low-polygon model, flat facets, simple shapes", "smooth surfaces, photo, noise"),
    "modeling-compound": Style(
        "modelled in clay, fingerprints in soft compound, studio light", "drawing, glossy metal"
    ),
    "neon-punk": Style(
        "neon lights at night, saturated magenta and cyan, futuristic street mood", "daylight, muted colours"
    ),
    "origami": Style("folded from paper, sharp creases, layered sheets, soft shadows", "drawing, plastic"),
    "photographic": Style(
        "photograph, natural light, realistic texture, precise focus", "drawing, painting, cartoon, render"
    ),
    "pixel-art": Style("pixel art, visible square pixels, limited palette", "smooth gradients, blur, photo"),
    "tile-texture": Style("seamless repeating texture, even light, no focal point", "borders, single object"),
    # OpenAI's two
    "vivid": Style("vivid colours, dramatic light, striking composition", "dull, flat light"),
    "natural": Style("natural colours, calm light, true to life", "oversaturated, artificial"),
}

# width : height
ASPECT_RATIOS = (
    "1:1", "16:9", "9:16", "21:9", "9:21", "4:3", "3:4", "3:2", "2:3", "5:4", "4:5", "2:1", "1:2",
)  # fmt: skip

# what a name stands for; a model that does not allow it gets the same shape in a size of its own
SIZES: Mapping[str, tuple[int, int]] = {
    "square": (512, 512),
    "square_hd": (1024, 1024),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}


def ratio_of(text: str) -> tuple[int, int] | None:
    """The two numbers of an aspect ratio like 16:9; None for one that is not in the table."""
    if text not in ASPECT_RATIOS:
        return None
    wide, _, high = text.partition(":")
    return int(wide), int(high)


def named(name: str, model: Model) -> tuple[int, int] | None:
    """Width and height of a named size or an aspect ratio, as this model makes it; None if there is no such name."""
    if (size := SIZES.get(name)) is not None:
        return size if all(map(model.side.allows, size)) else fitted(size, model)
    ratio = ratio_of(name)
    return None if ratio is None else fitted(ratio, model)


def fitted(ratio: tuple[int, int], model: Model) -> tuple[int, int]:
    """Width and height of this shape that the model allows.

    The size it was trained on that has nearly this shape; else as many pixels as its default size has, or fewer
    where a side would pass the limits. A shape beyond the limits comes as near to it as they let it.
    """
    wide, high = ratio
    side, shape = model.side, wide / high
    near = [s for s in model.sizes if abs(s.width / s.height / shape - 1) < 0.05]
    if near:
        best = min(near, key=lambda s: abs(s.width * s.height - side.default**2))
        return best.width, best.height
    width = min(sqrt(side.default**2 * shape), side.max, side.max * shape)
    width = max(width, side.min, side.min * shape)
    return _allowed(width, side), _allowed(width / shape, side)


def _allowed(value: float, side: Side) -> int:
    """The nearest multiple within the limits."""
    least = -(-side.min // side.multiple) * side.multiple
    most = side.max // side.multiple * side.multiple
    return max(least, min(most, round(value / side.multiple) * side.multiple))
