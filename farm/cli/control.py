"""`farm change`: when a job runs, by when it has to be done, and how much of it at once."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from farm.cli.jobs import priority_of, show_job
from farm.cli.session import JobId, Json, on_job
from farm.cli.times import TIME, moment

T = TypeVar("T")

app = typer.Typer()


@app.command()
def change(
    job: JobId,
    priority: Annotated[str | None, typer.Option(help="urgent, standard, bulk, or 0 to 9")] = None,
    start_after: Annotated[str | None, typer.Option(help=f"{TIME}; or: none", metavar="TIME")] = None,
    deadline: Annotated[str | None, typer.Option(help=f"{TIME}; or: none", metavar="TIME")] = None,
    on_late: Annotated[str | None, typer.Option(help="fail or demote what is not done by then")] = None,
    max_parallel: Annotated[
        str | None, typer.Option(help="images rendered at once, at most; or: none", metavar="N")
    ] = None,
    json: Json = False,
) -> None:
    """Change how urgent a job is, when it runs, and how much of it at once. What is on a device is finished."""
    changes: dict[str, Any] = {
        "priority": None if priority is None else priority_of(priority),
        "start_after": _or_none(start_after, lambda text: moment(text, "--start-after")),
        "deadline": _or_none(deadline, lambda text: moment(text, "--deadline")),
        "on_late": on_late,
        "max_parallel": _or_none(max_parallel, _number),
    }
    said = {"priority": priority, "start_after": start_after, "deadline": deadline, "on_late": on_late,
            "max_parallel": max_parallel}  # fmt: skip
    wanted = {name: changes[name] for name, text in said.items() if text is not None}
    if not wanted:
        raise typer.BadParameter("say what to change; see --help")
    with on_job(job) as (farm, job_id):
        show_job(farm.change_job(job_id, wanted), json)


def _or_none(text: str | None, read: Callable[[str], T]) -> T | None:
    return None if text in (None, "none") else read(text)


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise typer.BadParameter("allowed is a number, or: none", param_hint="--max-parallel")
    return int(text)
