"""What docs/engine.md says, as tests: a frame packed with others equals the frame alone and the stock one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from tests.tiny import (
    good,
    levels_apart,
    mixed_asks,
    open_tiny,
    render,
    seen_latents,
    tiny_ask,
    tiny_engine,
    tiny_model,
)
from workers.engine import Ask
from workers.engine.pipe import PipeEngine
from workers.gpu import limit_threads

FAMILIES = ["sd", "sdxl", "sd3", "flux1"]
LATENTS = 1e-5  # relative; what another batch size may round away in float32


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    limit_threads()


def _worst_difference(engine: PipeEngine, asks: Sequence[Ask]) -> tuple[float, int]:
    """Render asks packed and each alone: relative difference of latents, levels of 255 of images."""
    with seen_latents(engine) as packed_latents:
        packed = render(engine, asks)
    latents, levels = 0.0, 0
    for k, ask in enumerate(asks):
        with seen_latents(engine) as alone_latents:
            [alone] = render(engine, [ask])
        apart = (packed_latents[k] - alone_latents[0]).abs().max() / alone_latents[0].abs().max()
        latents = max(latents, float(apart))
        levels = max(levels, levels_apart(good(packed[k]), good(alone)))
    return latents, levels


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frame_packed_with_others_equals_the_frame_alone(family: str) -> None:
    engine = tiny_engine(family)
    asks = mixed_asks(engine.model, steps=6)

    latents, levels = _worst_difference(engine, asks)

    assert latents <= LATENTS
    assert levels <= 1


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_frames_without_guidance_pack_whatever_their_scale(family: str) -> None:
    engine = tiny_engine(family)
    asks = [
        replace(a, spec=replace(a.spec, guidance=g))
        for a, g in zip(mixed_asks(engine.model), (0, 0.5, 1), strict=True)
    ]

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
def test_every_sampler_renders_the_same_packed_and_alone(family: str, sampler: str, steps: int) -> None:
    engine = tiny_engine(family)
    asks = mixed_asks(engine.model, sampler=sampler, steps=steps)

    latents, levels = _worst_difference(engine, asks)

    assert latents <= LATENTS
    assert levels <= 1


def test_samplers_differ_from_each_other() -> None:
    engine = tiny_engine("sd")

    images = {s: good(render(engine, [tiny_ask(engine.model, sampler=s)])[0]) for s in engine.model.samplers}

    assert len({image.tobytes() for image in images.values()}) == len(images)


def test_lcm_takes_more_steps_than_its_schedule_had() -> None:
    engine = tiny_engine("sd")

    [image] = render(engine, [tiny_ask(engine.model, sampler="lcm", steps=60)])

    good(image)


def test_one_generator_for_the_pack_would_fail_the_parity_test() -> None:
    engine = tiny_engine("sd")
    asks = mixed_asks(engine.model)
    alone = [good(render(engine, [ask])[0]) for ask in asks]
    arguments = engine._arguments(asks)
    arguments["generator"] = torch.Generator("cpu").manual_seed(asks[0].seed)

    shared = engine.pipe(**arguments).images

    levels = [float((shared[k].permute(1, 2, 0) * 255 - alone[k]).abs().max()) for k in range(len(asks))]
    assert levels[0] <= 1.5  # the first frame happens to come out right
    assert min(levels[1:]) > 10


def test_one_guidance_for_the_pack_would_fail_the_parity_test() -> None:
    engine = tiny_engine("sd")
    asks = mixed_asks(engine.model)
    arguments = engine._arguments(asks)
    arguments["guidance_scale"] = float(asks[0].spec.guidance)

    shared = engine.pipe(**arguments).images[2]

    alone = good(render(engine, [asks[2]])[0])
    assert float((shared.permute(1, 2, 0) * 255 - alone).abs().max()) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_is_the_stock_pipelines(tmp_path: Path, family: str) -> None:
    engine = open_tiny(tiny_model(tmp_path, family))
    own_sampler = "dpm++2m" if "dpm++2m" in engine.model.samplers else "flow-euler"
    ask = tiny_ask(engine.model, "a blue square", seed=5, sampler=own_sampler)
    pipeline = getattr(diffusers, engine.model.pipeline)
    stock = pipeline.from_pretrained(tmp_path)
    expected = stock(
        "a blue square",
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(5),
    ).images[0]

    [image] = render(engine, [ask])

    assert np.array_equal(good(image), np.asarray(expected))


def test_sdxl_without_a_negative_prompt_does_not_see_its_neighbours() -> None:
    engine = tiny_engine("sdxl")
    quiet = tiny_ask(engine.model, "a", seed=3)
    loud = tiny_ask(engine.model, "b", seed=4, negative_prompt="ugly")

    alone = good(render(engine, [quiet])[0])
    packed = good(render(engine, [quiet, loud])[0])

    assert levels_apart(alone, packed) <= 1


def test_seed_prompt_and_negative_prompt_all_change_the_image() -> None:
    model = tiny_engine("sd").model
    asks = [
        tiny_ask(model, "a", seed=1),
        tiny_ask(model, "a", seed=2),
        tiny_ask(model, "b", seed=1),
        tiny_ask(model, "a", seed=1, negative_prompt="b"),
    ]

    images = [good(i) for i in render(tiny_engine("sd"), asks)]

    assert len({i.tobytes() for i in images}) == 4
