"""`farm`: the farm from the command line, over HTTP; and the processes it is made of."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from farm.cli import (
    accounts,
    admin,
    books,
    bulk,
    control,
    events,
    frames,
    inputs,
    jobs,
    models,
    money,
    outputs,
    serve,
    show,
    storage,
    webhooks,
)
from farm.cli.session import read_env_file
from farm.errors import FarmError, Invalid, TooMany, Unauthorized
from farm.settings import settings

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A render farm for generated images. FARM_URL and FARM_API_KEY say which farm, and as whom; on the "
    "machine of `farm up` they need not be set.",
)
for group, title in (
    (jobs.app, "Jobs"),
    (frames.app, "Jobs"),
    (control.app, "Jobs"),
    (events.app, "Jobs"),
    (bulk.app, "Jobs"),
    (outputs.app, "Jobs"),
    (inputs.app, "Jobs"),
    (webhooks.app, "Webhooks"),
    (storage.app, "The store"),
    (models.app, "Models"),
    (books.app, "The books"),
    (money.app, "Money"),
    (accounts.app, "The farm"),
    (admin.app, "The farm"),
    (serve.app, "Processes"),
):
    app.add_typer(group, rich_help_panel=title)


@app.command(rich_help_panel="One machine")
def up(
    data: Annotated[Path | None, typer.Option(help="folder of the farm's data", file_okay=False)] = None,
    api_port: Annotated[int | None, typer.Option(help="8000 or FARM_API_PORT if left out")] = None,
    flower_port: Annotated[int | None, typer.Option(help="5555 or FARM_FLOWER_PORT if left out")] = None,
    workers: Annotated[int, typer.Option(min=0, help="processes of each pool that a CPU can serve")] = 1,
) -> None:
    """Run the whole farm on this machine until Ctrl-C: what no FARM_*_URL names is embedded."""
    from farm.cli.up import run
    from farm.embedded import default_data

    run(
        data or default_data(),
        api_port=settings().api_port if api_port is None else api_port,
        flower_port=settings().flower_port if flower_port is None else flower_port,
        workers=workers,
        say=show.say,
    )


@app.command(rich_help_panel="One machine")
def demo(
    data: Annotated[Path, typer.Option(help="folder of the demo's data", file_okay=False)] = Path(
        "data/demo"
    ),
    workers: Annotated[int, typer.Option(min=1, help="processes of each pool that a CPU can serve")] = 1,
) -> None:
    """Start a farm, let two accounts render, show images, bills and the audit, and stop it."""
    from farm.cli.demo import run

    run(data, workers=workers)


def main() -> None:
    """Errors of the farm become one line each; no traceback tells what one sentence can."""
    read_env_file()
    try:
        app()
    except Invalid as e:
        for fault in e.faults:
            value = "" if fault.value is None else f"{fault.value!r} is not allowed; "
            show.complain(f"{fault.field}: {value}{fault.allowed}")
    except Unauthorized as e:
        show.complain(f"{e.detail or e.title}: set FARM_API_KEY, or load the farm.env that `farm up` wrote")
    except TooMany as e:
        show.complain(f"error: {e.detail or e.title}; come back in {e.retry_after_s} s")
    except FarmError as e:
        show.complain(f"error: {e.detail or e.title}")
    except ValidationError as e:  # of the environment
        for error in e.errors():
            show.complain(f"FARM_{'_'.join(map(str, error['loc'])).upper()}: {error['msg']}")
    sys.exit(1)
