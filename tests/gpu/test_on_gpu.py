"""What only a GPU can show. Needs no Postgres, Redis or storage:

python -m pytest --noconftest -m gpu tests/gpu
"""

from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from farm.catalog import Model  # noqa: E402
from farm.errors import OutOfMemory  # noqa: E402
from farm.spec import Format, Spec  # noqa: E402
from tests.tiny import tiny_model  # noqa: E402
from workers import gpu  # noqa: E402
from workers.engine import Ask, Cancelled, open_engine, open_step_engine  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LEVELS = {
    "float32": 1,
    "bfloat16": 24,
    "float16": 12,
}  # of 255, between alone and packed; random weights amplify


@pytest.fixture(autouse=True)
def _exact_float32() -> Any:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _asks(model: Model, count: int = 3, **changes: Any) -> list[Ask]:
    spec = Spec(model.name, "", "", 64, 64, 6, 4.0, model.sampler, Format.PNG)
    guidance = (1.5, 4.0, 12.0) if "guidance" in model.free else (4.0,)
    prompts = ("x", "a red circle left", "abcd " * 20)
    return [
        Ask(
            replace(spec, prompt=prompts[k % 3], **{"guidance": guidance[k % len(guidance)], **changes}),
            seed=k,
        )
        for k in range(count)
    ]


def _render(engine: Any, asks: list[Ask]) -> list[Any]:
    return list(engine.render(asks, on_step=lambda done, total: None))


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_frame_packed_with_others_equals_the_frame_alone(tmp_path: Path, family: str, dtype: str) -> None:
    model = tiny_model(tmp_path, family, dtype=dtype)
    engine = open_engine(model, device="cuda")
    asks = _asks(model)

    packed = _render(engine, asks)
    alone = [_render(engine, [ask])[0] for ask in asks]

    apart = [int(np.abs(p.astype(int) - a.astype(int)).max()) for p, a in zip(packed, alone, strict=True)]
    assert max(apart) <= LEVELS[dtype], apart


def test_a_seed_gives_nearly_the_same_image_on_cpu_and_gpu(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    asks = _asks(model)

    on_cpu = _render(open_engine(model, device="cpu"), asks)
    on_gpu = _render(open_engine(model, device="cuda"), asks)

    assert (
        max(int(np.abs(c.astype(int) - g.astype(int)).max()) for c, g in zip(on_cpu, on_gpu, strict=True))
        <= 2
    )


def test_a_pack_too_big_for_the_device_is_out_of_memory_and_a_small_one_renders(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    engine = open_engine(model, device="cuda")
    _render(engine, _asks(model, 1, width=1024, height=1024, steps=1))
    gpu.release()
    before = torch.cuda.memory_allocated()
    allowed = torch.cuda.memory_reserved() + (2 << 30)
    torch.cuda.set_per_process_memory_fraction(allowed / gpu.describe().memory_bytes)

    with pytest.raises(OutOfMemory):
        _render(engine, _asks(model, 64, width=1024, height=1024, steps=1))

    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    [image] = _render(engine, _asks(model, 1, width=64, height=64))
    assert image.shape == (64, 64, 3)
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_cancelling_leaves_nothing_on_the_device(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    engine = open_engine(model, device="cuda")
    _render(engine, _asks(model))
    before = torch.cuda.memory_allocated()

    def cancel(done: int, _total: int) -> None:
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        engine.render(_asks(model), on_step=cancel)

    gpu.release()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_the_device_is_described() -> None:
    device = gpu.describe()

    assert device.kind == "cuda"
    assert device.name == torch.cuda.get_device_name(0)
    assert device.memory_bytes > 1 << 30


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux1"])
def test_decoding_on_a_stream_of_its_own_changes_no_image(tmp_path: Path, family: str) -> None:
    made = {}
    for beside in (False, True):
        model = tiny_model(tmp_path, family, engine="step", packs_by="shape", speed={"decode_beside": beside})
        engine = open_step_engine(model, device="cuda")
        for k in range(12):
            [ask] = _asks(model, 1, steps=2 + k % 5, width=256, height=256)
            engine.add(UUID(int=k), replace(ask, seed=k), priority=5)
        done: dict[UUID, Any] = {}
        while engine.frames:
            done |= engine.tick().done
        made[beside] = done

    apart = [
        int(np.abs(made[True][f].astype(int) - image.astype(int)).max()) for f, image in made[False].items()
    ]
    assert max(apart) <= LEVELS["float32"], apart
