"""What the starter model knows: scenes of coloured shapes, drawn and put in words."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Picture = NDArray[np.uint8]  # height, width, RGB

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "green": (40, 160, 70),
    "blue": (40, 80, 220),
    "yellow": (250, 225, 60),
    "orange": (250, 130, 20),
    "purple": (140, 60, 180),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}
SIZES = {"small": 0.18, "medium": 0.24, "large": 0.32}  # half width, as a share of the short side
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
STRIPES = 4  # of each colour
SMOOTH = 4  # drawn this much larger, then averaged

_TURN = [2 * math.pi * k / 64 for k in range(64)]
_CIRCLE = [(math.cos(a), math.sin(a)) for a in _TURN]
_STAR = [
    (math.sin(math.pi * k / 5) * (1, 0.42)[k % 2], -math.cos(math.pi * k / 5) * (1, 0.42)[k % 2])
    for k in range(10)
]
_HEART = [
    (
        math.sin(a) ** 3,
        -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16,
    )
    for a in _TURN
]
_A = 0.36
_CROSS = [(-_A, -1), (_A, -1), (_A, -_A), (1, -_A), (1, _A), (_A, _A)]
_CROSS += [(-x, -y) for x, y in _CROSS]
# Outlines in the box from -1 to 1, y down; a second outline is a hole.
SHAPES: dict[str, list[list[tuple[float, float]]]] = {
    "circle": [_CIRCLE],
    "square": [[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]],
    "triangle": [[(0, -1), (1, 0.8), (-1, 0.8)]],
    "star": [_STAR],
    "heart": [_HEART],
    "ring": [_CIRCLE, [(0.52 * x, 0.52 * y) for x, y in _CIRCLE]],
    "cross": [_CROSS],
}


@dataclass(frozen=True)
class Thing:
    """One shape; x and y are its centre as shares of width and height, radius a share of the short side.

    size and place are None where no word fits: then the caption does not name them.
    """

    shape: str
    colour: str
    x: float = 0.5
    y: float = 0.5
    radius: float = SIZES["medium"]
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Scene:
    """A background and at most two things; relation says where the first is, seen from the second."""

    background: str
    things: tuple[Thing, ...] = ()
    relation: str | None = None
    style: str = "plain"  # or striped, or fading (top to bottom)
    second_background: str | None = None


def draw(scene: Scene, width: int = 64, height: int = 64) -> Picture:
    """Draw a scene, edges smoothed. Returns RGB, shape (height, width, 3)."""
    picture = _background(scene, width, height)
    for thing in scene.things:
        cover = _cover(thing, width, height)[..., None]
        picture = picture * (1 - cover) + _rgb(thing.colour) * cover
    return np.rint(picture).astype(np.uint8)


def _background(scene: Scene, width: int, height: int) -> NDArray[np.float32]:
    first = _rgb(scene.background)
    share = np.zeros((height, width, 1), np.float32)
    if scene.style == "striped":
        share += (np.arange(width) * 2 * STRIPES // width % 2)[None, :, None]
    if scene.style == "fading":
        share += np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    second = _rgb(scene.second_background or scene.background)
    mixed: NDArray[np.float32] = first * (1 - share) + second * share
    return mixed


def _cover(thing: Thing, width: int, height: int) -> NDArray[np.float32]:
    canvas = Image.new("L", (width * SMOOTH, height * SMOOTH))
    pen = ImageDraw.Draw(canvas)
    reach = thing.radius * min(width, height)
    for outline, fill in zip(SHAPES[thing.shape], (255, 0), strict=False):
        corners = [
            ((thing.x * width + x * reach) * SMOOTH, (thing.y * height + y * reach) * SMOOTH)
            for x, y in outline
        ]
        pen.polygon(corners, fill=fill)
    return np.asarray(canvas.reduce(SMOOTH), np.float32) / np.float32(255)


def _rgb(colour: str) -> NDArray[np.float32]:
    return np.asarray(COLOURS[colour], np.float32)


def edge(radius: float, stretch: float = 1.0) -> float:
    """Where a thing called "left" has its centre; stretch is the axis' length in short sides."""
    return max(0.24, radius / stretch + 0.04)


def spot(place: str, radius: float, width: int, height: int) -> tuple[float, float]:
    """Return the centre that a place means, as shares of width and height."""
    short = min(width, height)
    low_x, low_y = edge(radius, width / short), edge(radius, height / short)
    x = low_x if "left" in place else 1 - low_x if "right" in place else 0.5
    y = low_y if "top" in place else 1 - low_y if "bottom" in place else 0.5
    return x, y


