"""A catalog entry's checkpoint as a stock pipeline, on its device."""

import inspect
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")  # read when diffusers is imported

import diffusers
import torch
import transformers

from farm.catalog import Model
from farm.errors import Misconfigured
from farm.folders import INDEX
from workers.engine import checkpoint
from workers.engine.faults import failure, is_out_of_memory
from workers.engine.speed import speed_up

UNWANTED = {  # by the names of what a pipeline is made of
    "safety_checker": None,
    "requires_safety_checker": False,
    "add_watermarker": False,
    "watermarker": None,
}


def load(model: Model, *, device: str) -> Any:
    """Load a model's stock pipeline onto a device.

    Raises Misconfigured naming where the checkpoint was looked for, the file that is pickled, or what the
    device cannot do; OutOfMemory if it does not fit.
    """
    place = checkpoint.folder(model)
    return load_from(place, model.pipeline, model, device=device, **_parts(place, model))


def _parts(place: Path, model: Model) -> dict[str, Any]:
    """The components that the catalog takes from elsewhere, of the classes that the checkpoint names."""
    if not model.parts:
        return {}
    index = json.loads((place / INDEX).read_text())
    loaded = {}
    for name, found in checkpoint.part_folders(model).items():
        if not isinstance(index.get(name), list):
            raise Misconfigured(f"{place} has no component {name!r}", model=model.name, setting="parts")
        library, kind = index[name]
        loaded[name] = getattr(
            {"diffusers": diffusers, "transformers": transformers}[library], kind
        ).from_pretrained(
            found, dtype=getattr(torch, model.dtype), use_safetensors=True, local_files_only=True
        )
    return loaded


def load_from(place: Path, pipeline: str, model: Model, *, device: str, **parts: Any) -> Any:
    """Load the pipeline of this class from a folder; parts are passed instead of loaded, as text_encoder=None."""
    checkpoint.refuse_pickles(place, model=model.name)
    for library in (diffusers, transformers):  # their warnings quote prompts, which are not for our logs
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        pipe = _read(place, pipeline, model, device, parts)
        _place(pipe, model, device)
        speed_up(pipe, model, device=device)
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        full = failure(e)
    else:
        return pipe
    raise full  # out of the except block, whose traceback holds the weights


def _read(place: Path, pipeline: str, model: Model, device: str, parts: dict[str, Any]) -> Any:
    kind = getattr(diffusers, pipeline, None)
    if kind is None:
        raise Misconfigured(f"diffusers {diffusers.__version__} has no {pipeline}", model=model.name)
    known = inspect.signature(kind.__init__).parameters
    spread = {"device_map": "balanced"} if model.devices > 1 and device == "cuda" else {}
    try:
        pipe = kind.from_pretrained(
            place,
            dtype=getattr(torch, model.dtype),
            use_safetensors=True,  # the default also unpickles
            local_files_only=True,
            **{name: value for name, value in UNWANTED.items() if name in known},
            **parts,
            **spread,
        )
    except (OSError, ValueError, ImportError) as e:  # ImportError: of what its tokenizer needs
        raise Misconfigured(f"the checkpoint in {place} cannot be loaded: {e}", model=model.name) from e
    pipe.set_progress_bar_config(disable=True)
    if hasattr(getattr(pipe, "vae", None), "enable_slicing"):
        pipe.vae.enable_slicing()  # memory peaks in the decoder, which gains nothing from a batch
    return pipe


def _place(pipe: Any, model: Model, device: str) -> None:
    if device == "cuda" and model.devices > 1:
        return  # accelerate has spread it out
    if device == "cuda" and model.offload == "model":
        pipe.enable_model_cpu_offload()
    elif device == "cuda" and model.offload == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.to(device)
