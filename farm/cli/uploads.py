"""What `farm submit` does with a file of lines, or with a matrix."""

import json as json_
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TransferSpeedColumn

from farm.answers import Bulk
from farm.cli import show
from farm.client import Farm
from farm.errors import FarmError, Fault, Invalid

INTERRUPTED = 130
LISTED = 10  # errors that are shown; all of them are in `farm bulk errors`


def submit(
    farm: Farm,
    facts: Mapping[str, Any],
    spec: Mapping[str, Any],
    *,
    file: Path | None,
    matrix: Path | None,
    preview: bool,
    resume: str | None,
    key: str | None,
    json: bool,
) -> str | None:
    """Send a file, or a matrix; spec: fields for lines that leave them out. Returns the job's id; none of a preview."""
    said = {**facts, "spec": {k: v for k, v in spec.items() if k != "count" or v != 1}}
    if not said["spec"]:
        del said["spec"]
    if matrix is not None:
        if file is not None:
            raise typer.BadParameter("send a --file or a --matrix, not both")
        return _matrix(farm, {**said, "matrix": _read(matrix)}, preview=preview, key=key, json=json)
    assert file is not None
    if preview:
        raise typer.BadParameter("it is for a --matrix", param_hint="--preview")
    done = _send(farm, file, said, resume=resume, key=key)
    _tell(done, json)
    return done.job


def _tell(done: Bulk, json: bool) -> None:
    if json:
        show.as_json(done)
        return
    bad = f"; {done.bad} lines are not: farm bulk errors {done.id}" if done.bad else ""
    show.say(f"{done.job} accepted: {done.good} images{bad}")


# ------------------------------------------------------------------------------------------------ files


def _send(farm: Farm, file: Path, said: Mapping[str, Any], *, resume: str | None, key: str | None) -> Bulk:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TransferSpeedColumn(),
               TextColumn("{task.fields[lines]}"))  # fmt: skip
    started: list[Bulk] = []

    with Progress(*columns, console=show.err) as bar:
        line = bar.add_task("sending", total=file.stat().st_size, lines="")

        def tell(upload: Bulk) -> None:
            started[:] = [upload]
            bad = f", {upload.bad} bad" if upload.bad else ""
            bar.update(line, completed=upload.received, lines=f"{upload.good} lines{bad}")

        try:
            return farm.send_file(file, said, upload=resume, idempotency_key=key, tell=tell)
        except KeyboardInterrupt:
            _go_on(file, started)
            raise typer.Exit(INTERRUPTED) from None
        except Invalid as e:
            bar.stop()
            _refused(farm, file, started, e)
            raise typer.Exit(1) from None
        except FarmError:
            _go_on(file, started)
            raise


def _go_on(file: Path, started: list[Bulk]) -> None:
    if started:
        show.complain(f"go on where it stopped: farm submit --file {file} --resume {started[0].id}")


def _refused(farm: Farm, file: Path, started: list[Bulk], error: Invalid) -> None:
    """The first lines that are bad, and where the others are; or what is to be done with an upload that is not over."""
    for fault in error.faults[:LISTED]:
        value = "" if fault.value is None else f"{fault.value!r} is not allowed; "
        show.complain(f"{fault.field}: {value}{fault.allowed}")
    if not started:
        return
    upload = farm.bulk(started[0].id)
    if upload.status == "open":  # its columns are wrong, or there is no room for all of it
        _go_on(file, started)
        show.complain(f"or give it up: farm bulk discard {upload.id}")
    elif upload.bad:
        show.complain(
            f"{upload.bad} lines are bad, nothing was taken; all of them: farm bulk errors {upload.id}"
        )


# ------------------------------------------------------------------------------------------------ matrices


def _read(path: Path) -> Any:
    try:
        return json_.loads(path.read_text())
    except (ValueError, OSError) as e:
        raise Invalid([Fault(str(path), None, f"it must be JSON: {e}")]) from None


def _matrix(farm: Farm, said: Mapping[str, Any], *, preview: bool, key: str | None, json: bool) -> str | None:
    if not preview:
        done = farm.start_bulk(said, idempotency_key=key)
        _tell(done, json)
        return done.job
    found = farm.preview_bulk(said)
    if json:
        show.as_json(found)
        return None
    axes = ("model", "width", "height", "steps", "guidance", "sampler")
    show.table(
        (">#", "prompt", *(f">{axis}" if axis != "model" else axis for axis in axes), ">seed"),
        [
            (
                s.index,
                s.spec["prompt"],
                *(s.spec[axis] for axis in axes),
                "random" if s.seed is None else s.seed,
            )
            for s in found.specs
        ],
        empty="no image",
    )
    show.say(
        f"{found.count} images: {found.prompts} prompts, {found.combinations} combinations, {found.seeds} seeds;"
        f" at most {found.quoted} {found.currency}"
    )
    return None