def imagine(seed: int, width: int = 64, height: int = 64) -> Scene:
    """Make up a scene for a picture of this size: the same seed, the same scene."""
    rng = Random(seed)
    kind = rng.choices(["one", "two", "striped", "fading", "empty"], [64, 24, 5.5, 5.5, 1])[0]
    # White and black lie furthest from the mean of all pictures, so they take the most steps to learn.
    weights = [1.8 if c == "white" else 1.3 if c == "black" else 1.0 for c in COLOURS]
    background = rng.choices(list(COLOURS), weights)[0]
    left = [c for c in COLOURS if c != background]
    rng.shuffle(left)
    if kind == "two":
        return _pair(rng, background, left, width, height)
    thing = _single(rng, left[0], width, height)
    if kind in ("striped", "fading"):
        return Scene(background, (thing,), style=kind, second_background=left[1])
    return Scene(background, (thing,) if kind == "one" else ())


def _single(rng: Random, colour: str, width: int, height: int) -> Thing:
    shape = rng.choice(list(SHAPES))
    size = rng.choice([*SIZES, None])
    radius = SIZES[size] * rng.uniform(0.95, 1.05) if size else rng.uniform(0.17, 0.34)
    place = rng.choices([*PLACES, "centre", None], [1] * len(PLACES) + [2, 2])[0]
    if place:
        x, y = spot(place, radius, width, height)
        x, y = x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.02, 0.02)
    else:
        short = min(width, height)
        low_x, low_y = radius * short / width + 0.04, radius * short / height + 0.04
        x, y = rng.uniform(low_x, 1 - low_x), rng.uniform(low_y, 1 - low_y)
    return Thing(shape, colour, x, y, radius, size, place)


def _pair(rng: Random, background: str, colours: list[str], width: int, height: int) -> Scene:
    relation = rng.choice(list(RELATIONS))
    dx, dy = RELATIONS[relation]
    x, y = 0.5 + rng.uniform(-0.05, 0.05), 0.5 + rng.uniform(-0.05, 0.05)
    things = []
    for way, colour in zip((1, -1), rng.choices(colours, k=2), strict=True):
        radius, gap = rng.uniform(0.16, 0.20), rng.uniform(0.22, 0.25)
        things.append(Thing(rng.choice(list(SHAPES)), colour, x + way * dx * gap, y + way * dy * gap, radius))
    return Scene(background, tuple(things), relation)


def caption(scene: Scene, seed: int) -> str:
    """Put a scene in words, one of many ways: the same seed, the same words."""
    rng = Random(seed)
    words = _sentence(scene, rng)
    if rng.random() < 0.7:
        words = re.sub(r"\ba (?=[aeiou])", "an ", words)
    return re.sub(r"\ban? ", "", words) if rng.random() < 0.1 else words


def _sentence(scene: Scene, rng: Random) -> str:
    behind = _behind(scene, rng)
    if not scene.things:
        return behind
    words = _subject(scene, rng)
    if rng.random() < 0.08:
        words = rng.choice(["a picture of ", "a photo of ", "an image of ", "a drawing of "]) + words
    way = rng.random()
    if way < 0.12:
        return words
    if way < 0.24:
        return f"{behind} with {words}"
    return words + rng.choice([" on ", " on ", " on ", " in front of ", ", "]) + behind


def _behind(scene: Scene, rng: Random) -> str:
    first, second = scene.background, scene.second_background
    if scene.style == "striped":
        return rng.choice([f"a {first} and {second} striped background", f"{first} and {second} stripes"])
    if scene.style == "fading":
        return rng.choice(
            [f"a background fading from {first} to {second}", f"a {first} to {second} gradient"]
        )
    plain = [f"a {first} background", f"a {first} background", f"{first}", f"a plain {first} background"]
    return rng.choice(plain)


def _subject(scene: Scene, rng: Random) -> str:
    if len(scene.things) == 2:
        one, two = (f"a {thing.colour} {thing.shape}" for thing in scene.things)
        relation = scene.relation if rng.random() < 0.9 else "and"
        prefix = "to the " if relation in ("left of", "right of") and rng.random() < 0.3 else ""
        return f"{one} {prefix}{relation} {two}"
    thing = scene.things[0]
    colour = thing.colour if rng.random() < 0.95 else ""
    size = _synonym(thing.size, rng) if thing.size and rng.random() < 0.7 else ""
    odd = "".join(rng.choices("abcdefghijklmnoprstuvwz", k=rng.randint(2, 7))) if rng.random() < 0.04 else ""
    named = " ".join(word for word in ("a", odd, size, colour, thing.shape) if word)
    if thing.place is None or rng.random() < 0.2:
        return named
    return f"{named} {_where(thing.place, rng)}"


def _synonym(size: str, rng: Random) -> str:
    return rng.choice({"small": ["small", "small", "tiny"], "large": ["large", "big"]}.get(size, [size]))


def _where(place: str, rng: Random) -> str:
    if place == "centre":
        return "in the " + rng.choice(["centre", "center", "middle"])
    if " " in place:
        return f"in the {place}" + rng.choice(["", "", " corner"])
    return rng.choice(["at the {}", "on the {}", "in the {}"]).format(place)
