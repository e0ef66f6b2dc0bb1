"""`farm models`: new entries of an operator's catalog, their checkpoints from a hub, what they need of a device."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from farm import accounts, cli, pricing
from farm.accounts import Role
from farm.api.app import create_app
from farm.catalog import Model, catalog, read
from farm.db import transaction
from farm.errors import Conflict, Misconfigured, NotFound, OutOfMemory
from farm.settings import settings
from farm.spec import Format, Spec
from tests.factories import ask, one
from tests.hub import COMMIT, Hub, hub
from tests.tiny import tiny_model, tiny_sd, tiny_sdxl
from workers import verify
from workers.ailing import note
from workers.engine import Ask, open_step_engine
from workers.gpu import limit_threads
from workers.measured import Measured, Size, recall
from workers.trust import DEVICE, Ailment

GB = 1 << 30


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    limit_threads()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of an operator's catalog that is not there yet."""
    monkeypatch.setenv("FARM_CATALOG", str(tmp_path / "catalog.toml"))
    forget()
    yield tmp_path / "catalog.toml"
    monkeypatch.undo()
    forget()


def forget() -> None:
    settings.cache_clear()
    catalog.cache_clear()


def farm(*arguments: str) -> Any:
    forget()
    return CliRunner().invoke(cli.app, ["models", *arguments])


def add(source: str, *more: str, name: str = "mine") -> Any:
    return farm("add", source, "--name", name, "--licence", "MIT", *more)


# ------------------------------------------------------------------------------------------------ add


def test_a_folder_becomes_an_entry_like_the_built_in_one_of_its_pipeline(own: Path, tmp_path: Path) -> None:
    folder = tiny_sd(tmp_path / "checkpoint")

    result = add(
        str(folder), "--dtype", "float32", "--pool", "a", "--pool", "b", "--rate", "0.01", "--size", "64"
    )

    assert result.exit_code == 0, result.output
    model = read(own)["mine"]
    assert (model.family, model.pipeline, model.revision) == ("sd", "StableDiffusionPipeline", "local")
    assert model.source == f"dir:{folder}"
    assert (model.dtype, model.licence, model.served_by) == ("float32", "MIT", ("a", "b"))
    assert str(model.price.rate) == "0.01"
    assert model.side.default == 64
    open_step_engine(model, device="cpu")


def test_a_second_model_is_added_and_the_first_stays_as_it_was(own: Path, tmp_path: Path) -> None:
    folder = tiny_sd(tmp_path / "checkpoint")
    add(str(folder))
    before = own.read_text()

    add(str(folder), "--like", "sdxl", name="other")

    assert own.read_text().startswith(before.rstrip())
    assert list(read(own)) == ["mine", "other"]
    assert read(own)["other"].side == read(cli.models.entries.BUILTIN)["sdxl"].side


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        (("--dtype", "float8"), Misconfigured, "dtype"),
        (("--size", "65"), Misconfigured, "side.default 65"),
        (("--offload", "disk"), Misconfigured, "offload"),
        (("--like", "nothing"), NotFound, "nothing"),
    ],
)
def test_an_entry_that_is_wrong_says_so_and_the_file_stays(
    own: Path, tmp_path: Path, more: tuple[str, ...], error: type[Exception], said: str
) -> None:
    folder = tiny_sd(tmp_path / "checkpoint")
    add(str(folder))
    before = own.read_text()

    result = add(str(folder), *more, name="other")

    assert isinstance(result.exception, error)
    assert said in str(result.exception)
    assert error is NotFound or f"catalog {own}: ValueError: model 'other': " in str(result.exception)
    assert own.read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["catalog.toml"]


def test_a_catalog_that_cannot_be_read_or_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(tiny_sd(tmp_path / "checkpoint"))
    broken = tmp_path / "broken.toml"
    broken.write_text("[models")

    for catalog_file in (broken, tmp_path / "no folder" / "catalog.toml"):
        result = add(source, "--catalog", str(catalog_file))

        assert isinstance(result.exception, Misconfigured)
        assert f"catalog {catalog_file}: " in str(result.exception)


def test_a_name_is_taken_once(own: Path, tmp_path: Path) -> None:
    folder = tiny_sd(tmp_path / "checkpoint")
    add(str(folder))

    assert isinstance(add(str(folder)).exception, Conflict)


