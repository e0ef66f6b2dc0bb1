"""`farm models`: what may be asked for; new models, their checkpoints, and what they need of a device."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from farm import entries
from farm.answers import Measured, Model
from farm.cli import show
from farm.cli.session import Json, as_account
from farm.errors import Misconfigured
from farm.settings import settings


class _ListsByDefault(TyperGroup):
    """`farm models` is `farm models list`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer()
models = typer.Typer(cls=_ListsByDefault, help="What may be asked for: list, add, pull and verify models.")
app.add_typer(models, name="models")

Names = Annotated[list[str], typer.Argument(metavar="MODEL…")]


@models.command("list")
def list_models(json: Json = False) -> None:
    """List the models that may be asked for, what they cost, and what they were measured to need."""
    with as_account() as farm:
        listed = farm.models()
    if json:
        show.as_json(listed)
        return
    show.table(
        ("model", "title", "pool", "sides", "steps", ">price", "for", "measured"),
        [
            (m.name, m.title, ", ".join(m.pools or [m.pool]), f"{m.side.min}–{m.side.max}, ×{m.side.multiple}",
             f"{m.steps.min}–{m.steps.max}, {m.steps.default}",
             f"{m.price.rate} {m.price.currency}" if m.price else None,
             {"mpx_step": "a megapixel and step", "image": "an image"}[m.price.method] if m.price else "",
             _measured(m))
            for m in listed
        ],
        empty="the catalog is empty",
    )  # fmt: skip


def _measured(model: Model) -> str:
    """The largest size of each device."""
    largest: dict[str, Measured] = {}
    for m in model.measured:
        if m.device not in largest or m.width * m.height > largest[m.device].width * largest[m.device].height:
            largest[m.device] = m
    return "; ".join(
        f"{m.width}×{m.height} {m.seconds:.1f} s, {m.peak_bytes / 2**30:.1f} GiB on {m.device}"
        for m in largest.values()
    )


@models.command()
def add(
    source: Annotated[str, typer.Argument(help="a checkpoint's folder, or hub:OWNER/NAME@REVISION")],
    name: Annotated[str, typer.Option(help="how specs will name it")],
    licence: Annotated[str, typer.Option(help="under which it may be used")],
    title: Annotated[str | None, typer.Option(help="its name if left out")] = None,
    like: Annotated[str | None, typer.Option(help="the built-in model whose limits it takes over")] = None,
    family: Annotated[str | None, typer.Option(help="whose limits and samplers it has, as lcm-sdxl")] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SOURCE",
            help="a component from elsewhere, as unet=hub:OWNER/NAME@main; may be repeated",
        ),
    ] = None,
    pool: Annotated[list[str] | None, typer.Option(help="whose workers have it; may be repeated")] = None,
    size: Annotated[int | None, typer.Option(help="width and height if none are asked for")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16")] = None,
    offload: Annotated[str | None, typer.Option(help="model or sequential: to the machine's memory")] = None,
    devices: Annotated[int | None, typer.Option(help="GPUs that hold one copy together")] = None,
    rate: Annotated[str | None, typer.Option(help="the price of a unit")] = None,
    method: Annotated[str, typer.Option(help="mpx_step or image")] = "mpx_step",
    currency: Annotated[str, typer.Option(help="three capital letters")] = "USD",
    catalog: Annotated[Path | None, typer.Option(help="FARM_CATALOG if left out", dir_okay=False)] = None,
    json: Json = False,
) -> None:
    """Add a model to the operator's catalog file, after a look at its checkpoint.

    A hub's branch becomes the commit it names today. The farm's processes read the catalog when they start.
    """
    file = catalog or settings().catalog
    if file is None:
        raise Misconfigured(
            "name a catalog file with --catalog, or set FARM_CATALOG: the built-in one belongs to the program",
            setting="FARM_CATALOG",
        )
    made = entries.entry(
        entries.look(source),
        like=like,
        family=family,
        parts=_parts(part or []),
        title=title or name,
        licence=licence,
        pools=list(pool) if pool else [name],
        dtype=dtype,
        offload=offload,
        devices=devices,
        price={"method": method, "rate": rate, "currency": currency} if rate else None,
    )
    if size is not None:
        made |= {"side": {**made["side"], "default": size}, "sizes": []}
    added = entries.add(file, name, made)
    if json:
        show.as_json(added)
        return
    show.say(f"{added.name} ({added.pipeline}, {added.source} at {added.revision}) is in {file}")
    if added.source.startswith("hub:"):
        show.say(f"its checkpoint: farm models pull {added.name}")
    show.say(f"what it needs: farm models verify {added.name} --gpu 0")


def _parts(said: list[str]) -> dict[str, str]:
    split = [p.partition("=") for p in said]
    for name, _, source in split:
        if not (name and source):
            raise typer.BadParameter(
                "allowed is NAME=SOURCE, as unet=hub:OWNER/NAME@main", param_hint="--part"
            )
    return {name: source for name, _, source in split}


@models.command()
def pull(models: Names) -> None:
    """Download the pinned checkpoints of models onto this machine, safetensors only."""
    _run("workers.pull", models)


@models.command()
def verify(
    models: Names,
    gpu: Annotated[str | None, typer.Option(help="the GPU to use, as 0; the CPU if left out")] = None,
    sizes: Annotated[
        str | None, typer.Option(help="as 1024x1024,1216x832; the model's own if left out")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="the model's own if left out")] = None,
    json: Json = False,
) -> None:
    """Load models on this machine, render a frame of each size, and keep what that took as workers' first cap."""
    options = [("--gpu", gpu), ("--sizes", sizes), ("--steps", steps)]
    said = [part for name, value in options if value is not None for part in (name, str(value))]
    _run("workers.verify", [*models, *said, *(["--json"] if json else [])])


def _run(module: str, arguments: list[str]) -> None:
    """Run what needs torch or the hub's client in a process of its own; this one needs neither."""
    ended = subprocess.run([sys.executable, "-m", module, *arguments], check=False, env=os.environ)
    if ended.returncode:
        raise typer.Exit(ended.returncode)
