"""`farm download`, `farm sync`, `farm manifest`: what comes out of a job, to a folder, an archive or a bucket.

A bucket is written to from here, with the credentials of this environment (AWS_*): the farm never sees them.
"""

import csv
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from farm.cli import show
from farm.cli.copying import Bucket, Copying, Folder, Place, lines_as_csv
from farm.cli.session import JobId, Json, on_job
from farm.client import Farm
from farm.errors import Damaged
from farm.outputs import MANIFEST

LISTED = 20  # what went wrong, at most

app = typer.Typer()


class Form(StrEnum):
    NDJSON = "ndjson"
    CSV = "csv"


class Copied(BaseModel):
    """What a download or a sync did."""

    job: str
    to: str
    copied: int
    already_there: int
    bytes: int
    failed: int


def _copy(farm: Farm, job_id: str, place: Place, *, watch: bool, json: bool) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=show.err) as bar:
        job = farm.job(job_id)
        line = bar.add_task("images", total=job.frames if watch else job.counts.done)
        copying = Copying(farm, job_id, place)
        copying.tell = lambda: bar.update(line, completed=copying.copied + copying.there)
        copying.run(watch=watch)
        bar.update(line, total=copying.copied + copying.there)
        place.end(farm.manifest(job_id))
    done = Copied(
        job=job_id, to=place.name, copied=copying.copied, already_there=copying.there, bytes=copying.bytes,
        failed=len(copying.wrong),
    )  # fmt: skip
    if json:
        show.as_json(done)
    else:
        already = f", {done.already_there} were there" if done.already_there else ""
        show.say(f"{done.copied} images copied to {place.name}{already}; {MANIFEST} names them all")
    for text in copying.wrong[:LISTED]:
        show.complain(text)
    if copying.wrong:
        show.complain(f"{len(copying.wrong)} images are missing")
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------------------ commands

Watch = Annotated[bool, typer.Option("--watch", help="go on until the job has ended")]


@app.command()
def download(
    job: JobId,
    to: Annotated[Path | None, typer.Option(help="folder; it is made", file_okay=False)] = None,
    as_zip: Annotated[Path | None, typer.Option("--zip", help="one ZIP file", dir_okay=False)] = None,
    as_tar: Annotated[Path | None, typer.Option("--tar", help="one tar file", dir_okay=False)] = None,
    watch: Watch = False,
    json: Json = False,
) -> None:
    """Save a job's images and its manifest, and check each against its hash.

    Run it again to go on: what is in the folder with the right hash is not fetched again.
    """
    if sum(place is not None for place in (to, as_zip, as_tar)) > 1:
        raise typer.BadParameter("allowed is one of --to, --zip and --tar")
    if watch and (as_zip or as_tar):
        raise typer.BadParameter("an archive is made once: watch the job first", param_hint="--watch")
    with on_job(job) as (farm, job_id):
        if as_zip or as_tar:
            done = _archive(farm, job_id, as_zip or as_tar or Path(), "zip" if as_zip else "tar")
            show.as_json(done) if json else show.say(f"{done.copied} images in {done.to}, each with its hash")
        else:
            _copy(farm, job_id, Folder(to or Path(job_id)), watch=watch, json=json)


@app.command()
def sync(
    job: JobId,
    to: Annotated[
        str,
        typer.Argument(
            metavar="TO", help="s3://bucket/prefix?endpoint=https://…&region=…, or file:///folder"
        ),
    ],
    watch: Watch = False,
    json: Json = False,
) -> None:
    """Copy a job's images to a bucket of yours, under TO/JOB/, with the AWS_* credentials of this environment.

    They stay here: the images pass through this machine. Run it again to go on; only what is missing is copied.
    """
    with on_job(job) as (farm, job_id):
        _copy(farm, job_id, Bucket(to, job_id), watch=watch, json=json)


@app.command()
def manifest(
    job: JobId,
    form: Annotated[Form, typer.Option("--format")] = Form.NDJSON,
    after: Annotated[int | None, typer.Option(help="only frames after this index")] = None,
    signed: Annotated[
        bool, typer.Option("--signed", help="URLs that work without a key for a while")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="a file, in place of standard output")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="the same as --format ndjson")] = False,
) -> None:
    """Write a line for each frame of a job: its image's URL and hash, its seed, what it cost, or why it failed."""
    with on_job(job) as (farm, job_id):
        lines = farm.manifest(job_id, after=after, signed=signed)
        as_text = (
            lines_as_csv(lines)
            if form is Form.CSV and not json
            else (f"{x.model_dump_json()}\n" for x in lines)
        )
        if out is None:
            for text in as_text:
                print(text, end="")
            return
        new = out.with_name(out.name + ".new")
        with new.open("w", newline="") as file:
            file.writelines(as_text)
        new.replace(out)


def _archive(farm: Farm, job_id: str, path: Path, form: str) -> Copied:
    """Fetch an archive, and check it before it gets its name."""
    new = path.with_name(path.name + ".new")
    columns = (TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn())
    try:
        with Progress(*columns, console=show.err) as bar, new.open("wb") as file:
            line = bar.add_task(form, total=None)
            for piece in farm.archive(job_id, form):
                file.write(piece)
                bar.update(line, advance=len(piece))
        images, size = _check_zip(new) if form == "zip" else _check_tar(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    return Copied(job=job_id, to=str(path), copied=images, already_there=0, bytes=size, failed=0)


def _check_zip(path: Path) -> tuple[int, int]:
    try:
        with zipfile.ZipFile(path) as made:
            text = made.read(MANIFEST).decode()
            return _check(text, made.read)
    except (zipfile.BadZipFile, KeyError) as e:
        raise Damaged(f"the archive came damaged: {e}") from e


def _check_tar(path: Path) -> tuple[int, int]:
    try:
        with tarfile.open(path) as made:

            def read(name: str) -> bytes:
                file = made.extractfile(name)
                return b"" if file is None else file.read()

            return _check(read(MANIFEST).decode(), read)
    except (tarfile.TarError, KeyError) as e:
        raise Damaged(f"the archive came damaged: {e}") from e


def _check(manifest: str, read: Callable[[str], bytes]) -> tuple[int, int]:
    """Compare each image with its line. Returns how many there are, and their bytes.

    Raises Damaged.
    """
    images = size = 0
    for row in csv.DictReader(io.StringIO(manifest, newline="")):
        if row["file"]:
            data = read(row["file"])
            if hashlib.sha256(data).hexdigest() != row["sha256"]:
                raise Damaged(f"{row['file']} came with another hash than the farm says")
            images, size = images + 1, size + len(data)
    return images, size
