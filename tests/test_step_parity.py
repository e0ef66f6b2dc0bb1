"""The parity gate: a frame alone in the stock pipeline = packed = step by step among frames of other settings.

A family of workers.engine.step.families.ADMITTED is here with every kind of checkpoint it has.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import torch

from farm.errors import RenderFailed
from tests.tiny import good, levels_apart, tiny_ask, tiny_steps
from workers.engine import Ask, Pixels
from workers.engine.samplers import fresh_sampler
from workers.engine.step.families import ADMITTED
from workers.engine.step.loop import StepLoop
from workers.gpu import limit_threads

LATENTS = 1e-5  # relative; what another number of rows may round away in float32
CHECKPOINTS = [
    "sd", "sd-v", "sd-lcm", "sdxl", "sdxl-lcm", "sd3", "sd3-35", "sd3-shifted", "flux1", "flux1-schnell",
    "pixart", "pixart-binned", "pixart-sigma",
]  # fmt: skip
PROMPTS = ["x", "a red circle on white", "abcd " * 20]  # 1, 17 and 80 tokens (cut to 75), and begin and end
SETTINGS = [(4, 0.0), (7, 1.5), (2, 4.0), (6, 12.0), (5, 1.0), (3, 7.5), (4, 3.0), (2, 2.0), (8, 9.0)]


@dataclass
class Seen:
    """What came out, and what went in on the way."""

    image: Pixels
    latents: torch.Tensor


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    limit_threads()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    opened: dict[str, StepLoop] = {}

    def open_one(name: str) -> StepLoop:
        if name not in opened:
            # flow-heun has no place for a shift
            only = {"samplers": ("flow-euler",), "sampler": "flow-euler"} if name == "sd3-shifted" else {}
            opened[name] = tiny_steps(tmp_path_factory.mktemp(name), name, **only)
        return opened[name]

    return open_one


def _mixed(loop: StepLoop, name: str) -> list[Ask]:
    """Every sampler of the family, each with its own steps, guidance, prompt and seed."""
    model = loop.model
    sizes = {"width": 256, "height": 272} if name == "pixart-binned" else {}
    samplers = (*model.samplers, *model.samplers, *model.samplers)[: max(4, len(model.samplers))]
    asks = []
    for k, sampler in enumerate(samplers):
        steps, guidance = SETTINGS[k]
        negative = "ugly" if k % 3 == 1 and model.negative_prompt else ""
        asks.append(
            tiny_ask(
                model,
                PROMPTS[k % 3],
                seed=k,
                sampler=sampler,
                steps=steps,
                guidance=guidance,
                negative_prompt=negative,
                **sizes,
            )
        )
    return asks


def _step_by_step(loop: StepLoop, asks: Sequence[Ask]) -> list[Seen]:
    seen: dict[int, Seen] = {}
    for k, ask in enumerate(asks):
        loop.add(UUID(int=k), ask, priority=5)
    while loop.frames:
        with _decoded(loop) as latents:
            done = loop.tick().done
        for (frame, image), one in zip(done.items(), latents, strict=True):
            seen[frame.int] = Seen(good(image), one)
    return [seen[k] for k in range(len(asks))]


def _stock(loop: StepLoop, ask: Ask) -> Seen:
    """The stock pipeline's own call, for this frame alone."""
    pipe, spec, family = loop.family.pipe, ask.spec, loop.family
    pipe.scheduler = fresh_sampler(spec.sampler, family._sampler_config, steps=spec.steps)
    arguments = {
        "negative_prompt": (
            spec.negative_prompt or None if loop.model.family == "sdxl" else spec.negative_prompt
        ),
        "max_sequence_length": getattr(family, "text_tokens", 256),
        "clean_caption": False,
        "use_resolution_binning": getattr(family, "_bins", None) is not None,
    }
    takes = inspect.signature(pipe.__call__).parameters
    with _decoded(loop) as latents, torch.inference_mode():
        image = pipe(
            spec.prompt,
            height=spec.height,
            width=spec.width,
            num_inference_steps=spec.steps,
            guidance_scale=spec.guidance,
            generator=torch.Generator("cpu").manual_seed(ask.seed),
            output_type="pil",
            **{name: value for name, value in arguments.items() if name in takes},
        ).images[0]
    return Seen(np.asarray(image), latents[0])


@contextmanager
def _decoded(loop: StepLoop) -> Iterator[list[torch.Tensor]]:
    """What the decoder gets, one frame at a time."""
    latents: list[torch.Tensor] = []
    decoder = loop.family.pipe.vae.decoder
    hook = decoder.register_forward_pre_hook(lambda _, args: latents.append(args[0].clone()))
    yield latents
    hook.remove()


def _apart(one: Seen, other: Seen) -> tuple[float, int]:
    """Relative difference of latents, levels of 255 of images."""
    relative = (one.latents - other.latents).abs().max() / other.latents.abs().max()
    return float(relative), levels_apart(one.image, other.image)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_frames_of_mixed_settings_step_by_step_are_the_stock_pipelines(checkpoints: Any, name: str) -> None:
    loop = checkpoints(name)
    asks = _mixed(loop, name)
    alone = [_stock(loop, ask) for ask in asks]

    with _forwards(loop) as rows:
        together = _step_by_step(loop, asks)

    for ask, mine, stock in zip(asks, together, alone, strict=True):
        relative, levels = _apart(mine, stock)
        assert relative <= LATENTS, ask.spec
        assert levels <= 1, ask.spec
    assert len(rows) < sum(ask.spec.steps for ask in asks)
    assert rows[0] == sum(loop.family.rows(ask.spec) for ask in asks) or name == "pixart-binned"


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux1", "pixart"])
def test_frames_packed_in_one_stock_call_are_the_same_too(checkpoints: Any, name: str) -> None:
    loop = checkpoints(name)
    pipe, model = loop.family.pipe, loop.model
    asks = [tiny_ask(model, prompt, seed=k, steps=4) for k, prompt in enumerate(PROMPTS)]
    together = _step_by_step(loop, asks)

    pipe.scheduler = fresh_sampler(model.sampler, loop.family._sampler_config, steps=4)
    generators = [torch.Generator("cpu").manual_seed(ask.seed) for ask in asks]
    text = {"max_sequence_length": getattr(loop.family, "text_tokens", 256)}
    more = {"clean_caption": False, "use_resolution_binning": False} if name == "pixart" else {}
    takes = inspect.signature(pipe.__call__).parameters
    with torch.inference_mode():
        packed = pipe(
            PROMPTS,
            height=32,
            width=32,
            num_inference_steps=4,
            guidance_scale=4.0,
            generator=generators,
            **{k: v for k, v in {**text, **more}.items() if k in takes},
        ).images

    for mine, image in zip(together, packed, strict=True):
        assert levels_apart(mine.image, np.asarray(image)) <= 1


