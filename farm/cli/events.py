"""`farm events`: what happened, and what happens."""

import json as jsons
from typing import Annotated

import typer

from farm.answers import Event, Preview, Steps
from farm.cli import show
from farm.cli.session import Json, as_account, find

app = typer.Typer()

PAGE = 1000  # the API tells no more at once


@app.command()
def events(
    job: Annotated[
        str | None,
        typer.Argument(metavar="[JOB]", help="its id, the start of it, or: last; all of them without"),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="go on until the job has ended, or Ctrl-C")
    ] = False,
    kinds: Annotated[
        str | None, typer.Option(help="only these, with commas", metavar="job.*,frame.failed")
    ] = None,
    after: Annotated[int | None, typer.Option(help="only what came after the event of this number")] = None,
    json: Json = False,
) -> None:
    """Show what happened to a job or to the account's. --follow --json prints one object a line."""
    wanted = [k.strip() for k in kinds.split(",")] if kinds else []
    with as_account() as farm:
        job_id = None if job is None else find(farm, job)
        if follow:
            try:
                for told in farm.follow(job_id, after=after, kinds=wanted):
                    _tell(told, json)
            except KeyboardInterrupt:
                raise typer.Exit(130) from None
            return
        page = (
            farm.account_events(after=after or 0, kinds=wanted)
            if job_id is None
            else farm.past_events(job_id, after=after or 0, kinds=wanted)
        )
    if len(page) >= PAGE:
        show.complain(f"the first {len(page)}; go on with: --after {page[-1].number}")
    if json:
        show.as_json(page)
        return
    show.table(
        (">number", "what", "job", "frame", "", "when (UTC)"),
        [(e.number, e.kind, e.job, e.frame, _facts(e), e.at) for e in page],
        empty="nothing has happened",
    )


def _tell(told: Event | Steps | Preview, json: bool) -> None:
    if isinstance(told, Preview):
        return
    if json:
        print(jsons.dumps(told.model_dump(mode="json"), ensure_ascii=False), flush=True)
    elif isinstance(told, Steps):
        steps = ", ".join(f"#{f.index} {f.progress:.0%}" for f in told.frames)
        show.complain(f"         {told.job} {steps}")
    else:
        of = told.frame or told.job or ""
        show.say(f"{told.number:>8} {told.at:%H:%M:%S} {told.kind} {of} {_facts(told)}".rstrip())


def _facts(event: Event) -> str:
    return ", ".join(f"{k} {v}" for k, v in event.data.items())
