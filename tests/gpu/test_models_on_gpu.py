"""Speed, memory, trust and further families, as only a GPU can show them. Runs as tests/gpu/test_on_gpu.py does."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from farm.catalog import Model  # noqa: E402
from farm.errors import Misconfigured  # noqa: E402
from farm.spec import Format, Spec  # noqa: E402
from tests.families import SAVE, family_model  # noqa: E402
from tests.tiny import tiny_model  # noqa: E402
from workers import gpu, verify  # noqa: E402
from workers.engine import Ask, open_engine, open_step_engine, speed  # noqa: E402
from workers.engines import Engines  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def asks(model: Model, count: int = 3, **changes: Any) -> list[Ask]:
    spec = Spec(model.name, "a red circle", "", 64, 64, 6, model.guidance.default, model.sampler, Format.PNG)
    return [Ask(replace(spec, prompt=f"a red circle {k}", **changes), seed=k) for k in range(count)]


def render(engine: Any, wanted: list[Ask]) -> list[Any]:
    return list(engine.render(wanted, on_step=lambda done, total: None))


def by_steps(engine: Any, wanted: list[Ask]) -> list[Any]:
    """Step by step, all in flight together; in the order they were asked for."""
    frames = {uuid4(): ask for ask in wanted}
    for frame, ask in frames.items():
        engine.add(frame, ask, priority=5)
    done: dict[Any, Any] = {}
    while engine.frames:
        done |= engine.tick().done
    return [done[frame] for frame in frames]


def apart(one: list[Any], other: list[Any]) -> int:
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(one, other, strict=True))


def with_speed(model: Model, **changes: Any) -> Model:
    return Model.model_validate({**model.model_dump(), "speed": changes})


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux1"])
@pytest.mark.parametrize(
    "changes",
    [{"fused_qkv": True}, {"attention": "flash"}, {"attention": "cudnn"}, {"attention": "efficient"}],
)
def test_faster_ways_give_the_same_images(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    model = tiny_model(tmp_path, family)

    plain = render(open_engine(model, device="cuda"), asks(model))
    fast = render(open_engine(with_speed(model, **changes), device="cuda"), asks(model))

    assert apart(plain, fast) <= 1


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux1"])
def test_compiled_blocks_give_the_same_images_for_any_number_of_rows(tmp_path: Path, family: str) -> None:
    model = tiny_model(tmp_path, family)
    plain = open_engine(model, device="cuda")
    compiled = open_engine(with_speed(model, compile=True), device="cuda")

    for count in (1, 2, 3, 5):
        assert apart(render(plain, asks(model, count)), render(compiled, asks(model, count))) <= 1


def test_compiled_steps_padded_to_buckets_equal_frames_alone(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, engine="step", packs_by="shape", free=())
    plain = open_step_engine(model, device="cuda")
    compiled = open_step_engine(with_speed(model, compile=True), device="cuda")
    wanted = [ask for steps in (4, 6, 9) for ask in asks(model, 1, steps=steps)]

    alone = [by_steps(plain, [ask])[0] for ask in wanted]

    assert apart(alone, by_steps(compiled, wanted)) <= 1


def test_fp8_stays_within_its_own_tolerance(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < speed.FP8_CAPABILITY:
        pytest.skip("this GPU has no FP8")
    model = tiny_model(tmp_path, dtype="bfloat16")

    plain = render(open_engine(model, device="cuda"), asks(model))
    eight = render(open_engine(with_speed(model, fp8=True), device="cuda"), asks(model))

    assert apart(plain, eight) <= speed.FP8_LEVELS


@pytest.mark.parametrize("entry", sorted(SAVE))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_families_that_run_to_completion_do_so(tmp_path: Path, entry: str, dtype: str) -> None:
    model = family_model(tmp_path, entry, dtype=dtype, offload="none")
    engine = open_engine(model, device="cuda")

    packed = render(engine, asks(model, 2))

    alone = [render(engine, [ask])[0] for ask in asks(model, 2)]
    assert apart(packed, alone) <= (1 if dtype == "float32" else 32)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloaded_parts_leave_the_device_and_the_image_stays(tmp_path: Path, offload: str) -> None:
    model = tiny_model(tmp_path, "sdxl")
    expected = render(open_engine(model, device="cuda"), asks(model, 1))
    gpu.release()
    before = torch.cuda.memory_allocated()

    engine = open_engine(model.model_copy(update={"offload": offload}), device="cuda")

    assert apart(expected, render(engine, asks(model, 1))) <= 1
    assert torch.cuda.memory_allocated() <= before + (64 << 20)


def test_a_device_that_is_well_computes_right() -> None:
    assert gpu.probe() == ""


def test_verify_measures_the_devices_memory(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, side={"min": 64, "max": 1024, "multiple": 64, "default": 512})

    small, large = (verify.verify(model, sizes=[(side, side)], steps=2)[0] for side in (64, 1024))

    assert large.device == torch.cuda.get_device_name(0)
    assert large.peak_bytes > small.peak_bytes >= small.resident_bytes > 0
    assert large.peak_two_bytes is not None


def test_an_engine_that_makes_room_gives_its_memory_back(tmp_path: Path) -> None:
    one, other = (tiny_model(tmp_path / name, name=name) for name in ("one", "other"))
    engines = Engines("cuda", memory_bytes=100 << 20, needs={"one": 60 << 20, "other": 60 << 20})
    engines.get(one)
    held = torch.cuda.memory_allocated()

    engines.get(other)

    assert "one" not in engines
    assert torch.cuda.memory_allocated() <= held + (1 << 20)


def test_fp8_without_torchao_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() < speed.FP8_CAPABILITY:
        pytest.skip("this GPU has no FP8")
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)

    with pytest.raises(Misconfigured, match=r"image-farm\[fp8\]"):
        open_engine(with_speed(tiny_model(tmp_path), fp8=True), device="cuda")
