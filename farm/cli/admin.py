"""What admins look at and change; `--offline` does it in the database, without an API."""

from typing import Annotated

import typer

from farm.answers import Worker
from farm.cli import show
from farm.cli.offline import Offline
from farm.cli.session import Json, as_admin
from farm.client import Farm

app = typer.Typer()

IsOffline = Annotated[
    bool, typer.Option("--offline", help="work on FARM_DATABASE_URL itself; keys need FARM_SECRET")
]


def books(offline: bool) -> Farm | Offline:
    """The farm as its admin, or its database."""
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


WorkerId = Annotated[str, typer.Argument(metavar="WORKER", help="its id, as `farm workers` lists it")]


@app.command()
def drain(worker: WorkerId, json: Json = False) -> None:
    """Have a worker claim nothing more; what it has in hand it finishes, or gives back after its grace."""
    with as_admin() as farm:
        _show_worker(farm.drain(worker), json)


@app.command()
def undrain(worker: WorkerId, json: Json = False) -> None:
    """Have a drained worker claim again."""
    with as_admin() as farm:
        _show_worker(farm.undrain(worker), json)


def _show_worker(worker: Worker, json: bool) -> None:
    if json:
        show.as_json(worker)
    else:
        show.say(f"{worker.id} is {worker.state}, with {len(worker.packs)} packs in hand")


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
    with books(offline) as there:
        audited = there.audit()
        wrong = list(audited.violations)
        for unseen in audited.unseen:
            show.complain(f"not seen: {unseen.what}, {unseen.detail}")
        if images is not None:
            checked = 0
            for page in there.audit_images(sample):
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
