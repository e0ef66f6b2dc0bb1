"""What lies in a checkpoint's folder, by the names of its files."""

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from farm.errors import Misconfigured

INDEX = "model_index.json"  # what diffusers puts into every pipeline's folder
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")  # to read one of these is to run what is in it
WEIGHTS = ".safetensors"
BESIDE = (".json", ".txt", ".model", ".jinja")  # configs and tokenizers
VARIANTS = (".fp16.", ".bf16.", ".non_ema.", ".8bit.", "_fp16.", "openvino", "flax_model")


def components(index: Mapping[str, Any]) -> list[str]:
    """The components a model_index.json names, without those it says are absent."""
    return [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]


def needed(index: Mapping[str, Any], files: Iterable[str], *, model: str) -> list[str]:
    """Of a checkpoint's files, paths as in its folder, those a worker loads: safetensors, configs and tokenizers.

    Raises Misconfigured naming the file if a component's weights are pickled only.
    """
    wanted, parts = [INDEX], set(components(index))
    by_part: dict[str, list[str]] = {}
    for file in files:
        part, _, name = file.partition("/")
        if name and "/" not in name and part in parts and not any(v in name for v in VARIANTS):
            by_part.setdefault(part, []).append(file)
    for inside in by_part.values():
        refuse_pickles(inside, model=model)
        wanted += [f for f in inside if PurePath(f).suffix in (WEIGHTS, *BESIDE)]
    return sorted(wanted)


def refuse_pickles(files: Iterable[str], *, model: str) -> None:
    """Refuse the files of one component if its weights are pickled only.

    Raises Misconfigured naming the first such file.
    """
    names = sorted(files)
    pickled = [f for f in names if PurePath(f).suffix in PICKLES and "training_args" not in f]
    if pickled and not any(f.endswith(WEIGHTS) for f in names):
        raise Misconfigured(
            f"{pickled[0]} is pickled: reading it runs what is in it; only safetensors are loaded",
            model=model,
            file=pickled[0],
        )
