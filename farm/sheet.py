"""A job's contact sheet: one PNG with all its frames as thumbnails, their prompts below."""

import io
import logging
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from farm.errors import NotFound
from farm.storage import Store

log = logging.getLogger(__name__)

MOST = 400  # frames on one sheet
READERS = 8  # images fetched at the same time

PAPER, CARD, EDGE = "#f4f4f1", "#ffffff", "#dcdcd6"
INK, GREY = "#1d1d1b", "#7b7b75"
COLOURS = {
    "done": "#2f7d4f",
    "failed": "#b3372f",
    "rejected": "#b3372f",
    "cancelled": "#8a8a84",
    "claimed": "#2b62b0",
}
GAP, PAD, HEAD = 14, 8, 84  # pixels: between cards, inside them, above them


@dataclass(frozen=True, slots=True)
class Tile:
    """One frame: its image's key in the store, or the status that stands in for it."""

    index: int
    status: str
    prompt: str
    seed: int
    width: int
    height: int
    key: str | None


@dataclass(frozen=True, slots=True)
class Heading:
    """What stands above the frames."""

    job: str
    name: str | None
    models: Sequence[str]
    priority: int
    status: str
    frames: int
    done: int
    failed: int
    cancelled: int
    cost: str


@dataclass(frozen=True, slots=True)
class Grid:
    """How many columns and rows of cards, and how large a thumbnail, in pixels."""

    columns: int
    rows: int
    side: int

    @classmethod
    def of(cls, tiles: int) -> "Grid":
        side = next(s for most, s in ((12, 240), (60, 180), (MOST, 120)) if tiles <= most)
        columns = max(3, math.ceil(math.sqrt(tiles * 1.4)))
        return cls(columns, max(1, math.ceil(tiles / columns)), side)

    @property
    def card(self) -> tuple[int, int]:
        return self.side + 2 * PAD, self.side + 2 * PAD + 3 * LINE + 6

    @property
    def size(self) -> tuple[int, int]:
        width, height = self.card
        return self.columns * (width + GAP) + GAP, HEAD + self.rows * (height + GAP) + GAP

    def corner(self, place: int) -> tuple[int, int]:
        width, height = self.card
        row, column = divmod(place, self.columns)
        return GAP + column * (width + GAP), HEAD + row * (height + GAP)


LINE = 15  # pixels from one line of a prompt to the next


def draw(heading: Heading, tiles: Sequence[Tile], store: Store) -> bytes:
    """Draw the sheet of up to 400 tiles as PNG.

    Raises StorageAway if the store does not answer; an image it lost is shown as such.
    """
    grid = Grid.of(len(tiles))
    paper = Image.new("RGB", grid.size, PAPER)
    pen = ImageDraw.Draw(paper)
    _draw_heading(pen, heading, grid.size[0], shown=len(tiles))
    for place, (tile, thumbnail) in enumerate(_thumbnails(tiles, store, grid.side)):
        _draw_card(paper, pen, grid=grid, place=place, tile=tile, thumbnail=thumbnail)
    file = io.BytesIO()
    paper.save(file, "PNG", compress_level=4)
    return file.getvalue()


def _thumbnails(tiles: Sequence[Tile], store: Store, side: int) -> Iterable[tuple[Tile, Image.Image | None]]:
    with ThreadPoolExecutor(READERS) as readers:
        yield from zip(tiles, readers.map(lambda t: _thumbnail(t, store, side), tiles), strict=True)


def _thumbnail(tile: Tile, store: Store, side: int) -> Image.Image | None:
    if tile.key is None:
        return None
    try:
        with Image.open(io.BytesIO(store.get(tile.key))) as image:
            image.draft("RGB", (side, side))
            small = image.convert("RGB")
    except (NotFound, OSError) as e:
        log.warning("no thumbnail of %s: %s", tile.key, e)
        return None
    scale = min(side / small.width, side / small.height)
    size = max(1, round(small.width * scale)), max(1, round(small.height * scale))
    return small.resize(size, Image.Resampling.LANCZOS)


