"""`farm prices` and `farm budget`: what things cost, and what may be spent."""

from datetime import datetime
from typing import Annotated

import typer

from farm.answers import Budgets, DatedPrice, Quote
from farm.cli import show
from farm.cli.admin import IsOffline
from farm.cli.offline import Offline
from farm.cli.session import Json, as_account, as_admin, utc
from farm.client import Farm

app = typer.Typer()
prices = typer.Typer(no_args_is_help=True, help="What a unit costs, since when and until when.")
budget = typer.Typer(no_args_is_help=True, help="What may be spent, and what of it is gone.")
app.add_typer(prices, name="prices")
app.add_typer(budget, name="budget")

UNITS = {"mpx_step": "a megapixel and step", "image": "an image", "reuse": "a reused image"}

Account = Annotated[str | None, typer.Option(help="another account's, for admins", metavar="NAME")]


def _farm(account: str | None, offline: bool) -> Farm | Offline:
    if offline:
        return Offline()
    return as_account() if account is None else as_admin()


@prices.command("list")
def list_prices(account: Account = None, offline: IsOffline = False, json: Json = False) -> None:
    """List the prices in force and those planned: the account's own come before everybody's."""
    with _farm(account, offline) as farm:
        _show_prices(farm.prices(account=account), json)


@prices.command("history")
def history(
    model: Annotated[str | None, typer.Argument(help="only of this model")] = None,
    account: Account = None,
    offline: IsOffline = False,
    json: Json = False,
) -> None:
    """List every price there was, is and will be."""
    with _farm(account, offline) as farm:
        _show_prices(farm.prices(account=account, model=model, past=True), json)


@prices.command("set")
def set_price(
    model: str,
    rate: Annotated[str, typer.Argument(help="what a unit costs, as 0.0032")],
    account: Annotated[str | None, typer.Option(help="for this account alone", metavar="NAME")] = None,
    method: Annotated[
        str | None, typer.Option(help="mpx_step, image or reuse; the catalog's if left out")
    ] = None,
    currency: Annotated[str | None, typer.Option(help="the account's if left out, or the catalog's")] = None,
    since: Annotated[datetime | None, typer.Option("--from", help="UTC; now if left out")] = None,
    offline: IsOffline = False,
    json: Json = False,
) -> None:
    """Start a price. What was admitted keeps its own."""
    with Offline() if offline else as_admin() as farm:
        price = farm.set_price(
            model, rate, account=account, method=method, currency=currency, since=utc(since)
        )
    until = f" until {show.cell(price.ends_at)}" if price.ends_at else ""
    show.as_json(price) if json else show.say(
        f"{_said(price)} from {show.cell(price.starts_at)} (UTC){until}"
    )


@prices.command("withdraw")
def withdraw_price(
    model: str,
    since: Annotated[datetime, typer.Option("--from", help="UTC; the moment it is planned for")],
    account: Annotated[str | None, typer.Option(help="of this account alone", metavar="NAME")] = None,
    method: Annotated[str | None, typer.Option(help="reuse, for the price of a reused image")] = None,
    currency: Annotated[str | None, typer.Option(help="as when it was set")] = None,
    offline: IsOffline = False,
    json: Json = False,
) -> None:
    """Take out a price that is planned and not in force yet: the one before it goes on."""
    moment = utc(since)
    assert moment is not None
    with Offline() if offline else as_admin() as farm:
        price = farm.withdraw_price(model, moment, account=account, method=method, currency=currency)
    show.as_json(price) if json else show.say(
        f"withdrawn: {_said(price)} from {show.cell(price.starts_at)} (UTC)"
    )


def _said(price: DatedPrice) -> str:
    return (
        f"{price.model} costs {price.rate} {price.currency} {UNITS[price.method]}"
        f" for {price.account or 'everybody'}"
    )


def _show_prices(listed: list[DatedPrice], json: bool) -> None:
    if json:
        show.as_json(listed)
        return
    show.table(
        ("model", ">rate", "", "for", "of", ">version", "from (UTC)", "until (UTC)", "set by"),
        [
            (p.model, p.rate, p.currency, UNITS[p.method], p.account or "everybody", p.version, p.starts_at,
             p.ends_at, p.source)
            for p in listed
        ],
        empty="no prices",
    )  # fmt: skip


@budget.command("show")
def show_budget(account: Account = None, offline: IsOffline = False, json: Json = False) -> None:
    """Show budgets: what was charged and what is held, of the limit. Offline an account has to be named."""
    with _farm(account, offline) as farm:
        _show_budgets(farm.budget(account=account), json)


@budget.command("set")
def set_budget(
    account: Annotated[str, typer.Argument(help="the account's name")],
    limit: Annotated[str, typer.Argument(help="as 250.00, in the account's currency; none takes it away")],
    per: Annotated[str, typer.Option(help="month (UTC), or total")] = "month",
    key: Annotated[str | None, typer.Option(help="of this API key alone", metavar="KEY")] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            help="once so many percent were charged: notify, stop, drain or cancel", metavar="80:notify"
        ),
    ] = None,
    offline: IsOffline = False,
    json: Json = False,
) -> None:
    """Set a budget. It replaces the one of the same account, key and period, thresholds and all."""
    thresholds = [_threshold(text) for text in at or []]
    with Offline() if offline else as_admin() as farm:
        found = farm.set_budget(
            None if limit == "none" else limit, account=account, key=key, period=per, thresholds=thresholds
        )
    _show_budgets(found, json)


def _threshold(text: str) -> tuple[int, str]:
    percent, _, action = text.partition(":")
    if not (percent.isascii() and percent.isdigit() and len(percent) < 10 and action):
        raise typer.BadParameter("allowed is PERCENT:ACTION, as 80:notify", param_hint="--at")
    return int(percent), action


def _show_budgets(found: Budgets, json: bool) -> None:
    if json:
        show.as_json(found)
        return
    show.table(
        ("of", "per", ">limit", ">spent", ">held", ">left", "", "thresholds"),
        [
            (b.key or found.account, b.month or "total", b.limit, b.spent, b.held, b.left, b.currency,
             ", ".join(f"{t.percent}% {t.action}{' reached' if t.reached_at else ''}" for t in b.thresholds))
            for b in found.budgets
        ],
        empty=f"no budget: {found.account} may spend what it likes",
    )  # fmt: skip


def show_quote(quote: Quote, json: bool) -> None:
    """Show what a job would cost."""
    if json:
        show.as_json(quote)
        return
    show.table(
        ("model", ">images", ">quantity", ">rate", "for", ">at most", ""),
        [
            (x.model, x.frames, x.quantity, x.rate, UNITS[x.method], x.amount, quote.currency)
            for x in quote.lines
        ],
        empty="",
    )
    when = (
        f"; it may start {show.cell(quote.expected_start)} and end {show.cell(quote.expected_end)} (UTC)"
        if quote.expected_start
        else "; nothing says yet how long it takes"
    )
    show.say(f"{quote.frames} images, at most {quote.amount} {quote.currency}{when}")
    for room in quote.budgets:
        per = " a month" if room.period == "month" else ""
        show.say(
            room.refused
            or f"it fits: of the {room.budget}'s budget of {room.limit} {room.currency}{per} {room.left} are left"
        )
    show.say(
        f"{quote.id} is good until {show.cell(quote.expires_at)} (UTC): farm submit … --quoted {quote.id}"
    )
