"""What docs/engine.md says, as tests: alone = packed, one bad frame fails alone, the engine goes on."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from farm.catalog import Model
from farm.errors import Misconfigured, OutOfMemory, RenderFailed
from farm.settings import settings
from farm.spec import Format, Spec
from tests.tiny import NOISE, tiny_model, tiny_sd
from workers import gpu
from workers.engine import Ask, Cancelled, Pixels, open_engine
from workers.engine.pipe import PipeEngine

FAMILIES = ["sd", "sdxl", "sd3", "flux1"]
LATENTS = 1e-5  # relative; what another batch size may round away in float32
PROMPTS = ["x", "a red circle left", "abcd " * 20]  # 1, 14 and 80 (cut to 75) of the tiny tokenizer's tokens


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    gpu.limit_threads()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An engine of a family, made once."""
    made: dict[str, PipeEngine] = {}

    def engine(family: str) -> PipeEngine:
        if family not in made:
            made[family] = _open(tiny_model(tmp_path_factory.mktemp(family), family))
        return made[family]

    return engine


def _open(model: Model) -> PipeEngine:
    engine = open_engine(model, device="cpu")
    assert isinstance(engine, PipeEngine)
    return engine


def _ask(model: Model, prompt: str = "a red circle", *, seed: int = 1, **changes: Any) -> Ask:
    spec = Spec(model.name, prompt, "", 32, 32, 4, 4.0, model.sampler, Format.PNG)
    return Ask(replace(spec, **changes), seed)


def _mixed(model: Model, **changes: Any) -> list[Ask]:
    """Frames that share a call key, and differ in all that the family leaves free."""
    guidance = (1.5, 4.0, 12.0) if "guidance" in model.free else (4.0, 4.0, 4.0)
    negative = ("", "ugly", "blurred, low quality") if model.negative_prompt else ("", "", "")
    seeds = (0, 7, 2**63 - 1)
    return [
        _ask(model, p, seed=s, **{"guidance": g, "negative_prompt": n, **changes})
        for p, s, g, n in zip(PROMPTS, seeds, guidance, negative, strict=True)
    ]


def _render(engine: PipeEngine, asks: Sequence[Ask]) -> list[Pixels | RenderFailed]:
    return engine.render(asks, on_step=lambda done, total: None)


@contextmanager
def _seen_latents(engine: PipeEngine) -> Iterator[list[torch.Tensor]]:
    """What the decoder gets, one frame at a time."""
    seen: list[torch.Tensor] = []
    hook = engine.pipe.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    yield seen
    hook.remove()


def _good(result: Pixels | RenderFailed) -> Pixels:
    assert not isinstance(result, RenderFailed)
    return result