def _draw_heading(pen: ImageDraw.ImageDraw, heading: Heading, width: int, *, shown: int) -> None:
    room = width - 2 * GAP
    title = heading.name or heading.job
    pen.text((GAP, 12), _cut(title, _font(22), room), font=_font(22), fill=INK)
    facts = [
        heading.job if heading.name else "",
        ", ".join(heading.models),
        f"priority {heading.priority}",
        heading.status,
        f"{heading.done} of {heading.frames} done",
        f"{heading.failed} failed" if heading.failed else "",
        f"{heading.cancelled} cancelled" if heading.cancelled else "",
        heading.cost,
        f"the first {shown} of {heading.frames} frames" if shown < heading.frames else "",
    ]
    lines = _wrapped([f for f in facts if f], "  ·  ", _font(13), room)
    for n, line in enumerate(lines[:2]):
        pen.text((GAP, 42 + n * 18), _cut(line, _font(13), room), font=_font(13), fill=GREY)


def _draw_card(
    paper: Image.Image,
    pen: ImageDraw.ImageDraw,
    *,
    grid: Grid,
    place: int,
    tile: Tile,
    thumbnail: Image.Image | None,
) -> None:
    (x, y), (width, height), side = grid.corner(place), grid.card, grid.side
    pen.rounded_rectangle((x, y, x + width - 1, y + height - 1), radius=6, fill=CARD, outline=EDGE)
    if thumbnail is not None:
        at = x + PAD + (side - thumbnail.width) // 2, y + PAD + (side - thumbnail.height) // 2
        paper.paste(thumbnail, at)
    else:
        _draw_status(pen, (x + PAD, y + PAD), side, tile)
    below = y + PAD + side + 6
    small = _font(11)
    pen.text((x + PAD, below), _cut(f"{tile.index}  seed {tile.seed}", small, side), font=small, fill=GREY)
    words = tile.prompt.split()
    for n, line in enumerate(_two_lines(words, _font(12), side)):
        pen.text((x + PAD, below + (n + 1) * LINE - 1), line, font=_font(12), fill=INK)


def _draw_status(pen: ImageDraw.ImageDraw, at: tuple[int, int], side: int, tile: Tile) -> None:
    """The frame's outline in its own shape, and its status in the middle."""
    scale = min(side / tile.width, side / tile.height)
    width, height = tile.width * scale, tile.height * scale
    x, y = at[0] + (side - width) / 2, at[1] + (side - height) / 2
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=PAPER, outline=EDGE)
    status = "file is gone" if tile.status == "done" else tile.status
    middle = at[0] + side / 2, at[1] + side / 2
    pen.text(middle, status, font=_font(14), fill=COLOURS.get(tile.status, GREY), anchor="mm")


# ------------------------------------------------------------------------------------------------ text


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu if the machine has it; else Pillow's own, which knows ASCII and little more."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow was built with FreeType
        return font


def _readable(text: str) -> str:
    """One line of what the font can draw: no control characters, and for Pillow's own é as e and 猫 as ?."""
    text = "".join(c if c.isprintable() else " " for c in text)
    if _font(12).getname()[0] == "DejaVu Sans":
        return text
    plain = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if c.isascii() or c in "…·" else "?" for c in plain)


def _two_lines(words: Sequence[str], font: ImageFont.FreeTypeFont, room: float) -> list[str]:
    lines = _wrapped(words[:60], " ", font, room)
    if len(lines) <= 2 and len(words) <= 60:
        return [_cut(line, font, room) for line in lines]
    return [_cut(lines[0], font, room), _cut(" ".join(lines[1:3]) + " …", font, room)]


def _wrapped(parts: Iterable[str], between: str, font: ImageFont.FreeTypeFont, room: float) -> list[str]:
    lines: list[str] = []
    for part in parts:
        longer = f"{lines[-1]}{between}{part}" if lines else part
        if lines and font.getlength(longer[:200]) <= room:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def _cut(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """The text, or what fits of it and an ellipsis."""
    text = _readable(text[:300])
    if font.getlength(text) <= room:
        return text
    return text[: _longest(lambda n: font.getlength(text[:n] + "…") <= room, len(text))].rstrip() + "…"


def _longest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to most that fits, by halving."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
