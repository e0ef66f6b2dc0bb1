"""Accounts, their API keys, and what they may do at most; `--offline` works in the database, without an API."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from farm.answers import Key, Limits, NewKey, Rates
from farm.cli import show
from farm.cli.admin import IsOffline, books
from farm.cli.session import Json, as_account, utc

app = typer.Typer()
accounts = typer.Typer(no_args_is_help=True, help="Who pays.")
keys = typer.Typer(no_args_is_help=True, help="How accounts prove themselves.")
app.add_typer(accounts, name="accounts")
app.add_typer(keys, name="keys")

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
DEFAULT = "default"


@app.command()
def limits(json: Json = False) -> None:
    """Show what the account may do at most, and what of it is used."""
    with as_account() as farm:
        _show_limits(farm.limits(), json)


# ------------------------------------------------------------------------------------------------ accounts


@accounts.command("list")
def list_accounts(offline: IsOffline = False, json: Json = False) -> None:
    """List accounts."""
    with books(offline) as there:
        listed = there.accounts()
    if json:
        show.as_json(listed)
        return
    show.table(
        ("account", "currency", ">weight", ">images kept, days", "created (UTC)"),
        [(a.name, a.currency, a.weight, a.retention_days or "for ever", a.created_at) for a in listed],
        empty="no accounts yet: farm accounts add NAME",
    )


@accounts.command("show")
def show_account(name: str, offline: IsOffline = False, json: Json = False) -> None:
    """Show an account."""
    with books(offline) as there:
        account = there.account(name)
    if json:
        show.as_json(account)
        return
    show.table(("", ""), account.model_dump().items(), empty="")


@accounts.command("add")
def add_account(
    name: str,
    currency: Annotated[str, typer.Option(help="three capital letters")] = "USD",
    weight: Annotated[int, typer.Option(help="its share beside others of the same priority")] = 1,
    offline: IsOffline = False,
    json: Json = False,
) -> None:
    """Add an account."""
    with books(offline) as there:
        added = there.add_account(name, currency=currency, weight=weight)
    show.as_json(added) if json else show.say(
        f"account {added.name} added; its first key: farm keys add {added.name}"
    )


@accounts.command("set")
def set_account(
    name: str,
    retention_days: Annotated[
        str | None,
        typer.Option(help="days that images are kept after their job's end: 1 to 36500, or: forever"),
    ] = None,
    prompt_in_images: Annotated[
        bool | None,
        typer.Option("--prompt-in-images/--no-prompt-in-images", help="whether files carry their prompt"),
    ] = None,
    offline: IsOffline = False,
    json: Json = False,
) -> None:
    """Say for how long an account's images are kept, and whether they carry their prompt.

    What is past its time is deleted within minutes, for good.
    """
    if retention_days is None and prompt_in_images is None:
        raise typer.BadParameter("say --retention-days, --prompt-in-images or --no-prompt-in-images")
    days = None if retention_days is None or retention_days == "forever" else _days(retention_days)
    with books(offline) as there:
        if retention_days is not None:
            changed = there.change_account(name, retention_days=days)
        if prompt_in_images is not None:
            changed = there.put_prompts(name, inside=prompt_in_images)
    kept = changed.retention_days
    show.as_json(changed) if json else show.say(
        f"images of {changed.name} are kept "
        + (f"{kept} days after their job's end" if kept is not None else "for ever")
        + f", and carry {'their' if changed.prompt_in_images else 'no'} prompt"
    )


def _days(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise typer.BadParameter("allowed are 1 to 36500, or: forever", param_hint="--retention-days")
    return int(text)


Rate = Annotated[str | None, typer.Option(help="requests a second, or: default", metavar="N|default")]
Amount = Annotated[str | None, typer.Option(help="how many, or: default", metavar="N|default")]


@accounts.command("limits")
def limit_account(
    name: str,
    key: Annotated[
        str | None, typer.Option(help="the rates of this key of the account", metavar="KEY")
    ] = None,
    reads: Rate = None,
    writes: Rate = None,
    submissions: Rate = None,
    open_frames: Amount = None,
    inputs: Amount = None,
    input_bytes: Amount = None,
    offline: IsOffline = False,
    json: Json = False,
) -> None:
    """Show what an account, or one of its keys, may do at most; and change what is named."""
    asked = {
        "reads_per_s": _number(reads, "--reads", float), "writes_per_s": _number(writes, "--writes", float),
        "submissions_per_s": _number(submissions, "--submissions", float),
        "open_frames": _number(open_frames, "--open-frames", int), "inputs": _number(inputs, "--inputs", int),
        "input_bytes": _number(input_bytes, "--input-bytes", int),
    }  # fmt: skip
    changes = {n: None if v == DEFAULT else v for n, v in asked.items() if v is not None}
    with books(offline) as there:
        found = there.change_limits(name, changes, key=key) if changes else there.limits(name, key=key)
    _show_limits(found, json)


def _number(text: str | None, option: str, kind: type[float]) -> Any:
    if text is None or text == DEFAULT:
        return text
    try:
        return kind(text)
    except ValueError:
        raise typer.BadParameter(f"allowed are a number, or: {DEFAULT}", param_hint=option) from None


def _show_limits(found: Limits, json: bool) -> None:
    if json:
        show.as_json(found)
        return
    rows: list[tuple[Any, ...]] = [*_rates("account", found.account_rates)]
    if found.key_rates is not None:
        rows += _rates("this key", found.key_rates)
    rows += [
        ("open frames", found.open_frames.used, found.open_frames.allowed),
        ("input images", found.inputs.used, found.inputs.allowed),
        ("their bytes", found.input_bytes.used, found.input_bytes.allowed),
    ]
    show.table((f"limits of {found.account}", ">used", ">allowed"), rows, empty="")


def _rates(whose: str, rates: Rates) -> list[tuple[str, None, str]]:
    return [
        (f"{kind} of {whose}", None, f"{value:g} a second")
        for kind, value in (
            ("reads", rates.reads_per_s), ("writes", rates.writes_per_s), ("submissions", rates.submissions_per_s),
        )
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ keys


@keys.command("list")
def list_keys(account: str, offline: IsOffline = False, json: Json = False) -> None:
    """List an account's API keys, without their secrets."""
    with books(offline) as there:
        listed = there.keys(account)
    if json:
        show.as_json(listed)
        return
    show.table(
        ("key", "name", "may", ">version", "created (UTC)", "used (UTC)", "expires (UTC)", "revoked (UTC)"),
        [
            (k.id, k.name, _may(k), k.version, k.created_at, k.last_used_at, k.expires_at, k.revoked_at)
            for k in listed
        ],
        empty=f"no keys yet: farm keys add {account}",
    )


