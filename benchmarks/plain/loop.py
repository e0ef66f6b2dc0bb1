"""The least there can be: a process that calls the stock pipeline, pack after pack, and nothing else.

One thread, the same checkpoint, sampler and arguments as the farm's engine; the images are dropped. It reads
packs from stdin, a JSON list a line, and answers how many seconds they took.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import text

from benchmarks.harness import ONE_THREAD, REPOSITORY
from farm.catalog import catalog
from farm.db import transaction
from workers import gpu

ANSWER = "answer: "  # before a line that is meant for us, where others print too


@dataclass(frozen=True)
class Call:
    """The arguments of one pipe() call."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    width: int
    height: int
    steps: int
    guidance: float
    sampler: str


def calls_of(accepted: Sequence[UUID]) -> list[Call]:
    """The packs in which the farm rendered these jobs, in order, each as one call."""
    query = """
        SELECT u.pack_id, array_agg(f.spec->>'prompt' ORDER BY f.id) AS prompts,
               array_agg(f.seed ORDER BY f.id) AS seeds, (array_agg(f.spec))[1] AS spec
        FROM frames AS f JOIN usage AS u ON u.frame_id = f.id
        WHERE f.job_id = ANY(:jobs)
        GROUP BY u.pack_id ORDER BY u.pack_id"""
    with transaction() as db:
        rows = db.execute(text(query), {"jobs": list(accepted)}).all()
    names = ("width", "height", "steps", "guidance", "sampler")
    return [Call(r.prompts, r.seeds, **{name: r.spec[name] for name in names}) for r in rows]


def one_at_a_time(calls: Sequence[Call]) -> list[Call]:
    """The same images, one a call."""
    return [
        replace(call, prompts=[prompt], seeds=[seed])
        for call in calls
        for prompt, seed in zip(call.prompts, call.seeds, strict=True)
    ]


class Bare:
    """The process, seen from outside."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def seconds(self, calls: Sequence[Call]) -> float:
        """Make these calls, one after the other. Returns how many seconds they took."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps([asdict(c) for c in calls]) + "\n")
        self._child.stdin.flush()
        return float(self._child.stdout.readline())


@contextmanager
def bare(model: str, *, log: Path, keep_memory: bool = False) -> Iterator[Bare]:
    """Run the process; it has the checkpoint loaded when this yields.

    keep_memory: with the one setting of the C library that the farm's worker makes.
    """
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.plain.loop", model, *(["keep memory"] if keep_memory else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env={**os.environ, **ONE_THREAD},
            cwd=REPOSITORY,
            text=True,
        )
    try:
        loop = Bare(child)
        loop.seconds([])
        yield loop
    finally:
        child.kill()
        child.wait()


def load(model: str) -> Any:
    """The stock pipeline of a catalog entry, with one thread."""
    import diffusers
    import torch

    from workers.engine import checkpoint

    torch.set_num_threads(1)
    entry = catalog()[model]
    pipeline = getattr(diffusers, entry.pipeline).from_pretrained(
        checkpoint.folder(entry),
        dtype=getattr(torch, entry.dtype),
        use_safetensors=True,
        local_files_only=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()  # as the engine has it
    return pipeline


def render(pipeline: Any, sampler_config: Any, call: Call) -> list[Any]:
    """One stock call; the images are PIL's."""
    import torch

    from workers.engine.samplers import fresh_sampler

    pipeline.scheduler = fresh_sampler(call.sampler, sampler_config, steps=call.steps)
    return list(
        pipeline(
            prompt=list(call.prompts),
            negative_prompt=[""] * len(call.prompts),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in call.seeds],
            width=call.width,
            height=call.height,
            num_inference_steps=call.steps,
            guidance_scale=call.guidance,
        ).images
    )


def main() -> None:
    if sys.argv[2:]:
        gpu.keep_memory()
    pipeline = load(sys.argv[1])
    sampler_config = pipeline.scheduler.config
    for line in sys.stdin:
        calls = [Call(**c) for c in json.loads(line)]
        started = time.perf_counter()
        for call in calls:
            render(pipeline, sampler_config, call)
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
