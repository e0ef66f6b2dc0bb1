"""What was used, what is owed for it, and what the farm made of it."""

import sys
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from farm.answers import HourlyLine, MarginShare, Statement
from farm.cli import show
from farm.cli.jobs import write
from farm.cli.session import Json, as_account, as_admin, utc
from farm.cli.shares import by_currency, longest, rows
from farm.client import Farm
from farm.errors import FarmError


class _ShowsByDefault(TyperGroup):
    """`farm statement acme --month …` is `farm statement show acme --month …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = (*self.commands, *ctx.help_option_names)
        if not args or args[0] not in known:
            args = ["show", *args]
        return super().parse_args(ctx, args)


app = typer.Typer()
usage = typer.Typer(help="What was used, to the last digit.", invoke_without_command=True)
statement = typer.Typer(
    cls=_ShowsByDefault, help="What an account owes for a month: farm statement ACCOUNT --month 2026-11."
)
app.add_typer(usage, name="usage")
app.add_typer(statement, name="statement")

Since = Annotated[datetime | None, typer.Option(help="UTC")]
Until = Annotated[datetime | None, typer.Option(help="UTC, itself not included")]
OfAccount = Annotated[str | None, typer.Option(help="another account's, for admins")]
Month = Annotated[str, typer.Option(help="a year and a month, UTC", metavar="2026-11")]


def _as(account: str | None) -> Farm:
    """Whoever names an account is an admin, or means their own."""
    return as_account() if account is None else as_admin()


# ------------------------------------------------------------------------------------------------ usage


@usage.callback()
def show_usage(ctx: typer.Context, since: Since = None, until: Until = None, json: Json = False) -> None:
    """Show what the account used, to the last digit."""
    if ctx.invoked_subcommand is not None:
        return
    with as_account() as farm:
        used = farm.usage(since=utc(since), until=utc(until))
    if json:
        show.as_json(used)
        return
    show.table(
        ("model", "method", ">rate", ">images", ">quantity", ">amount", ""),
        [(u.model, u.method, u.rate, u.frames, u.quantity, u.amount, u.currency) for u in used.lines],
        empty="nothing was used",
    )
    for currency, amount in used.totals.items():
        show.say(f"total {amount} {currency}")


@usage.command("hourly")
def show_hourly(
    since: Since = None, until: Until = None, account: OfAccount = None, json: Json = False
) -> None:
    """Show usage hour by hour, of the last day if no times are given; --json has ids for meters.

    Both times are taken down to the start of their hour.
    """
    with _as(account) as farm:
        used = farm.hourly_usage(since=utc(since), until=utc(until), account=account)
    if json:
        show.as_json(used.lines)
        return
    show.table(
        ("hour (UTC)", "model", "method", ">rate", ">images", ">quantity", ">amount", "", ""),
        [_hourly(line) for line in used.lines],
        empty="nothing was used",
    )


def _hourly(line: HourlyLine) -> tuple[Any, ...]:
    return (line.hour, line.model, line.method, line.rate, line.frames - line.reversed, line.quantity, line.amount,
            line.currency, "" if line.final else "may grow")  # fmt: skip


@usage.command("export")
def export_usage(
    cursor: Annotated[str, typer.Option(help="of the last row that is at hand")] = "0",
    account: OfAccount = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="add to this file, after its last row")
    ] = None,
) -> None:
    """Write charges and reversals as NDJSON, in the order they became known.

    Without -o they go to standard output. With -o a file is gone on with where it ends: run it again for what is new.
    """
    start = _last_cursor(out, cursor) if out else cursor
    file = out.open("a") if out else sys.stdout
    count = 0
    try:
        with _as(account) as farm:
            for entry in farm.export_usage(cursor=start, account=account):
                file.write(f"{entry.model_dump_json()}\n")
                count += 1
    finally:
        if out:
            file.close()
    show.complain(f"{count} rows")


def _last_cursor(out: Path, cursor: str) -> str:
    """The cursor a file ends with; a row that was cut off goes, it comes again."""
    from farm.answers import UsageEntry

    if not out.exists():
        return cursor
    with out.open("r+b") as file:
        last, whole = b"", 0
        for line in file:
            if line.endswith(b"\n"):
                last, whole = line, whole + len(line)
        file.truncate(whole)
    return UsageEntry.model_validate_json(last).cursor if last else cursor


@usage.command("reverse")
def reverse(
    frame: Annotated[str, typer.Argument(metavar="FRAME", help="its id: frm_…")],
    reason: Annotated[str, typer.Option(help="why; it is kept with the reversal")],
    json: Json = False,
) -> None:
    """Take back a frame's charge. Money only: the frame stays done."""
    with as_admin() as farm:
        done = farm.reverse(frame, reason)
    show.as_json(done) if json else show.say(f"{done.amount} {done.currency} for {done.frame} taken back")


# ------------------------------------------------------------------------------------------------ statements


@statement.command("show")
def show_statement(
    account: Annotated[str | None, typer.Argument(metavar="[ACCOUNT]", help="your own if left out")] = None,
    month: Month = "",
    as_csv: Annotated[bool, typer.Option("--csv", help="one row a line")] = False,
    as_html: Annotated[bool, typer.Option("--html", help="a page to print or send")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="the file, of --csv or --html")] = None,
    json: Json = False,
) -> None:
    """Show a month's statement; a draft while the month is not closed."""
    if not month:
        raise typer.BadParameter("it is required, as 2026-11", param_hint="--month")
    if as_csv + as_html + json > 1:
        raise typer.BadParameter("only one of --json, --csv and --html")
    with _as(account) as farm:
        if as_csv or as_html:
            _write_statement(farm.statement_as("csv" if as_csv else "html", month, account=account), out)
            return
        bill = farm.statement(month, account=account)
    show.as_json(bill) if json else _statement_table(bill)


