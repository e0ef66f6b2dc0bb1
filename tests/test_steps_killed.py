"""A worker that goes step by step dies in the middle: its frames go on elsewhere, equal to a quiet run."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from PIL import Image
from redis import Redis as RedisClient

from farm import pricing, queue, tokens
from farm.catalog import BUILTIN, Catalog, Model, catalog
from farm.db import transaction
from farm.settings import settings
from farm.spec import Spec
from farm.storage import open_store
from tests.factories import account, ask, one, submit, violations
from tests.tiny import good, levels_apart, tiny_model
from workers import engines
from workers.engine import Ask, Pixels, StepEngine, open_step_engine
from workers.gpu import limit_threads
from workers.run import Worker

ROOT = Path(__file__).parent.parent
STEP = {"engine": "step", "packs_by": "shape", "free": (), "pack": {"frames": 3, "pixels": 16 << 12}}
MIXED = [  # steps, guidance, sampler
    (50, 7.5, "dpm++2m"), (36, 1.0, "euler"), (45, 3.0, "euler-a"), (50, 12.0, "ddim"),
    (38, 5.0, "unipc"), (30, 0.0, "heun"), (40, 2.5, "dpm++2m-karras"), (49, 9.0, "dpm++2m-sde"),
]  # fmt: skip

pytestmark = pytest.mark.timeout(240)


def test_eight_mixed_frames_of_a_killed_worker_are_finished_by_another(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given eight frames of two accounts in flight, in several packs
    monkeypatch.setenv("FARM_CHECKPOINT_S", "0.02")
    settings.cache_clear()
    model = tiny_model(tmp_path / "checkpoint", "sd", **STEP)
    (tmp_path / "model.json").write_text(model.model_dump_json())
    every = mixed(model)
    with (tmp_path / "worker.log").open("wb") as log:
        killed = subprocess.Popen(
            [sys.executable, "-m", "tests.stepper", "killed", str(tmp_path / "model.json")],
            cwd=ROOT, stderr=log, stdout=log,
        )  # fmt: skip
    try:
        with RedisClient.from_url(settings().broker_url.get_secret_value()) as client:
            await_that(lambda: len(client.keys("farm.saved.*")) == 8, killed, tmp_path / "worker.log")
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert one("SELECT count(*) FROM frames WHERE status = 'claimed'") == 8
    assert one("SELECT count(DISTINCT pack_id) FROM frames") >= 3

    # when their leases have run out
    ask("UPDATE packs SET lease_until = clock_timestamp() - interval '1 s'")
    with transaction() as session:
        queue.reclaim(session)
    resumed = finish(model, monkeypatch)

    # then
    assert ask("SELECT status, attempts FROM frames") == [("done", 0)] * 8
    assert one("SELECT count(*) FROM usage") == 8
    assert violations() == []
    assert resumed == 8
    quiet = open_step_engine(model, device="cpu")
    for job in every:
        assert levels_apart(image_of(job), alone(quiet, job)) <= 1


def mixed(model: Model) -> list[UUID]:
    limit_threads()
    models = Catalog([model])
    with transaction() as session:
        pricing.sync(session, models)
    callers = [account("a"), account("b")]
    return [
        submit(callers[k % 2], models=models, model=model.name, steps=n, guidance=g, sampler=s, seed=k)
        for k, (n, g, s) in enumerate(MIXED)
    ]


def await_that(holds: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def finish(model: Model, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let another worker render what is left. Returns how many frames it went on with where they were."""
    states: list[bytes] = []

    def opened(model: Model, *, device: str) -> StepEngine:
        engine: Any = open_step_engine(model, device=device)
        add = engine.add

        def noted(frame: UUID, ask: Ask, *, priority: int, saved: bytes | None = None) -> None:
            add(frame, ask, priority=priority, saved=saved)
            states.extend([saved] if saved is not None and engine.save(frame) is not None else [])

        engine.add = noted
        return engine  # type: ignore[no-any-return]

    monkeypatch.setattr(engines, "open_step_engine", opened)
    Worker("other", pool=model.pool, models=[model], device="cpu").burst(lambda _: None)
    return len(states)


def image_of(job: UUID) -> Pixels:
    key = one(
        "SELECT i.key FROM frames AS f JOIN images AS i ON i.id = f.image_id WHERE f.job_id = :job", job=job
    )
    data = open_store(settings().storage_url.get_secret_value()).get(key)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def alone(engine: StepEngine, job: UUID) -> Pixels:
    """The same frame with nothing beside it, and never interrupted."""
    ((frame, spec, seed),) = ask(
        "SELECT id, CAST(spec AS text), seed FROM frames WHERE job_id = :job", job=job
    )
    engine.add(frame, Ask(Spec.from_text(spec), seed), priority=5)
    while frame in engine.frames:
        done = engine.tick().done
    return good(done[frame])


# ------------------------------------------------------------------------------------------ told to stop


@pytest.fixture
def node(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A real node at work on four frames, all of which it has saved; their model is not built in."""
    path = tmp_path / "catalog.toml"
    path.write_text(BUILTIN.read_text() + ENTRY)
    monkeypatch.setenv("FARM_CATALOG", str(path))
    monkeypatch.setenv("FARM_GRACE_S", "600")
    monkeypatch.setenv("FARM_CHECKPOINT_S", "0.05")
    settings.cache_clear()
    catalog.cache_clear()
    with transaction() as session:
        pricing.sync(session, catalog())
    caller = account()
    for k in range(2):
        submit(caller, 2, models=catalog(), model="stepper", steps=900 + k)
    with (tmp_path / "node.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.stepnode", "--pool", "stepper"],
            cwd=ROOT, stderr=log, stdout=log, start_new_session=True,
        )  # fmt: skip
    try:
        up = "SELECT count(*) FROM workers WHERE state = 'up'"
        await_that(lambda: one(up) == 1, process, tmp_path / "node.log")
        tokens.send("stepper", priority=5)
        with RedisClient.from_url(settings().broker_url.get_secret_value()) as client:
            await_that(lambda: len(client.keys("farm.saved.*")) == 4, process, tmp_path / "node.log")
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        catalog.cache_clear()


def test_a_node_told_to_stop_gives_its_frames_back_at_once_where_they_are(
    node: subprocess.Popen[bytes],
) -> None:
    # when
    node.send_signal(signal.SIGTERM)

    # then it does not take the grace, nor as long as the frames would
    assert node.wait(60) == 0
    assert ask("SELECT status, suspect, attempts FROM frames") == [("queued", False, 0)] * 4
    assert one("SELECT count(*) FROM packs WHERE closed_at IS NULL") == 0
    assert one("SELECT min(gpu_ms) FROM packs") > 0
    with RedisClient.from_url(settings().broker_url.get_secret_value()) as client:
        assert len(client.keys("farm.saved.*")) == 4
    assert violations() == []


ENTRY = """
[models.stepper]
title = "noise, step by step"
family = "sd"
engine = "step"
packs_by = "shape"
source = "dir:nowhere"
revision = "noise"
licence = "none"
dtype = "float32"
side = { min = 64, max = 64, multiple = 8, default = 64 }
steps = { min = 1, max = 1000, default = 20 }
guidance = { min = 0.0, max = 30.0, default = 4.0 }
sampler = "dpm++2m"
pack = { frames = 4, pixels = 131072, rows = 8 }
pool = "stepper"
price = { method = "image", rate = "0.001", currency = "USD" }
"""
