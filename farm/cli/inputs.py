"""Input images from the command line: files are sent, URLs and ids are named."""

from pathlib import Path
from typing import Annotated, Any

import typer

from farm.cli import show
from farm.cli.session import Json, as_account
from farm.client import Farm
from farm.features import STORED

app = typer.Typer()


class Sender:
    """Sends each file once, and names it."""

    def __init__(self, farm: Farm) -> None:
        self._farm = farm
        self._sent: dict[str, str] = {}

    def __call__(self, text: str | None) -> str | None:
        return None if text is None else self.name(text)

    def name(self, text: str) -> str:
        """What a spec calls it."""
        if STORED.fullmatch(text) or text.startswith(("https://", "http://", "data:")):
            return text
        if text not in self._sent:
            self._sent[text] = self._farm.send_input(_read(text)).id
        return self._sent[text]

    def control(self, text: str, *, sketch: bool) -> dict[str, Any]:
        """NET=IMAGE[@SCALE] as a spec says it."""
        net, equals, image = text.partition("=")
        if not equals:
            raise typer.BadParameter(
                "allowed is NET=IMAGE, with @SCALE behind it or without", param_hint="--control"
            )
        found = named("image", image, hint="--control")
        return {
            "net": net,
            **found,
            "image": self.name(found["image"]),
            **({"sketch": True} if sketch else {}),
        }


def named(field: str, text: str, *, hint: str = "--lora") -> dict[str, Any]:
    """WHAT[@SCALE] as a spec says it."""
    what, at, scale = text.rpartition("@")
    if not at:
        return {field: text}
    try:
        return {field: what, "scale": float(scale)}
    except ValueError:
        raise typer.BadParameter(f"{scale!r} is no number", param_hint=hint) from None


def larger(size: tuple[int, int] | None) -> dict[str, int] | None:
    return size and {"width": size[0], "height": size[1]}


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as e:
        raise typer.BadParameter(f"{path}: {e.strerror}", param_hint="--image, --mask or --control") from None


@app.command()
def inputs(
    files: Annotated[list[Path] | None, typer.Argument(help="images to send; none: list them")] = None,
    delete: Annotated[str | None, typer.Option(help="remove this one", metavar="INPUT")] = None,
    limit: Annotated[int, typer.Option(help="the newest so many")] = 50,
    json: Json = False,
) -> None:
    """Send images to start frames from, list them, or remove one."""
    with as_account() as farm:
        if delete is not None:
            farm.delete_input(delete)
            show.say(f"{delete} removed")
            return
        listed = [farm.send_input(_read(str(f))) for f in files] if files else farm.inputs(limit=limit)
    if json:
        show.as_json(listed)
        return
    show.table(
        ("input", "size", ">bytes", "type", ">open jobs", "used (UTC)"),
        [(i.id, f"{i.width}x{i.height}", i.bytes, i.content_type, i.jobs, i.used_at) for i in listed],
        empty="no inputs yet: farm inputs photo.png",
    )
