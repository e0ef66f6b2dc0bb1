"""What a catalog may say of a model, and what pools serve it."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from farm.catalog import BUILTIN, Catalog, Model, read
from farm.errors import Misconfigured
from farm.settings import settings
from tests.factories import model
from workers.__main__ import _groups, _visible

MINE = """
[models.mine]
title = "mine"
family = "sdxl"
source = "dir:/models/mine"
revision = "1"
licence = "MIT"
dtype = "bfloat16"
side = { min = 512, max = 2048, multiple = 8, default = 1024 }
steps = { min = 1, max = 4, default = 1 }
guidance = { min = 0.0, max = 0.0, default = 0.0 }
sampler = "euler-a"
pack = { frames = 8, pixels = 8388608 }
price = { method = "image", rate = "0.001", currency = "USD" }
"""


def test_built_in_models_come_from_pinned_commits_and_say_their_licence() -> None:
    for entry in read(BUILTIN).values():
        assert entry.licence
        sources = [(entry.source, entry.revision), *((s.source, s.revision) for s in entry.stages)]
        assert all(len(r) == 40 and int(r, 16) for s, r in sources if s.startswith("hub:")), entry.name


def test_every_family_the_farm_knows_has_a_model() -> None:
    families = {m.family for m in read(BUILTIN).values()}

    assert families >= {"sd", "sdxl", "sd3", "flux1", "pixart", "flux2", "flux2-klein", "kandinsky3", "if"}


def test_a_model_of_several_pools_is_served_by_each_and_quoted_by_the_first(tmp_path: Path) -> None:
    (tmp_path / "catalog.toml").write_text(MINE + 'pools = ["fast", "cheap"]\n')

    models = read(tmp_path / "catalog.toml")

    assert (models["mine"].pool, models.pools()) == ("fast", ["cheap", "fast"])
    assert models.pool("cheap") == models.pool("fast") == [models["mine"]]
    with pytest.raises(Misconfigured, match="pools are cheap, fast"):
        models.pool("other")


def test_a_catalog_need_not_repeat_the_families_and_may_change_one(tmp_path: Path) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(MINE + 'pool = "a"\n')
    assert read(path)["mine"].pipeline == "StableDiffusionXLPipeline"

    path.write_text(MINE + 'pool = "a"\n[families.sdxl]\npipeline = "Other"\nsamplers = ["euler-a"]\n')

    assert (read(path)["mine"].pipeline, read(path)["mine"].samplers) == ("Other", ("euler-a",))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": "step"}, 'write packs_by = "shape"'),
        ({"packs_by": "shape"}, 'wants engine = "step"'),
        ({"sampler": "plms"}, "'plms' is not one of"),
        ({"steps": {"min": 1, "max": 4, "default": 8}}, "steps.default 8 is outside 1 to 4"),
        ({"sizes": [{"width": 512, "height": 511}]}, "512 × 511 is outside"),
        ({"devices": 2, "offload": "model"}, "over several devices"),
        ({"devices": 0}, "devices"),
        ({"offload": "disk"}, "offload"),
        ({"loras": {"ink": {"source": "dir:/x", "file": "ink.bin", "sha256": "0" * 64}}}, "loras.ink.file"),
        ({"loras": {"ink": {"source": "dir:/x", "file": "a.safetensors", "sha256": "1"}}}, "loras.ink.sha256"),
        ({"controls": {"canny": {"source": "hub:a/b@main"}}}, "controls.canny.source"),
        ({"stages": [{"pipeline": "P", "source": "dir:/x", "revision": "1", "factor": 4, "steps": 5,
                      "guidance": 4.0, "sampler": "plms"}]}, "['plms'] are unknown"),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_is_refused_with_what_is_allowed(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        model("alpha", **changes)

    assert said in str(caught.value)


def test_a_catalog_that_is_wrong_names_the_file_the_model_and_the_key(tmp_path: Path) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(MINE.replace('"0.001"', '"cheap"') + 'pool = "a"\n')

    with pytest.raises(Misconfigured) as wrong:
        read(path)

    assert f"catalog {path}: ValueError: model 'mine': price.rate: " in str(wrong.value)
    assert "http" not in str(wrong.value)


def test_fused_projections_and_loras_exclude_each_other() -> None:
    lora = {"source": "dir:/x", "file": "ink.safetensors", "sha256": "0" * 64}

    with pytest.raises(ValidationError, match="no place for loras"):
        model("alpha", loras={"ink": lora}, speed={"fused_qkv": True})


def test_a_models_entry_round_trips() -> None:
    for entry in read(BUILTIN).values():
        assert Model.model_validate(entry.model_dump()) == entry


def test_gpus_are_grouped_as_a_pools_largest_model_needs() -> None:
    assert _groups([0, 1, 2, 3], 1) == ["gpu0", "gpu1", "gpu2", "gpu3"]
    assert _groups([0, 1, 2, 3], 2) == ["gpu0+1", "gpu2+3"]
    assert _groups([], 2) == []
    assert [_visible(d) for d in ("gpu2+3", "gpu0", "cpu1")] == ["2,3", "0", ""]
    with pytest.raises(Misconfigured, match="allowed are multiples"):
        _groups([0, 1, 2], 2)


def test_a_pool_knows_models_it_serves_beside_another_pool() -> None:
    models = Catalog([model("alpha", pool="a", pools=("b",)), model("beta", pool="b")])

    assert [m.name for m in models.pool("b")] == ["alpha", "beta"]
    assert models.pools() == ["a", "b"]


def test_a_model_is_found_by_what_other_services_call_it_in_any_case() -> None:
    models = read(BUILTIN)

    assert models.named("Stability.Stable-Diffusion-XL-v1") is models["sdxl"]
    assert models.named("black-forest-labs/FLUX.1-schnell") is models["flux1-schnell"]
    assert models.named("sd15") is models["sd15"]
    assert models.named("dall-e-3") is None


def test_the_default_model_is_the_first_or_the_one_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    models = read(BUILTIN)
    assert models.default.name == "starter"

    for name, found in (("sdxl", "sdxl"), ("FLUX.1-dev", None)):
        monkeypatch.setenv("FARM_DEFAULT_MODEL", name)
        settings.cache_clear()
        if found is None:
            with pytest.raises(Misconfigured, match=r"FLUX\.1-dev"):
                _ = models.default
        else:
            assert models.default.name == found
    monkeypatch.undo()
    settings.cache_clear()


def test_an_alias_of_two_models_is_refused(tmp_path: Path) -> None:
    text = BUILTIN.read_text()
    twice = tmp_path / "catalog.toml"
    twice.write_text(text.replace('aliases = ["stabilityai/sdxl-turbo"]', 'aliases = ["SDXL"]'))

    with pytest.raises(Misconfigured, match="'SDXL' is of sdxl and of sdxl-turbo"):
        read(twice)