def _levels_apart(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def _worst_difference(engine: PipeEngine, asks: Sequence[Ask]) -> tuple[float, int]:
    """Render asks packed and each alone: relative difference of latents, levels of 255 of images."""
    with _seen_latents(engine) as packed_latents:
        packed = _render(engine, asks)
    latents, levels = 0.0, 0
    for k, ask in enumerate(asks):
        with _seen_latents(engine) as alone_latents:
            [alone] = _render(engine, [ask])
        apart = (packed_latents[k] - alone_latents[0]).abs().max() / alone_latents[0].abs().max()
        latents = max(latents, float(apart))
        levels = max(levels, _levels_apart(_good(packed[k]), _good(alone)))
    return latents, levels


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frame_packed_with_others_equals_the_frame_alone(engines: Any, family: str) -> None:
    engine = engines(family)
    asks = _mixed(engine.model, steps=6)

    latents, levels = _worst_difference(engine, asks)

    assert latents <= LATENTS
    assert levels <= 1


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_frames_without_guidance_pack_whatever_their_scale(engines: Any, family: str) -> None:
    engine = engines(family)
    asks = [replace(a, spec=replace(a.spec, guidance=g)) for a, g in zip(_mixed(engine.model), (0, 0.5, 1))]

    latents, levels = _worst_difference(engine, asks)

    assert latents <= LATENTS
    assert levels <= 1


@pytest.mark.parametrize(
    ("family", "sampler"),
    [
        *(("sd", s) for s in ("dpm++2m", "dpm++2m-karras", "dpm++2m-sde", "euler", "euler-a")),
        *(("sd", s) for s in ("heun", "ddim", "unipc", "lcm")),
        *(("sd3", s) for s in ("flow-euler", "flow-heun")),
    ],
)
@pytest.mark.parametrize("steps", [1, 4])
def test_every_sampler_renders_the_same_packed_and_alone(
    engines: Any, family: str, sampler: str, steps: int
) -> None:
    engine = engines(family)
    asks = _mixed(engine.model, sampler=sampler, steps=steps)

    latents, levels = _worst_difference(engine, asks)

    assert latents <= LATENTS
    assert levels <= 1


def test_samplers_differ_from_each_other(engines: Any) -> None:
    engine = engines("sd")

    images = {s: _good(_render(engine, [_ask(engine.model, sampler=s)])[0]) for s in engine.model.samplers}

    assert len({image.tobytes() for image in images.values()}) == len(images)


def test_lcm_takes_more_steps_than_its_schedule_had(engines: Any) -> None:
    engine = engines("sd")

    [image] = _render(engine, [_ask(engine.model, sampler="lcm", steps=60)])

    _good(image)


def test_one_generator_for_the_pack_would_fail_the_parity_test(engines: Any) -> None:
    engine = engines("sd")
    asks = _mixed(engine.model)
    alone = [_good(_render(engine, [ask])[0]) for ask in asks]
    arguments = engine._arguments(asks)
    arguments["generator"] = torch.Generator("cpu").manual_seed(asks[0].seed)

    shared = engine.pipe(**arguments).images

    levels = [float((shared[k].permute(1, 2, 0) * 255 - alone[k]).abs().max()) for k in range(len(asks))]
    assert levels[0] <= 1.5  # the first frame happens to come out right
    assert min(levels[1:]) > 10


def test_one_guidance_for_the_pack_would_fail_the_parity_test(engines: Any) -> None:
    engine = engines("sd")
    asks = _mixed(engine.model)
    arguments = engine._arguments(asks)
    arguments["guidance_scale"] = float(asks[0].spec.guidance)

    shared = engine.pipe(**arguments).images[2]

    alone = _good(_render(engine, [asks[2]])[0])
    assert float((shared.permute(1, 2, 0) * 255 - alone).abs().max()) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_is_the_stock_pipelines(engines: Any, family: str) -> None:
    engine = engines(family)
    ask = _ask(engine.model, "a blue square", seed=5, negative_prompt="")
    pipeline = getattr(diffusers, engine.model.pipeline)
    stock = pipeline.from_pretrained(engine.model.source.removeprefix("dir:"))
    expected = stock(
        "a blue square",
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(5),
    ).images[0]

    [image] = _render(engine, [ask])

    assert np.array_equal(_good(image), np.asarray(expected))


def test_sdxl_without_a_negative_prompt_does_not_see_its_neighbours(engines: Any) -> None:
    engine = engines("sdxl")
    quiet = _ask(engine.model, "a", seed=3)
    loud = _ask(engine.model, "b", seed=4, negative_prompt="ugly")

    alone = _good(_render(engine, [quiet])[0])
    packed = _good(_render(engine, [quiet, loud])[0])

    assert _levels_apart(alone, packed) <= 1


def test_seed_prompt_and_negative_prompt_all_change_the_image(engines: Any) -> None:
    model = engines("sd").model
    asks = [
        _ask(model, "a", seed=1),
        _ask(model, "a", seed=2),
        _ask(model, "b", seed=1),
        _ask(model, "a", seed=1, negative_prompt="b"),
    ]

    images = [_good(i) for i in _render(engines("sd"), asks)]

    assert len({i.tobytes() for i in images}) == 4


@contextmanager
def _poisoned(engine: PipeEngine, row: int) -> Iterator[None]:
    """Make the text of one row NaN, before it meets its neighbours in the UNet."""

    def poison(_module: Any, _args: Any, output: Any) -> None:
        output.last_hidden_state[row] = torch.nan

    hook = engine.pipe.text_encoder.register_forward_hook(poison)
    yield
    hook.remove()


def test_a_frame_of_nan_fails_alone_and_its_neighbours_are_unharmed(engines: Any) -> None:
    engine = engines("sd")
    asks = _mixed(engine.model, guidance=1.0, negative_prompt="")  # one run of the text encoder
    quiet = _render(engine, asks)

    with _poisoned(engine, row=1):
        results = _render(engine, asks)

    assert isinstance(results[1], RenderFailed)
    assert results[1].facts == {"frames": [1]}
    for k in (0, 2):
        assert np.array_equal(_good(results[k]), _good(quiet[k]))


def test_a_black_image_is_a_failure(engines: Any) -> None:
    engine = engines("sd")
    hook = engine.pipe.vae.decoder.register_forward_hook(lambda *_: torch.full((1, 3, 32, 32), -1.0))

    results = _render(engine, _mixed(engine.model))
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
    engines: Any, error: Exception
) -> None:
    engine = engines("sd")
    asks = _mixed(engine.model)

    def refuse(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[0] > 4:  # two rows a frame
            raise error

    hook = engine.pipe.unet.register_forward_pre_hook(refuse)
    with pytest.raises(OutOfMemory) as caught:
        _render(engine, asks)
    smaller = _render(engine, asks[:2])
    hook.remove()

    assert caught.value.facts == {"frames": [0, 1, 2]}
    assert caught.value.__context__ is None  # a traceback would keep the tensors
    assert [_good(r).shape for r in smaller] == [(32, 32, 3)] * 2


def test_a_float16_sdxl_decodes_again_after_its_decoder_ran_out_of_memory(tmp_path: Path) -> None:
    engine = _open(tiny_model(tmp_path, "sdxl", dtype="float16"))
    asks = [_ask(engine.model, steps=1)]
    before = _good(_render(engine, asks)[0])

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = engine.pipe.vae.decoder.register_forward_pre_hook(refuse)
    with pytest.raises(OutOfMemory):
        _render(engine, asks)
    hook.remove()

    assert engine.pipe.vae.dtype == torch.float16
    assert np.array_equal(_good(_render(engine, asks)[0]), before)


def test_float16_guidance_by_row_is_bit_equal_to_the_stock_float() -> None:
    from workers.engine.pipe import RowGuidance

    noise = torch.randn(3, 4, 8, 8, dtype=torch.float16)

    rows = RowGuidance([7.3, 1.7, 12.1], device="cpu") * noise

    assert rows.dtype == torch.float16
    assert all(torch.equal(rows[k], g * noise[k]) for k, g in enumerate((7.3, 1.7, 12.1)))


def test_any_other_failure_names_the_whole_pack(engines: Any) -> None:
    engine = engines("sd")

    def fail(*_: Any) -> None:
        raise ValueError("no such thing")

    hook = engine.pipe.unet.register_forward_pre_hook(fail)
    with pytest.raises(RenderFailed, match="ValueError: no such thing") as caught:
        _render(engine, _mixed(engine.model))
    hook.remove()

    assert caught.value.facts == {"frames": [0, 1, 2]}


@pytest.mark.parametrize(("sampler", "total"), [("euler", 4), ("heun", 7)])
def test_every_step_is_told_once_and_in_order(engines: Any, sampler: str, total: int) -> None:
    engine = engines("sd")
    told: list[tuple[int, int]] = []

    engine.render([_ask(engine.model, sampler=sampler)], on_step=lambda *step: told.append(step))

    assert told == [(k, total) for k in range(1, total + 1)]


def test_cancelling_stops_at_that_step_and_the_engine_goes_on(engines: Any) -> None:
    engine = engines("sd")
    asks = _mixed(engine.model)
    quiet = _render(engine, asks)
    told: list[int] = []

    def cancel(done: int, _total: int) -> None:
        told.append(done)
        if done == 2:
            raise Cancelled

    with _seen_latents(engine) as decoded, pytest.raises(Cancelled):
        engine.render(asks, on_step=cancel)

    assert told == [1, 2]
    assert decoded == []
    again = _render(engine, asks)
    assert all(np.array_equal(_good(a), _good(q)) for a, q in zip(again, quiet, strict=True))


def test_frames_of_different_call_keys_are_refused(engines: Any) -> None:
    engine = engines("sd")
    asks = [_ask(engine.model, steps=4), _ask(engine.model, steps=5)]

    with pytest.raises(ValueError, match="call key"):
        _render(engine, asks)


def test_nothing_to_render_is_an_empty_list(engines: Any) -> None:
    assert _render(engines("sd"), []) == []


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


def test_the_checkpoints_own_sampler_does_not_decide_what_a_name_means(tmp_path: Path, engines: Any) -> None:
    model = tiny_model(tmp_path)
    own = diffusers.DPMSolverMultistepScheduler(**NOISE, use_karras_sigmas=True, solver_order=3)
    own.save_pretrained(tmp_path / "scheduler")

    odd = _good(_render(_open(model), [_ask(model)])[0])

    assert np.array_equal(odd, _good(_render(engines("sd"), [_ask(model)])[0]))


def test_importing_the_protocol_and_the_gpu_facts_loads_no_torch() -> None:
    code = "import workers.engine, workers.gpu, workers.encode, sys; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_capacity_halves_where_memory_ran_out_and_grows_back_slowly(engines: Any) -> None:
    model = engines("sd").model
    small, large = _ask(model).spec, _ask(model, width=128, height=64).spec
    capacity = gpu.Capacity()
    assert (capacity.frames(small, model), capacity.frames(large, model)) == (8, 4)

    capacity.ran_out(small, model, frames=8)

    assert (capacity.frames(small, model), capacity.frames(large, model)) == (4, 4)
    for _ in range(gpu.GROW_AFTER):
        capacity.fitted(small, model, frames=3)  # not full: proves nothing
    assert capacity.frames(small, model) == 4
    for _ in range(gpu.GROW_AFTER):
        capacity.fitted(small, model, frames=4)
    assert capacity.frames(small, model) == 5
    for _ in range(10 * gpu.GROW_AFTER):
        capacity.fitted(small, model, frames=capacity.frames(small, model))
    assert capacity.frames(small, model) == 8
    capacity.ran_out(small, model, frames=1)
    assert capacity.frames(small, model) == 1


def test_a_device_has_a_name_and_memory() -> None:
    device = gpu.describe()

    assert device.kind == gpu.device()
    assert device.name
    assert device.memory_bytes > 1 << 28
