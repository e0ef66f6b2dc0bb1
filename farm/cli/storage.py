"""`farm storage` and `farm images`: what the store can do, and what leaves it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from typer.core import TyperGroup

from farm.cli import show
from farm.cli.jobs import To, save_images
from farm.cli.session import JobId, Json, on_job
from farm.errors import FarmError, Misconfigured
from farm.settings import settings
from farm.storage import SETTING, Finding, open_store


class _SavesByDefault(TyperGroup):
    """`farm images JOB` is `farm images save JOB`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["save", *args]
        return super().parse_args(ctx, args)


app = typer.Typer()
storage = typer.Typer(no_args_is_help=True, help="Where images live.")
images = typer.Typer(
    cls=_SavesByDefault, no_args_is_help=True, help="A job's images: save them, link to one, delete them."
)
app.add_typer(storage, name="storage")
app.add_typer(images, name="images")


class Tried(BaseModel):
    """One thing that was tried of the store."""

    what: str
    state: str
    detail: str
    took_ms: int


@storage.command()
def check(
    url: Annotated[
        str | None,
        typer.Argument(help="file:///folder or s3://bucket/prefix?…; FARM_STORAGE_URL if left out"),
    ] = None,
    json: Json = False,
) -> None:
    """Write, read back and delete in the store, and show what it can do. Exits with 1 if it cannot hold images."""
    from farm.storage.check import examine

    url = url or settings().storage_url.get_secret_value()
    if not url:
        raise Misconfigured(f"name a store, or set {SETTING}", setting=SETTING)
    found: list[Finding] = []
    error: FarmError | None = None
    try:
        for finding in examine(open_store(url)):
            found.append(finding)
    except FarmError as e:
        error = e
        found.append(Finding("hold images", "failed", str(e)))
    if json:
        show.as_json([Tried(**vars(f)) for f in found])
    else:
        show.table(
            ("", "", ">ms", ""),
            [(f.what, f.state, f.took_ms or None, f.detail) for f in found],
            empty="nothing",
        )
    if error is not None:
        raise typer.Exit(1)


@images.command("save")
def save(job: JobId, to: To = Path("images")) -> None:
    """Save a job's images; `farm images JOB` is short for it."""
    with on_job(job) as (farm, job_id):
        save_images(farm, job_id, to)


@images.command("url")
def image_url(job: JobId, index: Annotated[int, typer.Argument(min=0)] = 0, json: Json = False) -> None:
    """Show a link to an image that works without a key for a while."""
    with on_job(job) as (farm, job_id):
        link = farm.image_url(job_id, index)
    show.as_json(link) if json else print(link.url)


@images.command("delete")
def delete_images(
    job: JobId,
    yes: Annotated[bool, typer.Option("--yes", help="don't ask")] = False,
    json: Json = False,
) -> None:
    """Delete the images of a job that has ended, for good; what it cost stays charged."""
    with on_job(job) as (farm, job_id):
        if not yes and not typer.confirm(f"Delete all images of {job_id}?"):
            raise typer.Abort
        deleted = farm.delete_images(job_id)
    show.as_json(deleted) if json else show.say(
        f"the images of {deleted.job} are deleted; their files go soon"
    )
