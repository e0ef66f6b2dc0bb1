"""The device of this process, its memory, and what was learned about how much fits.

One process has one device: CUDA_VISIBLE_DEVICES is set before torch is imported.
"""

import ctypes
import gc
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farm.catalog import Model
from farm.spec import Spec, shape_key

PROBE_OFF = 0.01  # relative: TF32 is off by 0.001
GROW_AFTER = 20  # full packs in a row before one more frame is tried


@dataclass(frozen=True, slots=True)
class Device:
    """What an admin sees of a device."""

    kind: str  # "cuda" or "cpu"
    name: str
    memory_bytes: int


def device() -> str:
    """Name the device engines run on here: "cuda" if there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def describe() -> Device:
    """Describe this process's device."""
    import torch

    if device() == "cuda":
        facts: Any = torch.cuda.get_device_properties(0)
        return Device("cuda", facts.name, facts.total_memory * torch.cuda.device_count())
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", platform.processor() or platform.machine(), memory_bytes)


def memory_bytes() -> int:
    """How much memory this process's device has."""
    return describe().memory_bytes


def held_bytes() -> int:
    """What this process holds of its device's memory now; on a CPU, of the machine's."""
    import torch

    if device() == "cuda":
        return int(torch.cuda.memory_reserved())
    return _of_status("VmRSS")


def forget_peak() -> None:
    """Start anew with what peak_bytes() says."""
    import torch

    gc.collect()
    if device() == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # of proc(5): resets VmHWM


def peak_bytes() -> int:
    """The most this process held since forget_peak()."""
    import torch

    if device() == "cuda":
        return int(torch.cuda.max_memory_reserved())
    return _of_status("VmHWM")


def _of_status(name: str) -> int:
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:")]
    return int(line.split()[1]) << 10


def probe() -> str:
    """Say what is wrong with this process's device; "" if it computes right. Milliseconds."""
    import torch

    try:
        generator = torch.Generator("cpu").manual_seed(0)
        one, other = (torch.randn(256, 256, generator=generator) for _ in range(2))
        expected = one.double() @ other.double()
        made = (one.to(device()) @ other.to(device())).double().cpu()
    except (RuntimeError, MemoryError) as e:
        return f"it computes nothing: {str(e).partition(chr(10))[0]}"
    off = float((made - expected).abs().max() / expected.abs().max())
    return "" if off <= PROBE_OFF else f"it computes wrong: a product is off by {off:.2g}"


def limit_threads() -> None:
    """Keep torch to one CPU thread: several workers on one machine otherwise slow each other down tenfold."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for libraries that are not loaded yet
    import torch

    torch.set_num_threads(1)


def keep_memory() -> None:
    """Let this process keep the memory of freed tensors: on a CPU the next step needs it again.

    glibc gives blocks from 128 KiB on back to the kernel at once, whose fresh pages then cost 6 to 12 % of a pack of
    8 (starter, 1 thread of an EPYC, 2026). Another C library is left as it is.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 32 << 20)  # the largest that every version takes
        mallopt(trim_threshold, 512 << 20)
        mallopt(top_pad, 16 << 20)


def release() -> None:
    """Give the memory of dropped tensors back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(slots=True)
class _Learned:
    frames: int
    full_packs: int = 0  # in a row since the last change


@dataclass
class Capacity:
    """How many frames of a model and shape fit: the catalog's limit, or less where memory ran out."""

    _learned: dict[str, _Learned] = field(default_factory=dict)

    def frames(self, spec: Spec, model: Model) -> int:
        """How many frames like this to render at once; at least 1."""
        limit = _catalog_frames(spec, model)
        learned = self._learned.get(shape_key(spec, model))
        return min(limit, learned.frames) if learned else limit

    def ran_out(self, spec: Spec, model: Model, *, frames: int) -> None:
        """Halve the cap: a pack of this many frames ran out of memory."""
        self._learned[shape_key(spec, model)] = _Learned(max(1, min(frames, self.frames(spec, model)) // 2))

    def fitted(self, spec: Spec, model: Model, *, frames: int) -> None:
        """Count a pack that fitted; after GROW_AFTER full ones try one frame more."""
        learned = self._learned.get(shape_key(spec, model))
        if learned is None or frames < learned.frames:
            return
        learned.full_packs += 1
        if learned.full_packs >= GROW_AFTER:
            learned.frames, learned.full_packs = learned.frames + 1, 0
        if learned.frames >= _catalog_frames(spec, model):
            del self._learned[shape_key(spec, model)]


def _catalog_frames(spec: Spec, model: Model) -> int:
    return max(1, min(model.pack.frames, model.pack.pixels // spec.largest_pixels))
