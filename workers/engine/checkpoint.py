"""Where a model's checkpoint lies on this machine. Workers never download."""

from pathlib import Path

import workers
from farm.catalog import Model
from farm.errors import Misconfigured
from farm.settings import settings

INDEX = "model_index.json"  # what diffusers puts into every pipeline's folder


def folder(model: Model) -> Path:
    """Find a model's checkpoint: builtin:NAME, dir:PATH or hub:OWNER/NAME.

    Raises Misconfigured naming every place that was tried.
    """
    kind, _, name = model.source.partition(":")
    match kind:
        case "builtin":
            places = [Path(workers.__file__).parent / name / "weights"]
        case "dir":
            places = [Path(name).expanduser()]
        case _:
            models_dir = settings().models_dir
            places = [models_dir / model.name] if models_dir else []
    for place in places:
        if (place / INDEX).is_file():
            return place
    if kind == "hub" and (cached := _cached(name, model.revision)):
        return cached
    raise Misconfigured(
        f"no checkpoint of model {model.name!r}; looked for {INDEX} in {', '.join(_tried(model, places))}",
        model=model.name,
        source=model.source,
        setting="FARM_MODELS_DIR",
    )


def _cached(repo: str, revision: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _tried(model: Model, places: list[Path]) -> list[str]:
    tried = [str(p) for p in places]
    if model.source.startswith("hub:"):
        from huggingface_hub.constants import HF_HUB_CACHE

        repo = model.source.removeprefix("hub:").replace("/", "--")
        tried.append(f"{HF_HUB_CACHE}/models--{repo}/snapshots/{model.revision}")
    return tried
