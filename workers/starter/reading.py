"""Read a picture back: which shapes of which colours it shows, and where. For plain backgrounds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from workers.starter.pictures import COLOURS, SHAPES, SIZES, Picture, edge

Mask = NDArray[np.bool_]
NAMES = tuple(COLOURS)
PALETTE = np.array(list(COLOURS.values()), np.float32)
FAR = 60.0  # RGB distance from the background; the two nearest colours of the palette are 100 apart
GRID = 48  # shapes are compared at this size


@dataclass(frozen=True)
class SeenThing:
    """One shape as found; x and y are its box's middle as shares of width and height."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float  # share of the short side
    place: str
    likeness: float  # overlap with the shape's outline, 0 to 1


@dataclass(frozen=True)
class Seen:
    """A background's colour and the things on it, the largest first."""

    background: str
    things: tuple[SeenThing, ...]

    def relation(self) -> str | None:
        """Return where the upper or left one of two things is, seen from the other; both by their colours."""
        if len(self.things) != 2:
            return None
        one, two = self.things
        flat = abs(one.x - two.x) > abs(one.y - two.y)
        one, two = sorted(self.things, key=lambda t: t.x if flat else t.y)
        return f"{one.colour} {'left of' if flat else 'above'} {two.colour}"


def read(picture: Picture) -> Seen:
    """Find what a picture shows. Specks under 1 % of its pixels don't count."""
    rim = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3)])
    rim = np.concatenate([rim, picture[:, :2].reshape(-1, 3), picture[:, -2:].reshape(-1, 3)])
    background = colour_of(rim)
    paint = np.median(rim[nearest(rim) == NAMES.index(background)], axis=0)
    different = _distance(picture, paint) > FAR
    pieces = [piece for piece in components(different) if piece.mean() >= 0.01]
    pieces.sort(key=lambda piece: -int(piece.sum()))
    return Seen(background, tuple(_thing(picture, piece, paint) for piece in pieces))


def nearest(pixels: NDArray[np.generic]) -> NDArray[np.intp]:
    """Return the index in NAMES of the colour nearest to each pixel; drops the last axis."""
    found: NDArray[np.intp] = _distance(pixels[..., None, :], PALETTE).argmin(-1)
    return found


def colour_of(pixels: NDArray[np.generic]) -> str:
    """Name the colour that most of the pixels, shape (n, 3), are nearest to."""
    return NAMES[int(np.bincount(nearest(pixels), minlength=len(NAMES)).argmax())]


def components(mask: Mask) -> list[Mask]:
    """Split a mask into its connected pieces (side by side, not corner to corner)."""
    left, pieces = mask.copy(), []
    while left.any():
        piece = np.zeros_like(mask)
        piece[np.unravel_index(left.argmax(), mask.shape)] = True
        size = 0
        while size < (size := int(piece.sum())):
            piece = _grown(piece) & left
        pieces.append(piece)
        left &= ~piece
    return pieces


def _grown(piece: Mask) -> Mask:
    grown = piece.copy()
    grown[1:] |= piece[:-1]
    grown[:-1] |= piece[1:]
    grown[:, 1:] |= piece[:, :-1]
    grown[:, :-1] |= piece[:, 1:]
    return grown


def _reach(shape: str) -> float:
    """How far a shape of radius 1 goes: a square stays within 0.9."""
    return max(abs(coordinate) for corner in SHAPES[shape][0] for coordinate in corner)


def _thing(picture: Picture, piece: Mask, paint: NDArray[np.float32]) -> SeenThing:
    colour = colour_of(picture[piece])
    own = np.median(picture[piece], axis=0)
    # The edge is where the mixture of both colours is even.
    solid = piece & (_distance(picture, paint) > 0.5 * _distance(own, paint))
    solid = solid if solid.any() else piece
    rows, columns = (np.flatnonzero(solid.any(axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = piece.shape
    x, y = float(left + right) / 2 / width, float(top + bottom) / 2 / height
    shape, likeness = shape_of(solid[top:bottom, left:right])
    radius = float(max(bottom - top, right - left)) / 2 / min(height, width) / _reach(shape)
    return SeenThing(shape, colour, x, y, radius, place_of(x, y, radius, width, height), likeness)


def shape_of(solid: Mask) -> tuple[str, float]:
    """Name the shape that a mask, cut to its box, overlaps best, and by how much (0 to 1)."""
    scaled = np.asarray(Image.fromarray(solid).resize((GRID, GRID), Image.Resampling.NEAREST))
    likeness = {
        shape: float((scaled & outline).sum() / (scaled | outline).sum())
        for shape, outline in _outlines().items()
    }
    best = max(likeness, key=lambda shape: likeness[shape])
    return best, likeness[best]


@cache
def _outlines() -> dict[str, Mask]:
    drawn = {}
    for shape, outlines in SHAPES.items():
        corners = np.array(outlines[0])
        low, high = corners.min(0), corners.max(0)
        canvas = Image.new("1", (GRID, GRID))
        for outline, fill in zip(outlines, (1, 0), strict=False):
            box = (np.array(outline) - low) / (high - low) * GRID - 0.5
            ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in box.tolist()], fill=fill)
        drawn[shape] = np.asarray(canvas)
    return drawn


def place_of(x: float, y: float, radius: float, width: int = 64, height: int = 64) -> str:
    """Name the place whose centre is nearest, for a thing of this radius."""
    short = min(width, height)
    across = _side(x, edge(radius, width / short), ("left", "", "right"))
    down = _side(y, edge(radius, height / short), ("top", "", "bottom"))
    return f"{down} {across}".strip() or "centre"


def _side(where: float, low: float, names: tuple[str, str, str]) -> str:
    third = (low + 0.5) / 2
    return names[int(where > third) + int(where > 1 - third)]


def size_of(radius: float) -> str:
    """Name the size nearest to a radius."""
    ranked = sorted(SIZES.items(), key=lambda size: size[1])
    for (name, value), (_, larger) in pairwise(ranked):
        if radius < (value * larger) ** 0.5:
            return name
    return ranked[-1][0]


def _distance(one: NDArray[np.generic], two: NDArray[np.generic]) -> NDArray[np.float32]:
    apart: NDArray[np.float32] = np.linalg.norm(
        np.asarray(one, np.float32) - np.asarray(two, np.float32), axis=-1
    )
    return apart
