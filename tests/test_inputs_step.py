"""Frames with inputs, step by step: they share forwards with all others, and equal the stock pipelines alone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from farm.catalog import ControlNet
from farm.errors import RenderFailed
from farm.features import Control, Hires, LoraUse
from tests.starting import picture, started, tiny_lora, tiny_net, wide_sd3
from tests.tiny import (
    good,
    levels_apart,
    open_tiny,
    render,
    seen_latents,
    tiny_ask,
    tiny_engine,
    tiny_model,
    tiny_sd,
)
from workers.engine import Ask, Inputs, Pixels
from workers.engine.pipe import PipeEngine
from workers.engine.step import families
from workers.engine.step.loop import StepLoop
from workers.engine.weights import lora_file
from workers.gpu import limit_threads

FAMILIES = ("sd", "sdxl", "sd3", "flux1")
LATENTS = 1e-5  # relative; what another number of rows may round away in float32


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    limit_threads()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def loop_of(engine: PipeEngine) -> StepLoop:
    """The same modules, step by step."""
    return StepLoop(families.family(engine.pipe, engine.model, device="cpu"), ageing_s=60)


def run(
    loop: StepLoop, asks: Sequence[Ask], *, late: int = 0
) -> tuple[list[Pixels | RenderFailed], list[int]]:
    """Render frames, the last `late` of them two ticks later. Answers the images, and the rows of each forward."""
    ids = [UUID(int=k + 1) for k in range(len(asks))]
    done: dict[UUID, Pixels | RenderFailed] = {}
    rows = []
    for frame, ask in list(zip(ids, asks, strict=True))[: len(asks) - late]:
        loop.add(frame, ask, priority=5)
    for tick in range(1000):
        if tick == 2:
            for frame, ask in list(zip(ids, asks, strict=True))[len(asks) - late :]:
                loop.add(frame, ask, priority=5)
        seen = loop.tick()
        rows.append(seen.rows)
        done |= seen.done
        if len(done) == len(asks):
            return [done[frame] for frame in ids], rows
    raise AssertionError("it goes on for ever")


def alone(engine: PipeEngine, asks: Sequence[Ask]) -> tuple[list[Pixels | RenderFailed], list[torch.Tensor]]:
    """Each frame by itself in its stock pipeline, and what the decoder got for it."""
    images, latents = [], []
    for ask in asks:
        with seen_latents(engine) as seen:
            images += render(engine, [ask])
        latents.append(seen[-1])
    return images, latents


def apart(seen: Sequence[torch.Tensor], expected: torch.Tensor) -> float:
    """How far the nearest of what the decoder got is from what it should have got, relative."""
    alike = [latents for latents in seen if latents.shape == expected.shape]
    return min(float((latents - expected).abs().max() / expected.abs().max()) for latents in alike)


def same(one: Pixels | RenderFailed, other: Pixels | RenderFailed) -> bool:
    return levels_apart(good(one), good(other)) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_text_images_and_masks_share_forwards_and_equal_the_stock_pipelines(family: str) -> None:
    engine = wide_sd3() if family == "sd3" else tiny_engine(family)
    samplers = [s for s in engine.model.samplers if s != "flow-heun"]
    asks = [
        tiny_ask(engine.model, "text", seed=9, steps=7),
        *(
            started(engine.model, seed, masked=masked, strength=strength, steps=steps, guidance=guidance,
                    sampler=samplers[seed % len(samplers)])
            for seed, (masked, strength, steps, guidance) in enumerate(
                [(False, 0.5, 6, 1.5), (True, 0.75, 4, 4.0), (True, 1.0, 3, 9.0), (False, 1.0, 5, 4.0),
                 (True, 0.4, 10, 4.0)]
            )
        ),
    ]  # fmt: skip
    expected, latents = alone(engine, asks)

    with seen_latents(engine) as seen:
        images, rows = run(loop_of(engine), asks, late=2)

    assert [same(i, e) for i, e in zip(images, expected, strict=True)] == [True] * len(asks)
    assert max(apart(seen, one) for one in latents) <= LATENTS
    assert max(rows) >= 4
    assert len(rows) <= 9  # 29 alone


@pytest.mark.parametrize(
    "sampler", ["dpm++2m-sde", "euler-a", "heun", "ddim", "unipc", "lcm", "dpm++2m-karras", "euler"]
)
def test_every_sampler_begins_later_and_keeps_what_a_mask_keeps(sampler: str) -> None:
    engine = tiny_engine("sd")
    asks = [
        started(engine.model, seed, masked=masked, strength=0.6, steps=5, sampler=sampler)
        for seed, masked in ((1, False), (2, True), (3, True))
    ]
    expected, latents = alone(engine, asks)

    with seen_latents(engine) as seen:
        images, _ = run(loop_of(engine), asks)

    assert [same(i, e) for i, e in zip(images, expected, strict=True)] == [True] * 3
    assert max(apart(seen, one) for one in latents) <= LATENTS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_pass_goes_on_in_the_same_loop(family: str) -> None:
    engine = tiny_engine(family)
    plain = tiny_ask(engine.model, "a", seed=3, steps=3)
    two = replace(plain, spec=replace(plain.spec, hires=Hires(width=64, height=48, steps=6, strength=0.5)))
    asks = [two, plain, replace(two, seed=4)]
    expected, latents = alone(engine, asks)

    with seen_latents(engine) as seen:
        images, rows = run(loop_of(engine), asks)

    assert [same(i, e) for i, e in zip(images, expected, strict=True)] == [True] * 3
    assert max(apart(seen, one) for one in latents) <= LATENTS
    assert len(rows) == 6
    assert good(images[0]).shape == (48, 64, 3)


def test_a_frame_with_a_mask_is_saved_and_goes_on_elsewhere() -> None:
    engine = tiny_engine("sd")
    ask = started(engine.model, 2, masked=True, strength=0.8, steps=10, sampler="euler-a")
    expected = render(engine, [ask])[0]
    first, other = loop_of(engine), loop_of(engine)
    first.add(UUID(int=1), ask, priority=5)
    for _ in range(4):
        first.tick()
    state = first.save(UUID(int=1))

    other.add(UUID(int=1), ask, priority=5, saved=state)
    ticks = 0
    while other.frames:
        done = other.tick().done
        ticks += 1

    assert ticks == 4
    assert same(done[UUID(int=1)], expected)


def test_an_inpainting_unet_takes_mask_and_image_as_channels_of_its_own(folder: Path) -> None:
    model = tiny_model(folder / "entry", "sd").model_copy(update={"source": f"dir:{folder / 'nine'}"})
    tiny_sd(folder / "nine", in_channels=9)
    engine = open_tiny(model)
    asks = [
        started(model, seed, masked=True, strength=strength, steps=4)
        for seed, strength in ((1, 1.0), (2, 0.5))
    ]
    expected, latents = alone(engine, asks)

    with seen_latents(engine) as seen:
        images, rows = run(loop_of(engine), asks)

    assert [same(i, e) for i, e in zip(images, expected, strict=True)] == [True, True]
    assert max(apart(seen, one) for one in latents) <= LATENTS
    assert max(rows) == 4
    assert not same(images[0], render(engine, [replace(asks[0], inputs=asks[1].inputs)])[0])


def test_a_frame_is_saved_in_its_second_pass_and_goes_on_there() -> None:
    engine = tiny_engine("sd")
    plain = tiny_ask(engine.model, "a", seed=3, steps=3, sampler="euler-a")
    ask = replace(plain, spec=replace(plain.spec, hires=Hires(width=64, height=48, steps=8, strength=0.5)))
    expected = render(engine, [ask])[0]
    first, other = loop_of(engine), loop_of(engine)
    first.add(UUID(int=1), ask, priority=5)
    for _ in range(5):
        first.tick()

    other.add(UUID(int=1), ask, priority=5, saved=first.save(UUID(int=1)))
    seen = [other.tick() for _ in range(2)]

    assert [tick.steps[UUID(int=1)] for tick in seen] == [(6, 7), (7, 7)]
    assert same(seen[1].done[UUID(int=1)], expected)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_frames_of_the_same_nets_share_forwards_each_with_its_own_window(family: str, folder: Path) -> None:
    model = tiny_model(folder / f"net-{family}", family)
    engine = open_tiny(model)
    for k, name in enumerate(("lines", "depth")):
        tiny_net(engine.pipe, folder / f"{family}-{name}", k)
    entries = {n: ControlNet(source=f"dir:{folder / f'{family}-{n}'}") for n in ("lines", "depth")}
    engine.model = engine.featured._modes.model = model.model_copy(update={"controls": entries})

    def follow(seed: int, *nets: str, scale: float = 1.0, start: float = 0.0, **changes: Any) -> Ask:
        controls = tuple(
            Control(net=n, image=f"sha256:{9:064}", scale=scale, start=start, end=0.8) for n in nets
        )
        ask = started(engine.model, seed, control=controls, **changes)
        images = tuple(picture(40 + seed + k) for k in range(len(nets)))
        if changes.get("image", "x") is None:
            return replace(ask, inputs=Inputs(controls=images))
        return replace(ask, inputs=replace(ask.inputs, controls=images))

    asks = [
        follow(1, "lines", steps=4),
        follow(2, "lines", steps=5, scale=0.4, start=0.25, image=None, strength=None),
        follow(3, "lines", "depth", steps=4, image=None, strength=None),
        follow(4, "lines", "depth", steps=6, masked=True, start=0.5),
        tiny_ask(engine.model, "plain", seed=5),
    ]
    expected, latents = alone(engine, asks)

    with seen_latents(engine) as seen:
        images, rows = run(loop_of(engine), asks)

    assert [same(i, e) for i, e in zip(images, expected, strict=True)] == [True] * len(asks)
    assert max(apart(seen, one) for one in latents) <= LATENTS
    assert rows.count(4) >= 4  # two frames of the same nets in one


@pytest.mark.parametrize("family", FAMILIES)
def test_loras_of_any_set_and_scale_share_a_forward(family: str, folder: Path) -> None:
    model = tiny_model(folder / f"lora-{family}", family)
    engine = open_tiny(model)
    entries = {
        n: tiny_lora(engine.pipe, folder / f"loras-{family}", n, k) for k, n in enumerate(("ink", "oil"))
    }
    engine.model = model.model_copy(update={"loras": entries})
    stepping = open_tiny(model)
    stepping.model = engine.model
    plain = tiny_ask(engine.model, "a", seed=3)

    def with_(**scales: float) -> Ask:
        uses = tuple(LoraUse(name=n, scale=s, sha256=entries[n].sha256) for n, s in scales.items())
        files = tuple(lora_file(engine.model, u) for u in uses)
        return replace(plain, spec=replace(plain.spec, loras=uses), inputs=Inputs(loras=files))

    asks = [plain, with_(ink=0.8), with_(ink=-0.4), with_(oil=1.0), with_(oil=0.5, ink=0.5), plain]
    expected, latents = alone(engine, asks)

    with seen_latents(stepping) as seen:
        images, rows = run(loop_of(stepping), asks)

    assert [same(i, e) for i, e in zip(images, expected, strict=True)] == [True] * len(asks)
    assert max(apart(seen, one) for one in latents) <= LATENTS
    assert len(rows) == 4
    assert np.array_equal(good(images[0]), good(images[5]))
    assert not same(images[1], images[2])


def test_a_broken_lora_is_its_frames_own_fault_and_goes_when_memory_is_short(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_tiny(tiny_model(folder / "broken-lora", "sd"))
    entry = tiny_lora(engine.pipe, folder / "broken", "broken", 1)
    file = folder / "broken" / entry.file
    save_file({name: value * float("nan") for name, value in load_file(file).items()}, file)
    model = engine.model = engine.model.model_copy(update={"loras": {"broken": entry}})
    plain = tiny_ask(model, "a red circle", seed=1)
    use = LoraUse(name="broken", scale=1.0, sha256=entry.sha256)
    bad = replace(tiny_ask(model, seed=2, loras=(use,)), inputs=Inputs(loras=(file,)))
    expected = render(engine, [plain])[0]
    loop = loop_of(engine)

    (neighbour, failed), rows = run(loop, [plain, bad])

    assert max(rows) == 4  # they shared forwards
    assert same(neighbour, expected)
    assert str(failed) == "the image is not a number"
    assert any(loop.family.pipe.get_list_adapters().values())

    denoise, full = loop.family.denoise, iter([True])

    def short(inputs: Any) -> torch.Tensor:
        if next(full, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoise(inputs)

    monkeypatch.setattr(loop.family, "denoise", short)
    assert same(run(loop, [plain])[0][0], expected)
    assert not any(loop.family.pipe.get_list_adapters().values())
    assert isinstance(run(loop, [bad])[0][0], RenderFailed)  # it is read again


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_clip_skip_weights_and_long_prompts_render_as_they_do_alone(family: str) -> None:
    engine = tiny_engine(family)
    long = "abcd " * 40
    asks = [
        tiny_ask(engine.model, "a", seed=1, clip_skip=1),
        tiny_ask(engine.model, "a (red)1.7 circle", seed=2, prompt_weights=True, negative_prompt="(x)0.5"),
        tiny_ask(engine.model, long, seed=3, long_prompt=True, negative_prompt="ugly"),
        tiny_ask(engine.model, "a", seed=4),
        tiny_ask(engine.model, "b", seed=5, long_prompt=True, negative_prompt=long),
    ]
    expected, latents = alone(engine, asks)

    with seen_latents(engine) as seen:
        images, rows = run(loop_of(engine), asks)

    assert [same(i, e) for i, e in zip(images, expected, strict=True)] == [True] * len(asks)
    assert max(apart(seen, one) for one in latents) <= LATENTS
    assert set(rows) <= {4, 6}  # three of one chunk, two of more


def test_an_input_that_is_not_a_number_leaves_its_neighbours_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = tiny_engine("sd")
    asks = [started(engine.model, seed, masked=True) for seed in (1, 2, 3)]
    expected = [render(engine, [ask])[0] for ask in asks]
    loop = loop_of(engine)
    for k, ask in enumerate(asks):
        loop.add(UUID(int=k + 1), ask, priority=5)
    loop._flight[UUID(int=2)].latents = loop._flight[UUID(int=2)].latents * torch.nan

    done: dict[UUID, Any] = {}
    while loop.frames:
        done |= loop.tick().done

    assert isinstance(done[UUID(int=2)], RenderFailed)
    assert same(done[UUID(int=1)], expected[0])
    assert same(done[UUID(int=3)], expected[2])
