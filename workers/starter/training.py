"""One loop for the three networks: a learning rate that rises and falls, averaged weights, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

SEED = 20260


@dataclass(frozen=True)
class Course:
    """How long and how fast one network learns; where its checkpoint lies."""

    name: str
    steps: int
    peak: float  # learning rate
    folder: Path
    memory: float = 0.996  # of the averaged weights, a step
    pause: int = 100  # steps between checkpoints


def fit(module: nn.Module, loss: Callable[[int], torch.Tensor], course: Course) -> nn.Module:
    """Train module, from its last checkpoint if there is one; return it with the averaged weights.

    Each step draws from a seed of its own, so a resumed run sees what an unbroken one would have seen.
    """
    weights = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=course.peak, betas=(0.9, 0.99), weight_decay=0.01)
    average = [p.detach().clone() for p in weights]
    file = course.folder / f"{course.name}.pt"
    first = _resume(file, module, optimizer, average)
    began, running = time.monotonic(), 0.0
    for step in range(first, course.steps):
        turn = step * ranks() + rank()
        torch.manual_seed(SEED + turn)
        optimizer.param_groups[0]["lr"] = course.peak * pace(step / course.steps)
        value = loss(turn)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        _share_gradients(weights)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            # A short memory at first: the earliest weights are noise.
            torch._foreach_lerp_(average, weights, 1 - min(course.memory, (1 + step) / (10 + step)))
        running = value.item() if step == first else 0.98 * running + 0.02 * value.item()
        if rank() > 0:
            continue
        if step % 50 == 0:
            step_s = (time.monotonic() - began) / (step - first + 1)
            print(f"{course.name} {step}/{course.steps} loss {running:.4f} {step_s:.3f} s/step", flush=True)
        if (step + 1) % course.pause == 0 or step + 1 == course.steps:
            _checkpoint(file, step + 1, module, optimizer, average)
    with torch.no_grad():
        for weight, mean in zip(weights, average, strict=True):
            weight.copy_(mean)
    return module.eval()


def ranks() -> int:
    """Return how many processes train together (see `train --ranks`)."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Let rank 0 through alone, then the others: it leaves a file that they find."""
    if rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank() == 0:
        dist.barrier()


def _share_gradients(weights: list[nn.Parameter]) -> None:
    if ranks() == 1:
        return
    gradients = [w.grad for w in weights if w.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= ranks()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def pace(done: float) -> float:
    """Return the share of the peak learning rate: up in the first twelfth, then down to 0."""
    return min(12 * done, 0.5 + 0.5 * math.cos(math.pi * max(0.0, done - 1 / 12) * 12 / 11))


def _checkpoint(file: Path, step: int, module: nn.Module, optimizer, average) -> None:  # type: ignore[no-untyped-def]
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {"step": step, "module": module.state_dict(), "average": average}
    state["optimizer"] = optimizer.state_dict()
    part = file.with_suffix(".part")
    torch.save(state, part)
    part.replace(file)


def _resume(file: Path, module: nn.Module, optimizer, average) -> int:  # type: ignore[no-untyped-def]
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    for mean, saved in zip(average, state["average"], strict=True):
        mean.copy_(saved)
    return int(state["step"])