def _write_statement(content: bytes, out: Path | None) -> None:
    if out is None:
        sys.stdout.write(content.decode())
        return
    write(out, content)
    show.say(str(out))


def _statement_table(bill: Statement) -> None:
    show.table(
        ("model", "method", ">rate", ">images", ">taken back", ">quantity", ">exactly", ">amount", ""),
        [(x.model, x.method, x.rate, x.frames, x.reversed, x.quantity, x.exact, x.amount, bill.currency)
         for x in bill.lines],
        empty="nothing was used",
    )  # fmt: skip
    state = {"open": "so far; a draft", "closing": "so far; it is being closed"}.get(bill.status, "closed")
    show.say(f"{bill.account} {bill.month}: {bill.total} {bill.currency}, {state}")


@statement.command("list")
def list_statements(
    named: Annotated[str | None, typer.Argument(metavar="[ACCOUNT]", help="your own if left out")] = None,
    account: OfAccount = None,
    json: Json = False,
) -> None:
    """List closed statements, newest first."""
    if named and account and named != account:
        raise typer.BadParameter(f"{named} is named as well", param_hint="--account")
    owner = named or account
    with _as(owner) as farm:
        listed = farm.statements(account=owner)
    if json:
        show.as_json(listed)
        return
    show.table(
        ("account", "month", ">total", "", "closed (UTC)"),
        [(s.account, s.month, s.total, s.currency, s.closed_at) for s in listed],
        empty="no month is closed yet",
    )


@statement.command("close")
def close_statement(
    month: Month,
    account: Annotated[str | None, typer.Argument(metavar="[ACCOUNT]")] = None,
    every: Annotated[bool, typer.Option("--all", help="of every account")] = False,
    json: Json = False,
) -> None:
    """Close a month that is over. Safe to repeat; what becomes known later is on the next statement."""
    if (account is None) != every:
        raise typer.BadParameter("name an account, or --all")
    closed, refused = [], False
    with as_admin() as farm:
        for name in [a.name for a in farm.accounts()] if every else [account or ""]:
            try:
                closed.append(farm.close_statement(name, month))
            except FarmError as e:
                if not every:
                    raise
                refused = True
                show.complain(f"{name}: {e.detail or e.title}")
    if json:
        show.as_json(closed)
    else:
        for bill in closed:
            show.say(f"{bill.account} {bill.month}: {bill.total} {bill.currency}, closed")
    if refused:
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------------------ margin


@app.command()
def margin(
    since: Since = None,
    until: Until = None,
    chart: Annotated[Path | None, typer.Option(help="a PNG of it", metavar="FILE.png")] = None,
    json: Json = False,
) -> None:
    """Show revenue against GPU time by model, pool and account, of the last 30 days if no times are given."""
    with as_admin() as farm:
        found = farm.margin(since=utc(since), until=utc(until))
    if chart:
        from farm.cli.chart import draw

        write(chart, draw(found))
    if json:
        show.as_json(found)
        return
    for title, shares in (("model", found.models), ("pool", found.pools), ("account", found.accounts)):
        _shares_table(title, shares)
    show.table(
        ("pool", ">up, s", ">delivered", ">undelivered", ">other", "of its time: █ delivered ▒ not · other"),
        [(t.name, _s(t.up_s), _s(t.delivered_s), _s(t.undelivered_s), _s(t.other_s),
          _stacked(float(t.up_s), float(t.delivered_s), float(t.undelivered_s))) for t in found.time],
        empty="no worker was there",
    )  # fmt: skip
    if chart:
        show.complain(str(chart))


def _shares_table(title: str, shares: Sequence[MarginShare]) -> None:
    """A row for each name and currency; bars are to scale within a currency."""
    listed = rows(shares)
    full = {currency: longest(some) for currency, some in by_currency(listed).items()}
    named: set[str] = set()
    lines = []
    for row in listed:
        most, time = full[row.currency]
        first = row.share.name not in named
        named.add(row.share.name)
        lines.append((
            *((row.share.name, row.share.frames - row.share.reversed) if first else ("", "")),
            _amount(row.share.revenue, row.currency), _s(row.gpu_s), _amount(row.share.per_gpu_hour, row.currency),
            f"{_bar(row.amount, most, '█')}\n{_bar(row.gpu_s, time, '▒')}",
        ))  # fmt: skip
    show.table(
        (title, ">images", ">revenue", ">GPU s", ">a GPU hour", "█ revenue ▒ GPU time"),
        lines,
        empty=f"nothing was used, by {title}",
    )


def _amount(amounts: dict[str, str], currency: str) -> str:
    return f"{amounts[currency]} {currency}" if currency in amounts else "–"


def _bar(value: Decimal, most: Decimal, block: str, width: int = 32) -> str:
    return block * max(round(width * value / most), value > 0) if most > 0 else ""


def _stacked(up: float, delivered: float, undelivered: float, width: int = 40) -> str:
    if not up:
        return ""
    one, two = round(width * delivered / up), round(width * undelivered / up)
    return "█" * one + "▒" * two + "·" * (width - one - two)


def _s(seconds: str | Decimal) -> str:
    return f"{float(seconds):,.1f}"
