"""What admins look at and change; `--offline` does it in the database, without an API."""

from typing import Annotated

import typer

from farm.answers import NewKey
from farm.cli import show
from farm.cli.offline import Offline
from farm.cli.session import Json, as_admin
from farm.client import Farm

app = typer.Typer()
accounts = typer.Typer(no_args_is_help=True, help="Who pays.")
keys = typer.Typer(no_args_is_help=True, help="How accounts prove themselves.")
app.add_typer(accounts, name="accounts")
app.add_typer(keys, name="keys")

IsOffline = Annotated[
    bool, typer.Option("--offline", help="work on FARM_DATABASE_URL itself; keys need FARM_SECRET")
]


def _books(offline: bool) -> Farm | Offline:
    return Offline() if offline else as_admin()


@app.command()
def workers(json: Json = False) -> None:
    """List workers, and what they have in hand."""
    with as_admin() as farm:
        listed = farm.workers()
    if json:
        show.as_json(listed)
        return
    show.table(
        ("worker", "pool", "device", "state", "seen (UTC)", ">packs", ">frames", "rendering"),
        [
            (w.id, w.pool, w.device, w.state, w.seen_at, len(w.packs), sum(p.frames for p in w.packs),
             ", ".join(sorted({p.model for p in w.packs})))
            for w in listed
        ],
        empty="no worker has been here: python -m workers --pool starter",
    )  # fmt: skip
    for w in listed:
        for a in w.ailments:
            what = f"no {a.model}" if a.model else "nothing"
            show.say(f"{w.id} claims {what} until {a.until:%H:%M:%S} UTC: {a.reason}")


@app.command()
def audit(
    images: Annotated[
        str | None, typer.Option(help="read stored images too: all, or how many at random", metavar="all|N")
    ] = None,
    offline: IsOffline = False,
    json: Json = False,
) -> None:
    """Check every fact of the books. Exits with 1 if one is not as it must be.

    What was detached is not seen; standard error names it.
    """
    sample = _sample(images)
    with _books(offline) as books:
        audited = books.audit()
        wrong = list(audited.violations)
        for unseen in audited.unseen:
            show.complain(f"not seen: {unseen.what}, {unseen.detail}")
        if images is not None:
            checked = 0
            for page in books.audit_images(sample):
                checked += page.checked
                wrong.extend(page.violations)
            show.complain(f"{checked} images read")
    if json:
        show.as_json(wrong)
    elif wrong:
        show.table(
            ("violation", "subject", "detail"), [(v.violation, v.subject, v.detail) for v in wrong], empty=""
        )
    else:
        show.say("the books are right")
    if wrong:
        raise typer.Exit(1)


def _sample(images: str | None) -> int | None:
    """How many images to read; None: all of them."""
    if images is None or images == "all":
        return None
    if images.isascii() and images.isdigit() and len(images) < 10 and int(images):
        return int(images)
    raise typer.BadParameter("allowed are all, or a number from 1", param_hint="--images")


@accounts.command("list")
def list_accounts(offline: IsOffline = False, json: Json = False) -> None:
    """List accounts."""
    with _books(offline) as books:
        listed = books.accounts()
    if json:
        show.as_json(listed)
        return
    show.table(
        ("account", "currency", ">weight", ">images kept, days", "created (UTC)"),
        [(a.name, a.currency, a.weight, a.retention_days or "for ever", a.created_at) for a in listed],
        empty="no accounts yet: farm accounts add NAME",
    )


@accounts.command("add")
def add_account(
    name: str,
    currency: Annotated[str, typer.Option(help="three capital letters")] = "USD",
    weight: Annotated[int, typer.Option(help="its share beside others of the same priority")] = 1,
    offline: IsOffline = False,
    json: Json = False,
) -> None:
    """Add an account."""
    with _books(offline) as books:
        added = books.add_account(name, currency=currency, weight=weight)
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
    with _books(offline) as books:
        if retention_days is not None:
            changed = books.change_account(name, retention_days=days)
        if prompt_in_images is not None:
            changed = books.put_prompts(name, inside=prompt_in_images)
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


@keys.command("list")
def list_keys(account: str, offline: IsOffline = False, json: Json = False) -> None:
    """List an account's API keys, without their secrets."""
    with _books(offline) as books:
        listed = books.keys(account)
    if json:
        show.as_json(listed)
        return
    show.table(
        ("key", "role", ">version", "created (UTC)", "revoked (UTC)"),
        [(k.id, k.role, k.version, k.created_at, k.revoked_at) for k in listed],
        empty=f"no keys yet: farm keys add {account}",
    )


@keys.command("add")
def add_key(
    account: str,
    role: Annotated[str, typer.Option(help="read, submit or admin")] = "submit",
    offline: IsOffline = False,
    json: Json = False,
) -> None:
    """Add an API key, and show it this once."""
    with _books(offline) as books:
        _show_new(books.add_key(account, role=role), json)


@keys.command("rotate")
def rotate_key(key: str, offline: IsOffline = False, json: Json = False) -> None:
    """Give a key its next secret; the one before stops working."""
    with _books(offline) as books:
        _show_new(books.rotate_key(key), json)


@keys.command("revoke")
def revoke_key(key: str, offline: IsOffline = False, json: Json = False) -> None:
    """Let a key work no more."""
    with _books(offline) as books:
        revoked = books.revoke_key(key)
    show.as_json(revoked) if json else show.say(f"{revoked.id} revoked")


def _show_new(key: NewKey, json: bool) -> None:
    if json:
        show.as_json(key)
        return
    show.complain(f"{key.id} of {key.account}, role {key.role}; it is shown this once:")
    show.say(key.api_key)
