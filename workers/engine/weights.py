"""LoRAs and control nets beside a checkpoint, where they lie on this machine. Workers neither download nor unpickle."""

import hashlib
from functools import lru_cache
from pathlib import Path

from farm.catalog import Model, Weights
from farm.errors import RenderFailed
from farm.features import LoraUse
from farm.settings import settings


def lora_file(model: Model, use: LoraUse) -> Path:
    """The file of a LoRA, which is what the catalog says.

    Raises RenderFailed naming the file, or every place that was tried.
    """
    entry = model.loras.get(use.name)
    if entry is None or entry.sha256 != use.sha256:
        raise RenderFailed(f"this worker's catalog has no LoRA {use.name} of SHA-256 {use.sha256}")
    path = _there(entry, places(entry, use.name, "loras"), entry.file)
    check_safetensors(path)
    if (found := _sha256(path, path.stat().st_mtime_ns)) != entry.sha256:
        raise RenderFailed(f"{path} is not the LoRA {use.name}: its SHA-256 is {found}, not {entry.sha256}")
    return path


def net_folder(model: Model, name: str) -> Path:
    """The folder of a control net: config.json and diffusion_pytorch_model.safetensors.

    Raises RenderFailed naming the file, or every place that was tried.
    """
    entry = model.controls.get(name)
    if entry is None:
        raise RenderFailed(f"this worker's catalog has no control net {name} of {model.name}")
    folder = _there(entry, places(entry, name, "controls"), "config.json").parent
    for path in sorted(folder.glob("diffusion_pytorch_model*")):
        if path.suffix == ".safetensors":
            check_safetensors(path)
            return folder
    pickled = next(folder.glob("*.bin"), None) or next(folder.glob("*.pt*"), None)
    if pickled is not None:
        raise RenderFailed(f"{pickled} is pickled: it could run anything; convert it to safetensors")
    raise RenderFailed(f"{folder} has no diffusion_pytorch_model.safetensors")


def places(entry: Weights, name: str, kind: str) -> list[Path]:
    """The folders where such files may lie, the first that has them counts."""
    source, _, where = entry.source.partition(":")
    if source == "dir":
        return [Path(where).expanduser()]
    models_dir = settings().models_dir
    own = [models_dir / kind / name] if models_dir else []
    from huggingface_hub.constants import HF_HUB_CACHE

    repo, _, commit = where.partition("@")
    return [*own, Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots" / commit]


def _there(entry: Weights, tried: list[Path], file: str) -> Path:
    for place in tried:
        if (place / file).is_file():
            return place / file
    raise RenderFailed(
        f"there is no {file} of {entry.source}; looked in {', '.join(map(str, tried))}",
        setting="FARM_MODELS_DIR",
    )


def check_safetensors(path: Path) -> None:
    """Raises RenderFailed naming the file if it is not what its name says: pickles get renamed."""
    with path.open("rb") as file:
        head = file.read(9)
    size = int.from_bytes(head[:8], "little")
    if len(head) < 9 or head[8:] != b"{" or size > min(100_000_000, path.stat().st_size):
        kind = (
            "pickled: it could run anything" if head[:2] in (b"\x80\x02", b"\x80\x04", b"PK") else "damaged"
        )
        raise RenderFailed(f"{path} is no safetensors file but {kind}")


@lru_cache(maxsize=64)
def _sha256(path: Path, _changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
