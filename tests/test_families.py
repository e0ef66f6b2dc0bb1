"""Families that only run to completion: packed equals alone equals the stock pipeline, on the real classes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from farm.errors import Misconfigured, OutOfMemory
from tests.families import family_model
from tests.tiny import good, levels_apart, open_tiny, render, tiny_ask, tiny_model, tiny_sd
from workers.engine import Ask, Cancelled, open_engine
from workers.engine.pipe import PipeEngine
from workers.gpu import limit_threads

FAMILIES = ("kandinsky3", "deepfloyd-if", "flux2-klein", "flux2-dev")
STEPS = {"deepfloyd-if": 4 + 3}  # of both stages


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    limit_threads()


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PipeEngine:
    return open_tiny(family_model(tmp_path_factory.mktemp(request.param), request.param))


def asks_of(engine: PipeEngine) -> list[Ask]:
    """Frames that share a call key: other prompts, seeds, and negative prompts where there are any."""
    model = engine.model
    negatives = ("", "ugly, with a long list of words", "b") if model.negative_prompt else ("", "", "")
    guidance = (2.0, 4.0, 9.0) if "guidance" in model.free else (model.guidance.default,) * 3
    return [
        tiny_ask(model, prompt, seed=seed, width=64, height=64, guidance=g, negative_prompt=negative)
        for prompt, seed, g, negative in zip(
            ("x", "a red circle on the left", "abcd " * 20),
            (0, 7, 2**63 - 1),
            guidance,
            negatives,
            strict=True,
        )
    ]


def test_a_frame_packed_with_others_equals_the_frame_alone(engine: PipeEngine) -> None:
    asks = asks_of(engine)

    packed = render(engine, asks)

    for ask, image in zip(asks, packed, strict=True):
        [alone] = render(engine, [ask])
        assert levels_apart(good(image), good(alone)) <= 1


def test_an_image_is_the_stock_pipelines(engine: PipeEngine) -> None:
    model = engine.model
    ask = tiny_ask(model, "a blue square", seed=5, width=64, height=64, guidance=model.guidance.default)
    place = model.source.removeprefix("dir:")
    generator = torch.Generator("cpu").manual_seed(5)
    stock = getattr(diffusers, model.pipeline).from_pretrained(place)
    asked: dict[str, Any] = {
        "num_inference_steps": 4,
        "guidance_scale": ask.spec.guidance,
        "generator": generator,
    }
    if model.stages:
        text, negative = stock.encode_prompt("a blue square", clean_caption=False)
        text = {"prompt_embeds": text, "negative_prompt_embeds": negative}
        small = stock(**text, height=16, width=16, output_type="pt", **asked).images
        larger = diffusers.IFSuperResolutionPipeline.from_pretrained(f"{place}/stage-2", text_encoder=None)
        asked |= {"num_inference_steps": 3, "guidance_scale": 4.0}
        expected = larger(image=small, height=64, width=64, **text, **asked).images[0]
    else:
        expected = stock(prompt="a blue square", height=64, width=64, **asked).images[0]

    [image] = render(engine, [ask])

    assert levels_apart(good(image), np.asarray(expected)) <= 1


def test_every_step_is_told_once_and_the_last_one_is_the_end(engine: PipeEngine) -> None:
    told: list[tuple[int, int]] = []

    engine.render(asks_of(engine)[:2], on_step=lambda *step: told.append(step))

    total = STEPS.get(engine.model.name.removeprefix("tiny-"), 4)
    assert told == [(k, total) for k in range(1, total + 1)]


def test_cancelling_stops_there_and_the_engine_goes_on(engine: PipeEngine) -> None:
    asks = asks_of(engine)[:2]
    quiet = [good(image) for image in render(engine, asks)]

    def cancel(done: int, _total: int) -> None:
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        engine.render(asks, on_step=cancel)

    assert all(np.array_equal(good(a), q) for a, q in zip(render(engine, asks), quiet, strict=True))


def test_memory_that_ran_out_is_said_and_a_smaller_pack_renders(engine: PipeEngine) -> None:
    asks = asks_of(engine)
    denoiser = getattr(engine.pipe, "unet", None) or engine.pipe.transformer

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = denoiser.register_forward_pre_hook(refuse)
    with pytest.raises(OutOfMemory):
        render(engine, asks)
    hook.remove()

    good(render(engine, asks[:1])[0])


@pytest.mark.parametrize("family", ["pixart", "pixart-sigma", "pixart-binned"])
def test_pixart_runs_to_completion_too(tmp_path: Path, family: str) -> None:
    engine = open_tiny(tiny_model(tmp_path, family, free=("guidance",)))
    asks = [replace(a, spec=replace(a.spec, width=32, height=32)) for a in asks_of(engine)]
    told: list[tuple[int, int]] = []

    packed = engine.render(asks, on_step=lambda *step: told.append(step))

    assert told == [(k, 4) for k in range(1, 5)]
    for ask, image in zip(asks, packed, strict=True):
        assert good(image).shape == (32, 32, 3)
        assert levels_apart(good(image), good(render(engine, [ask])[0])) <= 1


def test_lcm_with_its_own_pipeline_renders(tmp_path: Path) -> None:
    model = tiny_model(
        tmp_path, "sd-lcm", pipeline="LatentConsistencyModelPipeline", free=(), negative_prompt=False
    )
    asks = [tiny_ask(model, p, seed=s, sampler="lcm") for p, s in (("a", 1), ("b", 2))]
    engine = open_tiny(model)

    packed = render(engine, asks)

    assert all(
        levels_apart(good(i), good(render(engine, [a])[0])) <= 1 for a, i in zip(asks, packed, strict=True)
    )


def test_a_component_may_come_from_elsewhere(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "base")
    other = tiny_sd(tmp_path / "other", act_fn="gelu")
    ask = tiny_ask(model)

    parts = {"unet": {"source": f"dir:{other / 'unet'}"}}
    engine = open_tiny(model.model_validate({**model.model_dump(), "parts": parts}))

    swapped = good(render(engine, [ask])[0])
    [expected] = render(open_tiny(model.model_copy(update={"source": f"dir:{other}"})), [ask])
    assert engine.pipe.unet.config.act_fn == "gelu"
    assert not np.array_equal(swapped, good(render(open_tiny(model), [ask])[0]))
    assert swapped.shape == good(expected).shape


def test_a_component_the_checkpoint_does_not_have_is_named(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    parts = {"prior": {"source": f"dir:{tmp_path / 'unet'}"}}

    with pytest.raises(Misconfigured, match="no component 'prior'"):
        open_engine(model.model_validate({**model.model_dump(), "parts": parts}), device="cpu")


def test_a_stage_that_is_not_there_names_where_it_was_looked_for(tmp_path: Path) -> None:
    model = family_model(tmp_path, "deepfloyd-if")
    stage = model.stages[0].model_copy(update={"source": f"dir:{tmp_path / 'gone'}"})

    with pytest.raises(Misconfigured, match=str(tmp_path / "gone")):
        open_engine(model.model_copy(update={"stages": (stage,)}), device="cpu")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_pickled_component_is_refused_by_the_files_name(tmp_path: Path, part: str) -> None:
    model = tiny_model(tmp_path)
    [weights] = (tmp_path / part).glob("*.safetensors")
    pickled = weights.with_suffix(".bin")
    torch.save(torch.nn.Linear(1, 1).state_dict(), pickled)
    weights.unlink()

    with pytest.raises(Misconfigured, match=str(pickled)):
        open_engine(model, device="cpu")