def test_a_folder_without_a_pipeline_is_not_found(own: Path, tmp_path: Path) -> None:
    assert "no model_index.json" in str(add(str(tmp_path)).exception)
    assert not own.exists()


def test_a_pickled_checkpoint_is_refused_by_the_files_name(own: Path, tmp_path: Path) -> None:
    folder = tiny_sd(tmp_path / "checkpoint")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()

    result = add(str(folder))

    assert "unet/diffusion_pytorch_model.bin is pickled" in str(result.exception)
    assert not own.exists()


def test_without_a_catalog_of_ones_own_nothing_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FARM_CATALOG", raising=False)

    result = add(str(tiny_sd(tmp_path / "checkpoint")))

    assert "FARM_CATALOG" in str(result.exception)


def test_a_pipeline_no_built_in_model_has_takes_its_own_sampler(own: Path, tmp_path: Path) -> None:
    folder = tiny_sd(tmp_path / "checkpoint")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionLDM3DPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))

    assert add(str(folder)).exit_code == 0

    assert (read(own)["mine"].family, read(own)["mine"].samplers) == ("other", ("ddim",))


# ------------------------------------------------------------------------------------------------ a hub


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tiny_sd(tmp_path / "served")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.with_suffix(".fp16.safetensors").write_bytes(b"another variant")
    (folder / "whole.ckpt").write_bytes(b"all in one file")
    (folder / "README.md").write_text("a card")
    with hub(folder, repo="nobody/tiny") as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield running


def run_pull(*models: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "workers.pull", *models],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_hubs_branch_becomes_a_commit_and_pull_fetches_safetensors_only(
    own: Path, served: Hub, tmp_path: Path
) -> None:
    assert add("hub:nobody/tiny@main").exit_code == 0
    assert read(own)["mine"].revision == COMMIT
    served.got.clear()

    pulled = run_pull("mine", FARM_MODELS_DIR=str(tmp_path / "models"))

    assert pulled.returncode == 0, pulled.stderr
    assert "unet/diffusion_pytorch_model.safetensors" in served.got
    unwanted = [f for f in served.got if f.endswith((".bin", ".ckpt", ".md")) or "fp16" in f]
    assert unwanted == []
    model = read(own)["mine"].model_copy(update={"source": f"dir:{tmp_path / 'models' / 'mine'}"})
    open_step_engine(model, device="cpu")
    served.got.clear()
    assert run_pull("mine", FARM_MODELS_DIR=str(tmp_path / "models")).returncode == 0
    assert "unet/diffusion_pytorch_model.safetensors" not in served.got  # it is there


