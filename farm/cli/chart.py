"""`farm margin --chart`: revenue against GPU time as a PNG."""

import io
from collections.abc import Sequence
from decimal import Decimal
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from farm.answers import Margin, MarginShare, PoolTime
from farm.cli.shares import Row, by_currency, longest, rows

SCALE = 2  # for screens with fine pixels
WIDTH, MARGIN, ROW, HEAD = 1000, 40, 46, 56
NAME, FIGURES = 190, 250  # widths: of names on the left, of figures on the right
PAPER, INK, GREY, RULE = "#ffffff", "#1d1d1b", "#7b7b75", "#dcdcd6"
REVENUE, GPU, LOST, OTHER = "#2f7d4f", "#2b62b0", "#b3372f", "#dcdcd6"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)


NO_POOL = "–"


class _Page:
    """A drawing in points; each row goes below the one before."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), PAPER)
        self._pen = ImageDraw.Draw(self.image)
        self.y = MARGIN

    def text(
        self, x: int, y: int, words: str, *, size: int = 13, fill: str = INK, anchor: str = "la"
    ) -> None:
        self._pen.text((x * SCALE, y * SCALE), words, font=_font(size), fill=fill, anchor=anchor)

    def bar(self, x: float, y: int, width: float, height: int, fill: str) -> None:
        if width > 0:
            box = (x * SCALE, y * SCALE, max(x + width, x + 1) * SCALE, (y + height) * SCALE)
            self._pen.rectangle(box, fill=fill)

    def rule(self) -> None:
        self.bar(MARGIN, self.y, WIDTH - 2 * MARGIN, 1, RULE)


def draw(margin: Margin) -> bytes:
    """A PNG: bars of revenue and of GPU time for each model, pool and account, by currency; then of pools' time."""
    parts = [("Models", margin.models), ("Pools", margin.pools), ("Accounts", margin.accounts)]
    panels = [panel for title, shares in parts for panel in _panels(title, shares)]
    lines = sum(max(1, len(some)) for _, some in panels) + max(1, len(margin.time))
    page = _Page(2 * MARGIN + 60 + (len(panels) + 1) * HEAD + lines * ROW)
    page.text(MARGIN, page.y, "Revenue and GPU time", size=22)
    page.text(
        MARGIN, page.y + 32, f"{margin.since:%Y-%m-%d %H:%M} to {margin.until:%Y-%m-%d %H:%M} UTC", fill=GREY
    )
    _legend(page)
    page.y += 60
    for title, some in panels:
        _shares(page, title, some)
    _times(page, margin.time)
    file = io.BytesIO()
    page.image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _legend(page: _Page) -> None:
    x = WIDTH - MARGIN
    for words, colour in (
        ("other time", OTHER),
        ("not delivered", LOST),
        ("GPU time", GPU),
        ("revenue", REVENUE),
    ):
        page.text(x, page.y + 6, words, fill=GREY, anchor="ra")
        x -= 10 + int(_font(13).getlength(words) / SCALE)
        page.bar(x - 8, page.y + 8, 10, 10, colour)
        x -= 26


def _head(page: _Page, title: str) -> None:
    page.y += 14
    page.text(MARGIN, page.y, title, size=15)
    page.y += 26
    page.rule()
    page.y += HEAD - 40


def _panels(title: str, shares: Sequence[MarginShare]) -> list[tuple[str, list[Row]]]:
    """One for each currency: a bar of one says nothing beside that of another."""
    panels = by_currency(rows(shares))
    if len(panels) <= 1:
        return [(title, some) for some in panels.values()] or [(title, [])]
    return [(f"{title}, {currency or 'nothing delivered'}", some) for currency, some in panels.items()]


def _shares(page: _Page, title: str, some: Sequence[Row]) -> None:
    _head(page, title)
    left, room = MARGIN + NAME, WIDTH - 2 * MARGIN - NAME - FIGURES
    most, time = longest(some)
    for row in some:
        page.text(MARGIN, page.y + 8, _short(row.share.name))
        page.bar(left, page.y + 2, _part(row.amount, most, room), 13, REVENUE)
        page.bar(left, page.y + 18, _part(row.gpu_s, time, room), 13, GPU)
        page.text(WIDTH - MARGIN, page.y, f"{_money(row.amount)} {row.currency}".rstrip(), anchor="ra")
        hourly = "" if row.rate is None else f" · {_money(row.rate)} an hour"
        page.text(WIDTH - MARGIN, page.y + 17, f"{row.gpu_s:,.1f} GPU s{hourly}", fill=GREY, anchor="ra")
        page.y += ROW
    if not some:
        _nothing(page)


def _times(page: _Page, times: Sequence[PoolTime]) -> None:
    _head(page, "What pools' time went to")
    left, room = MARGIN + NAME, WIDTH - 2 * MARGIN - NAME - FIGURES
    for pool in times:
        page.text(MARGIN, page.y + 8, _short(pool.name))
        x, up = float(left), Decimal(pool.up_s)
        for seconds, colour in ((pool.delivered_s, GPU), (pool.undelivered_s, LOST), (pool.other_s, OTHER)):
            width = _part(Decimal(seconds), up, room)
            page.bar(x, page.y + 8, width, 16, colour)
            x += width
        share = 100 * Decimal(pool.delivered_s) / up if up else Decimal(0)
        page.text(WIDTH - MARGIN, page.y, f"{share:.1f} % delivered", anchor="ra")
        page.text(WIDTH - MARGIN, page.y + 17, f"of {up:,.0f} s", fill=GREY, anchor="ra")
        page.y += ROW
    if not times:
        _nothing(page)


def _nothing(page: _Page) -> None:
    page.text(MARGIN, page.y + 8, "nothing", fill=GREY)
    page.y += ROW


def _part(value: Decimal, most: Decimal, room: int) -> float:
    return max(0.0, float(value / most) * room) if most > 0 else 0.0


def _money(amount: Decimal) -> str:
    """To the cent; less than one unit with three digits that say something."""
    return f"{amount:,.2f}" if amount == 0 or abs(amount) >= 1 else f"{float(amount):.3g}"


def _short(name: str) -> str:
    """What the built-in font can draw: it has neither a dash, which stands for no pool, nor an ellipsis."""
    if name == NO_POOL:
        return "no pool: reused images"
    return name if len(name) <= 24 else name[:22] + ".."
