"""`farm provenance` and `farm rerender`: what made an image, and whether it comes out the same again."""

import time
from typing import Annotated, Any
from uuid import UUID

import typer

from farm import ids
from farm.answers import Provenance, Rerender
from farm.cli import show
from farm.cli.session import Json, as_account, find
from farm.client import Farm

app = typer.Typer()

WAIT_S = 0.2
ROUNDING = 1  # level of 255

FrameArgument = Annotated[
    str, typer.Argument(metavar="FRAME", help="its id, or its job and index: JOB/0, last/3")
]


def _frame(farm: Farm, named: str) -> str:
    """The id that was meant."""
    if named.startswith("frm_"):
        return named
    job, _, index = named.partition("/")
    if not (index.isascii() and index.isdigit() and int(index) < ids.MAX_FRAMES):
        raise typer.BadParameter("allowed are frm_…, or a job and an index as last/0", param_hint="FRAME")
    return ids.public("frm", ids.frame_id(UUID(hex=find(farm, job).removeprefix("job_")), int(index)))


@app.command()
def provenance(frame: FrameArgument, json: Json = False) -> None:
    """Show what made an image: spec, seed, model revision and versions."""
    with as_account() as farm:
        found = farm.provenance(_frame(farm, frame))
    if json:
        show.as_json(found)
        return
    facts: list[tuple[str, Any]] = [
        ("frame", found.frame),
        ("status", f"{found.status}, reused" if found.reused else found.status),
        ("model", found.model),
        ("revision", found.revision),
        *((k, v) for k, v in found.spec.items() if k != "model"),
        ("seed", found.seed if found.seed_given else f"{found.seed}, drawn at random"),
        ("loras", ", ".join(found.loras) or "none"),
        ("rendered by", ", ".join(f"{k} {v}" for k, v in found.versions.items()) or None),
        ("file's SHA-256", found.sha256),
        ("pixels' SHA-256", found.pixel_sha256),
        ("rerender", found.rerender and _verdict(found)),
    ]
    show.table(("", ""), facts, empty="")


@app.command()
def rerender(frame: FrameArgument, json: Json = False) -> None:
    """Render an image once more, at its price, and say whether it is the same. Exits with 1 if not.

    One level of 255 in a channel is within rounding: another number of frames was rendered beside it.
    """
    with as_account() as farm:
        job = farm.rerender(_frame(farm, frame))
        show.complain(f"{job.id} renders it again, for {job.quoted} {job.currency}")
        while not (job := farm.job(job.id)).ended:
            time.sleep(WAIT_S)
        (again,) = farm.frames(job.id)
        found = farm.provenance(again.id)
    if json:
        show.as_json(found)
    else:
        show.say(
            f"{again.id}: {_verdict(found)}"
            if found.rerender
            else f"{again.id} {again.status}: {again.reason}"
        )
    if found.rerender is None or not _is_same(found.rerender):
        raise typer.Exit(1)


def _is_same(again: Rerender) -> bool:
    return again.same_pixels or (
        again.largest_difference is not None and again.largest_difference <= ROUNDING
    )


def _verdict(found: Provenance) -> str:
    again = found.rerender
    if again is None:
        return ""
    changes = ", ".join(
        f"{v.name} {v.before or 'unknown'} before, {v.now or 'unknown'} now" for v in again.versions
    )
    file = "the same file" if again.same_file else "another file"
    return f"{_pixels(again)}, {file}" + (f" ({changes})" if changes else "")


def _pixels(again: Rerender) -> str:
    if again.same_pixels:
        return f"the same pixels as {again.of}"
    if again.largest_difference is None:
        return f"OTHER PIXELS than {again.of}, of which there is no file to compare with"
    levels = "1 level" if again.largest_difference == 1 else f"up to {again.largest_difference} levels"
    apart = f"{again.pixels_differing} pixels differ, by {levels} of 255"
    if _is_same(again):
        return f"the same picture as {again.of} within rounding: {apart}"
    return f"OTHER PIXELS than {again.of}: {apart}"
