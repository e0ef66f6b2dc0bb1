"""A frame in flight as bytes and back: safetensors with a JSON header, nothing that could run."""

import json
from collections.abc import Mapping
from typing import Any

import diffusers
import safetensors.torch
import torch

from farm.catalog import Model
from farm.spec import fingerprint
from workers.engine.samplers import copied
from workers.engine.step.record import Record

PLAIN = (bool, int, float, str)


def dump(record: Record, model: Model) -> bytes | None:
    """A frame's state; None if its sampler keeps what cannot be written down."""
    tensors = {"latents": record.latents, "generator": record.generator.get_state()}
    before, kept = record.pristine.__dict__, {}
    try:
        for name, value in record.sampler.__dict__.items():
            if name not in before or not _same(value, before[name]):
                kept[name] = _written(value, f"sampler.{name}", tensors)
    except TypeError:
        return None
    facts = {"of": _of(record, model), "stage": record.stage, "index": record.index, "sampler": kept}
    on_cpu = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    return safetensors.torch.save(on_cpu, {"state": json.dumps(facts)})


def restore(record: Record, saved: bytes, model: Model) -> bool:
    """Bring a frame at its first step to where it was saved; False, and no change, if that does not fit."""
    try:
        _restore(record, saved, model)
    except Exception:  # whatever is wrong with the bytes, the frame can start over
        return False
    return True


def stage(saved: bytes) -> int:
    """Which pass of a frame was saved; 0 if that cannot be read."""
    try:
        return int(_read(saved)[0]["stage"])
    except Exception:  # restore() will say so
        return 0


def _restore(record: Record, saved: bytes, model: Model) -> None:
    facts, tensors = _read(saved)
    if (facts["of"], facts["stage"]) != (_of(record, model), record.stage):
        raise ValueError("it is of another frame, or of another version")
    index, latents = int(facts["index"]), tensors["latents"]
    if latents.shape != record.latents.shape or latents.dtype != record.latents.dtype:
        raise ValueError("latents of another shape")
    if not record.first <= index <= len(record.times):
        raise ValueError("a step it does not have")
    sampler, generator = copied(record.sampler), torch.Generator("cpu")
    generator.set_state(tensors["generator"])
    for name, value in facts["sampler"].items():
        if name not in sampler.__dict__ and (name.startswith("__") or hasattr(type(sampler), name)):
            raise ValueError(f"{name} is no state of a sampler")  # some states appear in the first step
        setattr(sampler, name, _value(value, tensors, record.latents.device))
    record.latents, record.index = latents.to(record.latents.device), index
    record.sampler, record.generator = sampler, generator


def _of(record: Record, model: Model) -> str:
    """What decides a frame's pixels: a state is good for nothing else."""
    return f"{diffusers.__version__} {fingerprint(record.ask.spec, model, record.ask.seed).hex()}"


def _read(saved: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    header = json.loads(saved[8 : 8 + int.from_bytes(saved[:8], "little")])  # as the format says
    return json.loads(header["__metadata__"]["state"]), safetensors.torch.load(saved)


def _same(value: Any, before: Any) -> bool:
    if isinstance(value, list) and isinstance(before, list):
        return len(value) == len(before) and all(map(_same, value, before))
    if isinstance(value, PLAIN) and isinstance(before, PLAIN):
        return value == before
    return value is before


def _written(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON, its tensors beside it. Raises TypeError for what is neither number, text, list nor tensor."""
    if value is None or isinstance(value, PLAIN):
        return {"plain": value}
    if isinstance(value, list):
        return {"list": [_written(v, f"{name}.{k}", tensors) for k, v in enumerate(value)]}
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    raise TypeError(type(value).__name__)


def _value(written: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    if "list" in written:
        return [_value(v, tensors, device) for v in written["list"]]
    if "tensor" in written:
        tensor = tensors[written["tensor"]]
        return tensor.to(device) if tensor.ndim else tensor  # sigmas and times stay on the CPU
    return written["plain"]
