"""The contact sheet: its size, and what stands in for an image."""

import io
from pathlib import Path

import pytest
from PIL import Image

from farm.errors import NotFound, StorageAway
from farm.sheet import MOST, Grid, Heading, Tile, draw
from farm.storage import open_store

ACCOUNT = "0" * 32


class Shelf:
    """A store with one red picture under every key, except what is lost."""

    def get(self, key: str) -> bytes:
        if key == "lost":
            raise NotFound(key=key)
        if key == "broken":
            return b"no image"
        if key == "away":
            raise StorageAway(key=key)
        file = io.BytesIO()
        Image.new("RGB", (128, 64), "red").save(file, "PNG")
        return file.getvalue()


def tile(
    index: int = 0, *, key: str | None = "here", status: str = "done", prompt: str = "a red circle"
) -> Tile:
    return Tile(index=index, status=status, prompt=prompt, seed=index, width=128, height=64, key=key)


def sheet(*tiles: Tile, frames: int | None = None) -> Image.Image:
    heading = Heading(
        job="job_1",
        name="x" * 200,
        models=["starter"],
        priority=5,
        status="running",
        frames=frames or len(tiles),
        done=1,
        failed=1,
        cancelled=0,
        cost="1 USD",
    )
    png = draw(heading, tiles, Shelf())  # type: ignore[arg-type]
    return Image.open(io.BytesIO(png)).convert("RGB")


def test_it_is_as_large_as_its_grid() -> None:
    for count in (1, 12, 13, 60, MOST):
        grid = Grid.of(count)
        assert grid.columns * grid.rows >= count
        assert sheet(*[tile(n, key=None, status="queued") for n in range(count)]).size == grid.size


def test_an_image_keeps_its_shape_in_the_middle_of_its_card() -> None:
    drawn, grid = sheet(tile()), Grid.of(1)

    x, y = grid.corner(0)
    card, side = grid.card[0], grid.side
    red = [(r, g, b) == (255, 0, 0) for r, g, b in _column(drawn, x + card // 2, y, y + card)]
    assert sum(red) == side // 2  # 128 x 64 in a square
    assert red.index(True) == (card - side // 2) // 2


def _column(image: Image.Image, x: int, top: int, bottom: int) -> list[tuple[int, int, int]]:
    return [image.getpixel((x, y)) for y in range(top, bottom)]  # type: ignore[misc]


def test_a_frame_without_an_image_shows_its_status() -> None:
    queued, failed = sheet(tile(key=None, status="queued")), sheet(tile(key=None, status="failed"))

    assert queued.tobytes() != failed.tobytes()


def test_a_lost_or_broken_image_does_not_spoil_the_sheet() -> None:
    for key in ("lost", "broken"):
        drawn = sheet(tile(), tile(1, key=key), tile(2))
        assert drawn.size == Grid.of(3).size


def test_a_store_that_is_away_is_not_drawn_over() -> None:
    with pytest.raises(StorageAway):
        sheet(tile(key="away"))


def test_any_text_can_be_drawn() -> None:
    for prompt in (
        "",
        " ",
        "x" * 4096,
        "a b " * 1000,
        "line\nline\ttab",
        "ümlaut 猫 🎨 \u202e \ud800",
        "\u0301" * 300,
    ):
        assert sheet(tile(prompt=prompt)).size == Grid.of(1).size


def test_it_reads_from_a_real_store(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "blue").save(file, "JPEG")
    store.put("v1/x.jpeg", file.getvalue(), content_type="image/jpeg")

    heading = Heading("job_1", None, ["starter"], 9, "finished", 1, 1, 0, 0, "1 USD")
    png = draw(heading, [tile(key="v1/x.jpeg")], store)

    colours = Image.open(io.BytesIO(png)).convert("RGB").getcolors(1 << 20)
    assert max((n, c) for n, c in colours or [] if c[2] > 200 > c[0] + 100)  # type: ignore[index, operator]
