"""One bad frame fails alone, the engine goes on, and a checkpoint that is not there is named."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from farm.errors import Misconfigured, OutOfMemory, RenderFailed
from farm.settings import settings
from tests.tiny import (
    NOISE,
    good,
    mixed_asks,
    open_tiny,
    render,
    seen_latents,
    tiny_ask,
    tiny_engine,
    tiny_model,
    tiny_sd,
)
from workers.engine import Cancelled, open_engine
from workers.engine.pipe import PipeEngine
from workers.gpu import limit_threads


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    limit_threads()


@contextmanager
def _poisoned(engine: PipeEngine, row: int) -> Iterator[None]:
    """Make the text of one row NaN, before it meets its neighbours in the UNet."""

    def poison(_module: Any, _args: Any, output: Any) -> None:
        output.last_hidden_state[row] = torch.nan

    hook = engine.pipe.text_encoder.register_forward_hook(poison)
    yield
    hook.remove()


def test_a_frame_of_nan_fails_alone_and_its_neighbours_are_unharmed() -> None:
    engine = tiny_engine("sd")
    asks = mixed_asks(engine.model, guidance=1.0, negative_prompt="")  # one run of the text encoder
    quiet = render(engine, asks)

    with _poisoned(engine, row=1):
        results = render(engine, asks)

    assert isinstance(results[1], RenderFailed)
    assert results[1].facts == {"frames": [1]}
    for k in (0, 2):
        assert np.array_equal(good(results[k]), good(quiet[k]))


def test_a_black_image_is_a_failure() -> None:
    engine = tiny_engine("sd")
    hook = engine.pipe.vae.decoder.register_forward_hook(lambda *_: torch.full((1, 3, 32, 32), -1.0))

    results = render(engine, mixed_asks(engine.model))
    hook.remove()

    assert [r.detail for r in results if isinstance(r, RenderFailed)] == ["the image is all black"] * 3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
    ],
)
def test_no_memory_for_a_pack_is_out_of_memory_and_a_smaller_one_renders(
    error: Exception,
) -> None:
    engine = tiny_engine("sd")
    asks = mixed_asks(engine.model)

    def refuse(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[0] > 4:  # two rows a frame
            raise error

    hook = engine.pipe.unet.register_forward_pre_hook(refuse)
    with pytest.raises(OutOfMemory) as caught:
        render(engine, asks)
    smaller = render(engine, asks[:2])
    hook.remove()

    assert caught.value.facts == {"frames": [0, 1, 2]}
    assert caught.value.__context__ is None  # a traceback would keep the tensors
    assert [good(r).shape for r in smaller] == [(32, 32, 3)] * 2


def test_a_float16_sdxl_decodes_again_after_its_decoder_ran_out_of_memory(tmp_path: Path) -> None:
    engine = open_tiny(tiny_model(tmp_path, "sdxl", dtype="float16"))
    asks = [tiny_ask(engine.model, steps=1)]
    before = good(render(engine, asks)[0])

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = engine.pipe.vae.decoder.register_forward_pre_hook(refuse)
    with pytest.raises(OutOfMemory):
        render(engine, asks)
    hook.remove()

    assert engine.pipe.vae.dtype == torch.float16
    assert np.array_equal(good(render(engine, asks)[0]), before)


def test_float16_guidance_by_row_is_bit_equal_to_the_stock_float() -> None:
    from workers.engine.pipe import RowGuidance

    noise = torch.randn(3, 4, 8, 8, dtype=torch.float16)

    rows = RowGuidance([7.3, 1.7, 12.1], device="cpu") * noise

    assert rows.dtype == torch.float16
    assert all(torch.equal(rows[k], g * noise[k]) for k, g in enumerate((7.3, 1.7, 12.1)))


def test_any_other_failure_names_the_whole_pack() -> None:
    engine = tiny_engine("sd")

    def fail(*_: Any) -> None:
        raise ValueError("no such thing")

    hook = engine.pipe.unet.register_forward_pre_hook(fail)
    with pytest.raises(RenderFailed, match="ValueError: no such thing") as caught:
        render(engine, mixed_asks(engine.model))
    hook.remove()

    assert caught.value.facts == {"frames": [0, 1, 2]}


@pytest.mark.parametrize(("sampler", "total"), [("euler", 4), ("heun", 7)])
def test_every_step_is_told_once_and_in_order(sampler: str, total: int) -> None:
    engine = tiny_engine("sd")
    told: list[tuple[int, int]] = []

    engine.render([tiny_ask(engine.model, sampler=sampler)], on_step=lambda *step: told.append(step))

    assert told == [(k, total) for k in range(1, total + 1)]


def test_cancelling_stops_at_that_step_and_the_engine_goes_on() -> None:
    engine = tiny_engine("sd")
    asks = mixed_asks(engine.model)
    quiet = render(engine, asks)
    told: list[int] = []

    def cancel(done: int, _total: int) -> None:
        told.append(done)
        if done == 2:
            raise Cancelled

    with seen_latents(engine) as decoded, pytest.raises(Cancelled):
        engine.render(asks, on_step=cancel)

    assert told == [1, 2]
    assert decoded == []
    again = render(engine, asks)
    assert all(np.array_equal(good(a), good(q)) for a, q in zip(again, quiet, strict=True))


def test_frames_of_different_call_keys_are_refused() -> None:
    engine = tiny_engine("sd")
    asks = [tiny_ask(engine.model, steps=4), tiny_ask(engine.model, steps=5)]

    with pytest.raises(ValueError, match="call key"):
        render(engine, asks)


def test_nothing_to_render_is_an_empty_list() -> None:
    assert render(tiny_engine("sd"), []) == []


def test_a_missing_checkpoint_names_the_folder(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "there").model_copy(update={"source": f"dir:{tmp_path / 'gone'}"})

    with pytest.raises(Misconfigured, match=str(tmp_path / "gone")):
        open_engine(model, device="cpu")


@pytest.fixture
def models_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FARM_MODELS_DIR", str(tmp_path / "models"))
    settings.cache_clear()
    yield tmp_path / "models"
    settings.cache_clear()


def test_a_hub_checkpoint_is_looked_for_in_the_models_folder_then_in_the_hub_cache(models_dir: Path) -> None:
    model = tiny_model(models_dir / "tiny-sd", source="hub:nobody/nothing", revision="0" * 40)
    assert isinstance(open_engine(model, device="cpu"), PipeEngine)

    with pytest.raises(Misconfigured) as caught:
        open_engine(model.model_copy(update={"name": "other"}), device="cpu")

    assert str(models_dir / "other") in str(caught.value)
    assert f"models--nobody--nothing/snapshots/{'0' * 40}" in str(caught.value)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(torch.nn.Linear(1, 1).state_dict(), weights.with_suffix(".bin"))
    weights.unlink()

    with pytest.raises(Misconfigured, match=str(tmp_path)):
        open_engine(model, device="cpu")


def test_a_checkpoint_with_embedded_guidance_cannot_leave_guidance_free(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    tiny_sd(tmp_path, time_cond_proj_dim=8)

    with pytest.raises(Misconfigured, match="one guidance for all rows"):
        open_engine(model, device="cpu")


def test_the_checkpoints_own_sampler_does_not_decide_what_a_name_means(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    own = diffusers.DPMSolverMultistepScheduler(**NOISE, use_karras_sigmas=True, solver_order=3)
    own.save_pretrained(tmp_path / "scheduler")

    odd = good(render(open_tiny(model), [tiny_ask(model)])[0])

    assert np.array_equal(odd, good(render(tiny_engine("sd"), [tiny_ask(model)])[0]))


def test_importing_the_protocol_and_the_gpu_facts_loads_no_torch() -> None:
    code = "import workers.engine, workers.gpu, workers.encode, sys; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
