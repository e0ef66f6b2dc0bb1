"""`farm margin --chart`: revenue against GPU time as a PNG."""

import io
from collections.abc import Sequence
from decimal import Decimal
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from farm.answers import Margin, MarginShare, PoolTime

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
    """A PNG: bars of revenue and of GPU time for each model, pool and account, then what pools' time went to."""
    parts = [("Models", margin.models), ("Pools", margin.pools), ("Accounts", margin.accounts)]
    rows = sum(max(1, len(shares)) for _, shares in parts) + max(1, len(margin.time))
    page = _Page(2 * MARGIN + 60 + 4 * HEAD + rows * ROW)
    page.text(MARGIN, page.y, "Revenue and GPU time", size=22)
    page.text(
        MARGIN, page.y + 32, f"{margin.since:%Y-%m-%d %H:%M} to {margin.until:%Y-%m-%d %H:%M} UTC", fill=GREY
    )
    _legend(page)
    page.y += 60
    for title, shares in parts:
        _shares(page, title, shares)
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


def _shares(page: _Page, title: str, shares: Sequence[MarginShare]) -> None:
    _head(page, title)
    left, room = MARGIN + NAME, WIDTH - 2 * MARGIN - NAME - FIGURES
    most = max((_first(s)[0] for s in shares), default=Decimal(0))
    longest = max((Decimal(s.gpu_s) for s in shares), default=Decimal(0))
    for share in shares:
        amount, currency = _first(share)
        page.text(MARGIN, page.y + 8, _short(share.name))
        page.bar(left, page.y + 2, _part(amount, most, room), 13, REVENUE)
        page.bar(left, page.y + 18, _part(Decimal(share.gpu_s), longest, room), 13, GPU)
        rate = share.per_gpu_hour.get(currency)
        page.text(WIDTH - MARGIN, page.y, f"{_money(amount)} {currency}", anchor="ra")
        took = f"{Decimal(share.gpu_s):,.1f} GPU s" + (f" · {_money(Decimal(rate))} an hour" if rate else "")
        page.text(WIDTH - MARGIN, page.y + 17, took, fill=GREY, anchor="ra")
        page.y += ROW
    if not shares:
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


def _first(share: MarginShare) -> tuple[Decimal, str]:
    """Currencies are not added up: the first is drawn."""
    for currency, amount in share.revenue.items():
        return Decimal(amount), currency
    return Decimal(0), ""


def _part(value: Decimal, most: Decimal, room: int) -> float:
    return max(0.0, float(value / most) * room) if most else 0.0


def _money(amount: Decimal) -> str:
    """To the cent; less than one unit with three digits that say something."""
    return f"{amount:,.2f}" if amount == 0 or abs(amount) >= 1 else f"{float(amount):.3g}"


def _short(name: str) -> str:
    """What the built-in font can draw: it has neither a dash, which stands for no pool, nor an ellipsis."""
    if name == NO_POOL:
        return "no pool: reused images"
    return name if len(name) <= 24 else name[:22] + ".."
