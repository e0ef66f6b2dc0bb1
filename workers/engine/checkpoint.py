"""Where checkpoints lie on this machine. Workers never download."""

import json
from pathlib import Path

import workers
from farm import folders
from farm.catalog import Model
from farm.errors import Misconfigured
from farm.folders import INDEX
from farm.settings import settings


def folder(model: Model) -> Path:
    """Find a model's checkpoint: builtin:NAME, dir:PATH or hub:OWNER/NAME.

    Raises Misconfigured naming every place that was tried.
    """
    return find(model.source, model.revision, name=model.name)


def stage_folders(model: Model) -> list[Path]:
    """Find the checkpoints of a model's further stages; a folder of models holds them as NAME-stage-2, -3, ….

    Raises Misconfigured naming every place that was tried.
    """
    return [
        find(stage.source, stage.revision, name=f"{model.name}-stage-{number}")
        for number, stage in enumerate(model.stages, 2)
    ]


def part_folders(model: Model) -> dict[str, Path]:
    """Find the components that a model takes from elsewhere; a folder of models holds them as NAME-PART.

    Raises Misconfigured naming every place that was tried.
    """
    return {
        part: find(*weights.pinned, name=f"{model.name}-{part}", index="config.json")
        for part, weights in model.parts.items()
    }


def find(source: str, revision: str, *, name: str, index: str = INDEX) -> Path:
    """Find the folder of a source that has this file in it.

    Raises Misconfigured naming every place that was tried.
    """
    kind, _, where = source.partition(":")
    match kind:
        case "builtin":
            places = [Path(workers.__file__).parent / where / "weights"]
        case "dir":
            places = [Path(where).expanduser()]
        case _:
            models_dir = settings().models_dir
            places = [models_dir / name] if models_dir else []
    for place in places:
        if (place / index).is_file():
            return place
    if kind == "hub":
        if cached := _cached(where, revision):
            return cached
        places.append(_snapshot(where, revision))
    raise Misconfigured(
        f"no checkpoint of model {name!r}; looked for {index} in {', '.join(map(str, places))}",
        model=name,
        source=source,
        setting="FARM_MODELS_DIR",
    )


def refuse_pickles(place: Path, *, model: str) -> None:
    """Let no component be loaded whose weights are pickled only.

    Raises Misconfigured naming the file.
    """
    for part in ("", *folders.components(json.loads((place / INDEX).read_text()))):
        inside = [str(p) for p in (place / part).glob("*") if p.is_file()]
        folders.refuse_pickles(inside, model=model)


def _cached(repo: str, revision: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _snapshot(repo: str, revision: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots" / revision