def test_pull_refuses_a_pickled_checkpoint_by_the_files_name(own: Path, served: Hub, tmp_path: Path) -> None:
    add("hub:nobody/tiny@main")
    (tmp_path / "served" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "served" / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()

    pulled = run_pull("mine")

    assert pulled.returncode == 1
    assert "unet/diffusion_pytorch_model.bin is pickled" in pulled.stderr
    assert not any(f.endswith(".bin") for f in served.got)


def test_what_the_hub_does_not_have_is_named(own: Path, served: Hub) -> None:
    assert "nobody/gone" in str(add("hub:nobody/gone").exception)
    own.write_text("")
    add("hub:nobody/tiny")
    own.write_text(own.read_text().replace("nobody/tiny", "nobody/gone"))

    pulled = run_pull("mine")

    assert pulled.returncode == 1
    assert f"the hub has no nobody/gone at revision {COMMIT}" in pulled.stderr


def test_a_hub_that_is_away_is_said(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")

    assert "does not answer" in str(add("hub:nobody/tiny").exception)


def test_a_model_that_is_not_in_the_catalog_cannot_be_pulled(own: Path, tmp_path: Path) -> None:
    add(str(tiny_sd(tmp_path / "checkpoint")))

    pulled = run_pull("other")

    assert pulled.returncode == 1
    assert "no model 'other' in the catalog; there are mine" in pulled.stderr
    assert f"mine: nothing to download, it lies in dir:{tmp_path}" in run_pull("mine").stdout


def test_lcm_on_sdxl_is_added_by_its_two_repositories(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_sdxl(tmp_path / "base")
    tiny_sdxl(tmp_path / "distilled", time_cond_proj_dim=8)
    with hub(tmp_path / "distilled" / "unet", repo="nobody/lcm-unet") as running:
        for name, value in (("HF_ENDPOINT", running.url), ("HF_HOME", str(tmp_path / "cache"))):
            monkeypatch.setenv(name, value)
        added = add(
            str(base), "--family", "lcm-sdxl", "--part", "unet=hub:nobody/lcm-unet@main", "--dtype", "float32",
            "--size", "512",
        )  # fmt: skip
        pulled = run_pull("mine", FARM_MODELS_DIR=str(tmp_path / "models"), HF_HUB_OFFLINE="0")

    assert added.exit_code == 0, added.output
    assert pulled.returncode == 0, pulled.stderr
    model = read(own)["mine"]
    assert model.parts["unet"].source == f"hub:nobody/lcm-unet@{COMMIT}"
    assert (model.sampler, model.steps.max, model.guided_rows) == ("lcm", 16, 1)
    monkeypatch.setenv("FARM_MODELS_DIR", str(tmp_path / "models"))
    forget()
    small = {"side": {**model.side.model_dump(), "min": 32, "default": 32}, "sizes": ()}
    engine = open_step_engine(Model.model_validate({**model.model_dump(), **small}), device="cpu")
    frame = uuid4()
    engine.add(
        frame, Ask(Spec("mine", "a circle", "", 32, 32, 2, 8.0, "lcm", Format.PNG), seed=1), priority=5
    )
    while frame in engine.frames:
        result = engine.tick().done.get(frame)
    assert isinstance(result, np.ndarray)


def test_a_part_that_is_not_there_is_named(own: Path, tmp_path: Path) -> None:
    base = str(tiny_sd(tmp_path / "base"))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "diffusion_pytorch_model.bin").write_bytes(b"")

    assert "no component 'net'" in str(add(base, "--part", f"net={base}/unet").exception)
    assert "no config.json" in str(add(base, "--part", f"unet={base}").exception)
    assert "diffusion_pytorch_model.bin is pickled" in str(
        add(base, "--part", f"unet={tmp_path}/pickled").exception
    )
    assert "no 'sdx' is built in" in str(add(base, "--family", "sdx").exception)
    assert "NAME=SOURCE" in add(base, "--part", "unet").output
    assert not own.exists()


# ------------------------------------------------------------------------------------------------ verify


def test_verify_measures_each_size_and_workers_recall_it(books: str, tmp_path: Path) -> None:
    sizes = ({"width": 32, "height": 32}, {"width": 64, "height": 64})
    model = tiny_model(tmp_path, name="alpha", sizes=sizes, steps={"min": 1, "max": 9, "default": 2})

    found = verify.verify(model)

    assert [(f.width, f.height, f.steps) for f in found] == [(64, 64, 2), (32, 32, 2)]
    assert all(f.peak_bytes >= f.resident_bytes > 1 << 20 for f in found)
    assert all(f.seconds > 0 for f in found)
    assert verify.note(found)
    assert verify.note(found)  # the newest stays
    assert one("SELECT count(*) FROM measurements") == 2
    recalled = recall([model], device=found[0].device)["alpha"]
    assert recalled.need_bytes == max(f.peak_bytes for f in found)
    assert recall([model.model_copy(update={"revision": "newer"})], device=found[0].device) == {}
    assert recall([model], device="another") == {}


def test_verify_goes_step_by_step_where_the_catalog_says_so(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, engine="step", packs_by="shape", free=())

    [found] = verify.verify(model, sizes=[(32, 32)], steps=2)

    assert (found.width, found.steps) == (32, 2)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"sizes": [(33, 32)]}, "33x32: tiny-sd takes multiples of 16"),
        ({"steps": 0}, "0 steps: tiny-sd takes 1"),
    ],
)
def test_verify_refuses_what_the_model_does_not_take(
    tmp_path: Path, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(Misconfigured, match=said):
        verify.verify(tiny_model(tmp_path), **asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_verify_measures_no_cpu_where_a_gpu_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    assert verify.main(["starter", "--gpu", "7", "--steps", "1"]) == 1

    assert "there is no GPU 7" in capsys.readouterr().err


def test_two_frames_that_do_not_fit_are_noted_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verify._render

    def full(engine: Any, spec: Spec, frames: int) -> None:
        if frames > 1:
            raise OutOfMemory("CUDA out of memory.")
        real(engine, spec, frames)

    monkeypatch.setattr(verify, "_render", full)

    [found] = verify.verify(tiny_model(tmp_path), sizes=[(32, 32)], steps=1)

    assert found.peak_two_bytes is None
    size = Size(32, 32, 1, found.seconds, found.resident_bytes, found.peak_bytes, None)
    assert size.frames_in(80 * GB) == 1


def test_what_was_measured_is_the_first_cap_and_never_more_than_the_catalogs(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, pack={"frames": 16, "pixels": 16 << 20})
    megapixel = Size(1024, 1024, 20, 4.0, 6 * GB, 9 * GB, 11 * GB)

    def cap(memory: int) -> tuple[int, int]:
        pack = Measured([megapixel]).capped(model, memory_bytes=memory).pack
        return pack.frames, pack.pixels >> 20

    assert cap(24 * GB) == (7, 7)  # 0.92 of 24 GiB: one with 9, and six more with 2 each
    assert cap(80 * GB) == (16, 16)
    assert cap(8 * GB) == (1, 1)  # tried all the same
    assert Measured().capped(model, memory_bytes=GB) is model


def test_the_least_time_of_a_frame_follows_its_steps(tmp_path: Path) -> None:
    measured = Measured([Size(512, 512, 20, 4.0, 0, 1, 2)])
    spec = Spec("sd", "x", "", 512, 512, 10, 4.0, "euler", Format.PNG)

    assert measured.seconds(spec) == 2.0
    assert measured.seconds(Spec("sd", "x", "", 256, 512, 10, 4.0, "euler", Format.PNG)) == 0.0


# ------------------------------------------------------------------------------------------------ shown


@pytest.fixture
def api(database: str) -> Iterator[TestClient]:
    with transaction() as db:
        pricing.sync(db, catalog())
        acme = accounts.create(db, "acme")
        key = accounts.issue_key(db, acme, role=Role.ADMIN)[1]
    with TestClient(create_app()) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        yield client


def test_the_list_shows_what_was_measured_of_a_model_as_it_is_now(api: TestClient) -> None:
    ask(
        "INSERT INTO measurements (model, revision, precision, device, width, height, steps, load_s, seconds,"
        " resident_bytes, peak_bytes) VALUES"
        " ('starter', '1', 'float32', 'a card', 64, 64, 20, 1, 0.4, 1, 2),"
        " ('starter', '0', 'float32', 'a card', 64, 64, 20, 1, 0.4, 1, 2)"
    )

    starter = next(m for m in api.get("/v1/models").json()["models"] if m["name"] == "starter")

    assert [(m["device"], m["seconds"], m["peak_bytes"]) for m in starter["measured"]] == [("a card", 0.4, 2)]
    assert (starter["pools"], starter["revision"], starter["family"]) == (["starter"], "1", "sd")


def test_admins_see_a_sick_worker_and_why(api: TestClient) -> None:
    ask(
        "INSERT INTO workers (id, pool, models, device, state) VALUES ('w', 'starter', '{starter}', 'cpu', 'up')"
    )
    note("w", Ailment("starter", "no checkpoint", 1, 60.0))
    [worker] = api.get("/v1/workers").json()["workers"]
    assert (worker["state"], worker["ailments"][0]["reason"]) == ("up", "no checkpoint")
    assert 'farm_models_set_aside{model="starter"} 1.0' in api.get("/metrics").text

    note("w", Ailment(DEVICE, "it computes wrong", 1, 60.0))

    [worker] = api.get("/v1/workers").json()["workers"]
    assert worker["state"] == "sick"
    assert (worker["ailments"][0]["model"], worker["ailments"][0]["reason"]) == (None, "it computes wrong")
    ask("UPDATE ailments SET until = since")
    [worker] = api.get("/v1/workers").json()["workers"]
    assert (worker["state"], worker["ailments"]) == ("up", [])
