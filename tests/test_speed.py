"""What makes a pipeline faster leaves its images within the parity tolerance, and says what cannot be done."""

import gc
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from farm.catalog import Model
from farm.errors import Misconfigured, OutOfMemory
from farm.spec import fingerprint, shape_key
from tests.tiny import good, levels_apart, mixed_asks, open_tiny, render, tiny_ask, tiny_model, tiny_sd
from workers.engine import loading, open_engine, speed
from workers.engine.pipe import PipeEngine
from workers.gpu import limit_threads


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    limit_threads()


def with_speed(model: Model, **changes: Any) -> Model:
    return Model.model_validate({**model.model_dump(), "speed": changes})


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux1", "pixart"])
@pytest.mark.parametrize("changes", [{}, {"fused_qkv": True}, {"attention": "math"}, {"attention": "flash"}])
def test_images_stay_within_a_level_of_the_stock_ones(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    model = tiny_model(tmp_path, family)
    fast = open_tiny(with_speed(model, **changes))
    stock = PipeEngine(model, getattr(diffusers, model.pipeline).from_pretrained(tmp_path), device="cpu")
    asks = mixed_asks(model)

    for one, other in zip(render(fast, asks), render(stock, asks), strict=True):
        assert levels_apart(good(one), good(other)) <= 1


def test_channels_last_is_for_convolutions_alone(tmp_path: Path) -> None:
    pipe = open_tiny(tiny_model(tmp_path, "sd3")).pipe

    assert pipe.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    weight = open_tiny(tiny_model(tmp_path / "sd")).pipe.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_keys_and_values_of_a_text_are_made_once_a_call(tmp_path: Path) -> None:
    engine = open_tiny(tiny_model(tmp_path))
    made: list[Any] = []
    linear = next(p for n, p in engine.pipe.unet.named_modules() if n.endswith("attn2")).to_k
    real = torch.nn.functional.linear

    def counted(given: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        made.extend([1] if weight is linear.weight else [])
        return real(given, weight, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", counted)
        render(engine, [tiny_ask(engine.model, steps=6)])
        render(engine, [tiny_ask(engine.model, "another", steps=6)])

    assert len(made) == 2


def test_a_text_that_is_gone_is_not_taken_for_another_at_its_address(tmp_path: Path) -> None:
    unet = open_tiny(tiny_model(tmp_path)).pipe.unet
    linear = next(p for n, p in unet.named_modules() if n.endswith("attn2")).to_k

    with torch.inference_mode():
        for k in range(20):
            text = torch.full((1, 3, linear.in_features), float(k))
            expected = torch.nn.functional.linear(text, linear.weight, linear.bias)
            assert torch.equal(linear(text), expected)
            del text
            gc.collect()


def test_what_computes_with_fewer_bits_is_another_image(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    fp8 = with_speed(model, fp8=True)
    spec = tiny_ask(model).spec

    assert (model.precision, fp8.precision) == ("float32", "float32+fp8")
    assert fingerprint(spec, model, 1) != fingerprint(spec, fp8, 1)
    assert shape_key(spec, model) != shape_key(spec, fp8)


def test_a_cpu_leaves_out_what_is_for_gpus(tmp_path: Path) -> None:
    model = with_speed(tiny_model(tmp_path), fp8=True, compile=True)

    good(render(open_tiny(model), [tiny_ask(model)])[0])


def test_a_denoiser_without_repeated_blocks_is_not_compiled(tmp_path: Path) -> None:
    engine = open_tiny(tiny_model(tmp_path, "sd3"))

    with pytest.raises(Misconfigured, match="no repeated blocks of SD3Transformer2DModel"):
        speed.compile_blocks(engine.pipe.transformer, engine.model)


def test_fp8_takes_large_matrices_only() -> None:
    assert speed.fits_fp8(torch.nn.Linear(640, 2560), "up.0.attn1.to_q")
    assert not speed.fits_fp8(torch.nn.Linear(640, 2560), "time_embedding.linear_1")
    assert not speed.fits_fp8(torch.nn.Linear(640, 9), "up.0.attn1.to_q")
    assert not speed.fits_fp8(torch.nn.Linear(641, 641), "up.0.attn1.to_q")
    assert not speed.fits_fp8(torch.nn.Conv2d(640, 640, 3), "conv_in")


def test_a_checkpoint_that_does_not_fit_says_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(loading, "speed_up", full)

    with pytest.raises(OutOfMemory):
        open_engine(tiny_model(tmp_path), device="cpu")


def test_an_image_of_too_few_forwards_was_not_rendered(tmp_path: Path) -> None:
    from farm.errors import RenderFailed

    engine = open_tiny(tiny_model(tmp_path))
    engine.pipe.unet._forward_hooks.clear()  # the forwards of a device that answers without computing

    [result] = render(engine, [tiny_ask(engine.model)])

    assert isinstance(result, RenderFailed)
    assert "came too fast: the denoiser ran 0 times, its steps are 4" in str(result)


def test_a_checkpoint_whose_weights_do_not_fit_its_config_names_the_folder(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    other = tiny_sd(tmp_path / "other", block_out_channels=(32, 64))
    (other / "unet" / "diffusion_pytorch_model.safetensors").replace(
        tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    )

    with pytest.raises(Misconfigured, match=str(tmp_path)):
        open_engine(model, device="cpu")
