"""`farm bulk …`: uploads of files of lines, and what was wrong with which line."""

from typing import Annotated

import typer

from farm.answers import Bulk
from farm.cli import show
from farm.cli.session import Json, as_account

app = typer.Typer()
group = typer.Typer(no_args_is_help=True, help="Files of lines that were sent: list, show, errors, discard.")
app.add_typer(group, name="bulk")

Upload = Annotated[str, typer.Argument(metavar="UPLOAD", help="its id, or: last")]


def _find(upload: str) -> str:
    if upload != "last":
        return upload
    with as_account() as farm:
        newest = farm.bulks(limit=1)
    if not newest:
        raise typer.BadParameter("nothing was sent yet", param_hint="UPLOAD")
    return newest[0].id


@group.command("list")
def every(limit: Annotated[int, typer.Option(help="the newest so many")] = 20, json: Json = False) -> None:
    """List the account's uploads, newest first."""
    with as_account() as farm:
        listed = farm.bulks(limit=limit)
    if json:
        show.as_json(listed)
        return
    show.table(
        ("upload", "name", "status", ">received", ">good", ">bad", "job", "created (UTC)"),
        [(u.id, u.name or "", u.status, u.received, u.good, u.bad, u.job, u.created_at) for u in listed],
        empty="no uploads yet: farm submit --file lines.ndjson",
    )


@group.command("show")
def one(upload: Upload, json: Json = False) -> None:
    """Show one upload."""
    with as_account() as farm:
        _show(farm.bulk(_find(upload)), json)


def _show(upload: Bulk, json: bool) -> None:
    if json:
        show.as_json(upload)
        return
    unit = "images" if upload.format == "matrix" else "bytes"
    facts = [
        ("upload", upload.id),
        ("name", upload.name),
        ("status", upload.status),
        ("kind", f"{upload.format}, {upload.mode}"),
        ("received", f"{upload.received} {unit}, {upload.lines} lines"),
        ("lines", f"{upload.good} good, {upload.bad} bad"),
        ("job", upload.job),
        ("created", upload.created_at),
        ("ended", upload.ended_at),
    ]
    show.table(("", ""), facts, empty="")


@group.command()
def errors(upload: Upload, json: Json = False) -> None:
    """List what is wrong with which line."""
    with as_account() as farm:
        found = farm.bulk_errors(_find(upload))
    if json:
        show.as_json(found)
        return
    show.table(
        (">line", "custom_id", "field", "value", "allowed"),
        [(e.line, e.custom_id, e.field, e.value, e.allowed) for e in found],
        empty="every line was good",
    )


@group.command()
def discard(upload: Upload, json: Json = False) -> None:
    """Give up an upload that is no job yet."""
    name = _find(upload)
    with as_account() as farm:
        farm.discard_bulk(name)
        _show(farm.bulk(name), json)