@keys.command("show")
def show_key(key: str, offline: IsOffline = False, json: Json = False) -> None:
    """Show an API key, without its secret."""
    with books(offline) as there:
        found = there.key(key)
    if json:
        show.as_json(found)
        return
    show.table(("", ""), [(n, _may(found) if n == "scopes" else v) for n, v in found], empty="")


@keys.command("add")
def add_key(
    account: str,
    role: Annotated[
        str | None,
        typer.Option(help="read, submit or admin: each may what the one before may; submit if left out"),
    ] = None,
    scope: Annotated[
        list[str] | None, typer.Option(help="instead of a role: read, submit or admin and no more; repeat it")
    ] = None,
    name: Annotated[str | None, typer.Option(help="what it is for")] = None,
    expires: Annotated[
        str | None, typer.Option(help="a moment in UTC, or a time from now as 90d or 12h")
    ] = None,
    offline: IsOffline = False,
    json: Json = False,
) -> None:
    """Add an API key, and show it this once."""
    moment = None if expires is None else _moment(expires)
    with books(offline) as there:
        added = there.add_key(account, role=role, scopes=scope or None, name=name, expires_at=moment)
    _show_new(added, json)


@keys.command("rename")
def rename_key(key: str, name: str, offline: IsOffline = False, json: Json = False) -> None:
    """Say what a key is for."""
    with books(offline) as there:
        changed = there.change_key(key, {"name": name})
    show.as_json(changed) if json else show.say(f"{changed.id} is {changed.name}")


@keys.command("expire")
def expire_key(
    key: str,
    when: Annotated[str, typer.Argument(help="a moment in UTC, a time from now as 90d or 12h, or: never")],
    offline: IsOffline = False,
    json: Json = False,
) -> None:
    """Say from when on a key opens nothing."""
    moment = None if when == "never" else _moment(when).isoformat()
    with books(offline) as there:
        changed = there.change_key(key, {"expires_at": moment})
    until = (
        "never expires" if changed.expires_at is None else f"expires at {show.cell(changed.expires_at)} UTC"
    )
    show.as_json(changed) if json else show.say(f"{changed.id} {until}")


@keys.command("rotate")
def rotate_key(
    key: str,
    overlap: Annotated[
        str, typer.Option(help="how long the secret before opens too, as 24h; 30d at most")
    ] = "0s",
    offline: IsOffline = False,
    json: Json = False,
) -> None:
    """Give a key its next secret; the one before stops working, at once or after --overlap."""
    with books(offline) as there:
        _show_new(there.rotate_key(key, overlap_s=_seconds(overlap, "--overlap")), json)


@keys.command("revoke")
def revoke_key(key: str, offline: IsOffline = False, json: Json = False) -> None:
    """Let a key work no more."""
    with books(offline) as there:
        revoked = there.revoke_key(key)
    show.as_json(revoked) if json else show.say(f"{revoked.id} revoked")


def _may(key: Key) -> str:
    return " ".join(key.scopes) or key.role


def _moment(text: str) -> datetime:
    try:
        if text[-1:] in UNITS and text[:-1].isdigit():
            return datetime.now(UTC) + timedelta(seconds=_seconds(text, "WHEN"))
        moment = utc(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        moment = None
    if moment is None:
        raise typer.BadParameter(
            f"{text!r} is neither a moment as 2027-01-31T12:00:00 nor a time as 90d or 12h"
        )
    return moment


def _seconds(text: str, option: str) -> int:
    if text[-1:] in UNITS and text[:-1].isascii() and text[:-1].isdigit() and len(text) < 10:
        return int(text[:-1]) * UNITS[text[-1]]
    raise typer.BadParameter("allowed are times as 90s, 30m, 12h or 7d", param_hint=option)


def _show_new(key: NewKey, json: bool) -> None:
    if json:
        show.as_json(key)
        return
    until = "" if key.expires_at is None else f", until {show.cell(key.expires_at)} UTC"
    show.complain(f"{key.id} of {key.account} may {_may(key)}{until}; it is shown this once:")
    if key.previous_until is not None:
        show.complain(f"the one before opens too until {show.cell(key.previous_until)} UTC")
    show.say(key.api_key)