@pytest.mark.parametrize("name", ["sd", "sd-lcm", "sdxl", "sd3", "flux1", "pixart"])
def test_a_bad_neighbour_lost_memory_and_a_move_leave_the_others_equal(checkpoints: Any, name: str) -> None:
    loop = checkpoints(name)
    asks = [replace(ask, spec=replace(ask.spec, steps=6)) for ask in _mixed(loop, name)]
    quiet = _step_by_step(loop, asks)
    nan, cancelled = UUID(int=0), UUID(int=1)
    for k, ask in enumerate(asks):
        loop.add(UUID(int=k), ask, priority=5)
    forwards = 0

    def refuse(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = loop.family.denoiser.register_forward_pre_hook(refuse)
    loop.tick()
    loop._flight[nan].latents = loop._flight[nan].latents * torch.nan
    loop.tick()
    loop.drop([cancelled])
    hook.remove()
    elsewhere = StepLoop(loop.family, ageing_s=60)
    for frame in list(loop.frames):
        elsewhere.add(frame, asks[frame.int], priority=5, saved=loop.save(frame))
        loop.drop([frame])
    done: dict[UUID, Any] = {}
    steps = {}
    while elsewhere.frames:
        tick = elsewhere.tick()
        steps = {**tick.steps, **steps}  # the first told of each
        done |= tick.done

    assert isinstance(done.pop(nan), RenderFailed)
    assert set(done) == {UUID(int=k) for k in range(2, len(asks))}
    assert max(first for first, _ in steps.values()) == 3  # two steps were not done again
    for frame, image in done.items():
        assert levels_apart(good(image), quiet[frame.int].image) <= 1


def test_two_step_counts_samplers_and_guidances_share_every_forward(checkpoints: Any) -> None:
    loop = checkpoints("sd")
    settings = [("dpm++2m", 8, 7.5), ("euler-a", 5, 2.5), ("unipc", 5, 1.0)]  # of whichever accounts
    for k, (sampler, steps, guidance) in enumerate(settings):
        ask = tiny_ask(loop.model, seed=k, sampler=sampler, steps=steps, guidance=guidance)
        loop.add(UUID(int=k), ask, priority=5)

    with _forwards(loop) as rows:
        ticks = []
        while loop.frames:
            ticks.append(loop.tick())

    assert rows == [5] * 5 + [2] * 3  # 18 forwards one at a time
    assert [t.rows for t in ticks] == rows
    assert [len(t.steps) for t in ticks] == [3] * 5 + [1] * 3
    assert ticks[0].steps == {UUID(int=0): (1, 8), UUID(int=1): (1, 5), UUID(int=2): (1, 5)}
    assert [set(t.done) for t in ticks if t.done] == [{UUID(int=1), UUID(int=2)}, {UUID(int=0)}]


def test_what_is_admitted_has_passed_the_gate(checkpoints: Any) -> None:
    passed = {checkpoints(name).model.pipeline for name in CHECKPOINTS}

    assert passed == set(ADMITTED)


@contextmanager
def _forwards(loop: StepLoop) -> Iterator[list[int]]:
    """The rows of each forward of the denoiser."""
    rows: list[int] = []

    def note(_module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        rows.append(len(args[0] if args else named["hidden_states"]))

    hook = loop.family.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    yield rows
    hook.remove()


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_in_half_precision_frames_are_as_close_to_the_stock_pipelines_as_its_rounding(
    tmp_path: Path, name: str
) -> None:
    loop = tiny_steps(tmp_path, name, dtype="float16")  # SDXL's decoder is in float32 then
    asks = [tiny_ask(loop.model, prompt, seed=k, steps=3 + k) for k, prompt in enumerate(PROMPTS)]

    together = _step_by_step(loop, asks)

    loop.family.pipe.vae.to(torch.float16)
    for ask, mine in zip(asks, together, strict=True):
        relative, levels = _apart(mine, _stock(loop, ask))
        assert relative <= 2e-2
        assert levels <= 8


def test_the_largest_pixart_alpha_is_told_its_size_row_by_row(tmp_path: Path) -> None:
    from tests.tiny import tiny_pixart

    tiny_pixart(tmp_path / "kept", sample_size=128)  # its sizes are around 1024, too slow to render here
    loop = tiny_steps(tmp_path / "model", "pixart", source=f"dir:{tmp_path / 'kept'}")
    ask = tiny_ask(loop.model, width=1024, height=1040, guidance=4.0)

    conditions = loop.family.conditions(ask.spec, *loop.family.size(ask.spec))

    assert conditions["resolution"].tolist() == [[1024, 1024]] * 2
    assert conditions["aspect_ratio"].tolist() == [[1.0]] * 2
