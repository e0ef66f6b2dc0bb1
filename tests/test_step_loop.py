"""Frames in flight: joining, cancelling, memory running out at any point, saving and resuming, strict bits."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import safetensors.torch
import torch

from farm.catalog import BUILTIN, Model, read
from farm.errors import Misconfigured, OutOfMemory, RenderFailed
from farm.features import Hires
from tests.tiny import good, levels_apart, tiny_ask, tiny_model, tiny_steps
from workers.engine import Ask, Pixels, Tick, open_engine, open_step_engine
from workers.engine.samplers import fresh_sampler
from workers.engine.step import saved
from workers.engine.step.families import ADMITTED
from workers.engine.step.loop import StepLoop
from workers.engine.step.pick import BUCKETS
from workers.engine.step.text import TextCache
from workers.gpu import limit_threads

FIRST = UUID(int=0)
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
SETTINGS = [  # sampler, steps, guidance
    ("dpm++2m", 6, 4.0),
    ("euler-a", 4, 9.0),
    ("unipc", 7, 1.0),
    ("heun", 3, 2.5),
    ("dpm++2m-sde", 5, 12.0),
    ("lcm", 3, 0.0),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    limit_threads()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> StepLoop:
    return tiny_steps(tmp_path_factory.mktemp("sd"), "sd")


@pytest.fixture(scope="module")
def starter() -> StepLoop:
    entry = read(BUILTIN)["starter"].model_dump()
    model = Model(**{**entry, "engine": "step", "packs_by": "shape"})
    engine = open_step_engine(model, device="cpu")
    assert isinstance(engine, StepLoop)
    return engine


@pytest.fixture
def loop(opened: StepLoop) -> StepLoop:
    return StepLoop(opened.family, ageing_s=60)


@pytest.fixture(scope="module")
def quiet(opened: StepLoop) -> list[Pixels]:
    """What the mixed frames look like when nothing happens."""
    done = _run(opened, _mixed(opened))
    return [good(done[UUID(int=k)]) for k in range(len(SETTINGS))]


def _mixed(loop: StepLoop, **changes: Any) -> list[Ask]:
    return [
        tiny_ask(loop.model, f"frame {k}", seed=k, sampler=s, steps=n, guidance=g, **changes)
        for k, (s, n, g) in enumerate(SETTINGS)
    ]


def _add(loop: StepLoop, asks: Sequence[Ask]) -> None:
    for k, ask in enumerate(asks):
        loop.add(UUID(int=k), ask, priority=5)


def _finish(loop: StepLoop) -> dict[UUID, Pixels | RenderFailed]:
    done: dict[UUID, Pixels | RenderFailed] = {}
    while loop.frames:
        done |= loop.tick().done
    return done


def _run(loop: StepLoop, asks: Sequence[Ask]) -> dict[UUID, Pixels | RenderFailed]:
    _add(loop, asks)
    return _finish(loop)


def _same(done: dict[UUID, Pixels | RenderFailed], quiet: list[Pixels], *, but: Sequence[int] = ()) -> None:
    """Every frame is as it is on a quiet day, within what another number of rows rounds away."""
    for k, image in enumerate(quiet):
        if k not in but:
            assert levels_apart(good(done[UUID(int=k)]), image) <= 1, SETTINGS[k]


@contextmanager
def _before(module: torch.nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _rows(loop: StepLoop, rows: list[int]) -> Any:
    return _before(loop.family.denoiser, lambda _, args: rows.append(len(args[0])))


# ---------------------------------------------------------------------------------------------- in and out


def test_a_frame_joins_at_the_next_tick_and_an_urgent_one_takes_the_place_of_another(
    loop: StepLoop, quiet: list[Pixels]
) -> None:
    asks = _mixed(loop)
    capped = replace_cap(loop, rows=4)
    for k in (0, 1, 3):
        capped.add(UUID(int=k), asks[k], priority=1)

    first = capped.tick()
    capped.add(UUID(int=4), asks[4], priority=9)
    second = capped.tick()

    assert set(first.steps) == {UUID(int=0), UUID(int=1)}
    assert set(capped.parked) == {UUID(int=1), UUID(int=3)}
    assert set(second.steps) == {UUID(int=4), UUID(int=0)}
    assert second.steps[UUID(int=4)] == (1, 5)
    done = _finish(capped)
    for k in (0, 1, 3, 4):  # one was parked after its first step
        assert levels_apart(good(done[UUID(int=k)]), quiet[k]) <= 1


def replace_cap(loop: StepLoop, **pack: Any) -> StepLoop:
    """The same checkpoint with another pack limit."""
    limits = loop.model.pack.model_copy(update=pack)
    other = StepLoop(loop.family, ageing_s=60)
    other._caps._pack = limits
    return other


def test_room_is_what_the_next_tick_would_take_more(loop: StepLoop) -> None:
    capped, asks = replace_cap(loop, rows=8), _mixed(loop)
    guided, plain = asks[0].spec, asks[5].spec

    assert (capped.room(guided), capped.room(plain)) == (4, 8)
    _add(capped, asks[:3])  # two rows, two rows and one

    assert (capped.room(guided), capped.room(plain)) == (1, 3)
    assert capped.room(replace(guided, width=64, height=64)) == 1
    _add(capped, [*asks, *asks])
    assert (capped.room(guided), capped.room(plain)) == (0, 0)


def test_frames_that_end_together_leave_one_a_tick_while_an_urgent_one_runs(loop: StepLoop) -> None:
    _add(loop, [tiny_ask(loop.model, seed=k, steps=2) for k in range(3)])
    loop.add(UUID(int=8), tiny_ask(loop.model, seed=8, steps=2), priority=9)
    loop.add(UUID(int=9), tiny_ask(loop.model, seed=9, steps=5), priority=9)

    left = []
    while loop.frames:
        left.append([frame.int for frame in loop.tick().done])

    assert left == [[], [8, 0], [1], [2], [9]]


def test_frames_decoded_beside_the_next_forward_leave_with_it_and_are_the_same(
    loop: StepLoop, quiet: list[Pixels]
) -> None:
    _add(loop, _mixed(loop))
    at_once = [list(loop.tick().done) for _ in range(max(n for _, n, _ in SETTINGS)) if loop.frames]
    later = StepLoop(loop.family, ageing_s=60)
    later.decoder.beside = True
    _add(later, _mixed(later))

    done, left = {}, []
    while later.frames:
        tick = later.tick()
        left.append(list(tick.done))
        done |= tick.done
        assert sum(tick.shares.values()) == pytest.approx(tick.seconds)

    _same(done, quiet)
    *first, last = at_once
    assert left[0] == []
    assert left[1:-1] == first[:-1]
    assert set(left[-1]) == {*first[-1], *last}  # nothing follows that they could be beside


def test_a_frame_dropped_while_it_is_decoded_beside_does_not_come_back(loop: StepLoop) -> None:
    loop.decoder.beside = True
    for k, steps in enumerate((1, 1, 3)):
        loop.add(UUID(int=k), tiny_ask(loop.model, seed=k, steps=steps), priority=5)
    assert loop.tick().done == {}
    assert len(loop.frames) == 3

    loop.drop([FIRST])

    assert list(_finish(loop)) == [UUID(int=1), UUID(int=2)]


def test_memory_that_runs_out_while_decoding_beside_fails_no_frame(
    loop: StepLoop, quiet: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.decoder.beside = True
    decode, tries = loop.family.decode, iter((True, False) * len(SETTINGS))

    def short(record: Any) -> torch.Tensor:
        if next(tries):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(record)

    monkeypatch.setattr(loop.family, "decode", short)

    _same(_run(loop, _mixed(loop)), quiet)


def test_rows_padded_to_buckets_change_no_frame(loop: StepLoop, quiet: list[Pixels]) -> None:
    loop.padded = True  # as where the denoiser is compiled
    rows: list[int] = []

    with _rows(loop, rows):
        done = _run(loop, _mixed(loop))

    _same(done, quiet)
    assert set(rows) <= set(BUCKETS)
    assert rows[0] == 12  # of ten


def test_an_empty_engine_ticks_without_a_forward(loop: StepLoop) -> None:
    assert loop.tick() == Tick("", 0, {}, {}, 0, {})


def test_the_shares_of_a_tick_add_up_to_its_time_and_tell_of_all_that_was_done(loop: StepLoop) -> None:
    _add(loop, _mixed(loop))

    ticks = []
    while loop.frames:
        ticks.append(loop.tick())

    for tick in ticks:
        assert sum(tick.shares.values()) == pytest.approx(tick.seconds)
        assert set(tick.shares) == set(tick.steps)
    guided, plain = ticks[1].shares[FIRST], ticks[1].shares[UUID(int=2)]
    assert guided == pytest.approx(2 * plain)  # by rows
    assert ticks[0].shares[FIRST] > 0


def test_a_new_priority_of_a_frame_in_flight_is_taken(loop: StepLoop) -> None:
    capped, asks = replace_cap(loop, rows=2), _mixed(loop)
    _add(capped, asks[:2])
    capped.tick()

    capped.add(UUID(int=1), asks[1], priority=7)

    assert set(capped.tick().steps) == {UUID(int=1)}
    assert capped.family.rows(asks[0].spec) == 2


def test_a_dropped_frame_leaves_at_once_and_its_neighbours_are_equal(
    loop: StepLoop, quiet: list[Pixels]
) -> None:
    _add(loop, _mixed(loop))
    loop.tick()
    loop.tick()

    loop.drop([FIRST, UUID(int=99)])

    assert FIRST not in loop.frames
    third = loop.tick()
    assert FIRST not in third.steps
    done = {**third.done, **_finish(loop)}
    assert FIRST not in done
    _same(done, quiet, but=[0])


# ---------------------------------------------------------------------------------------------- what goes wrong


def test_a_frame_of_nan_fails_alone_and_its_neighbours_are_bit_equal(loop: StepLoop) -> None:
    asks = [tiny_ask(loop.model, f"frame {k}", seed=k) for k in range(3)]
    before = _run(loop, asks)

    _add(loop, asks)
    loop.tick()
    bad = loop._flight[UUID(int=1)]
    bad.latents = bad.latents * torch.nan
    done = _finish(loop)

    assert str(done[UUID(int=1)]) == "the image is not a number"
    for k in (0, 2):
        assert np.array_equal(good(done[UUID(int=k)]), good(before[UUID(int=k)]))


@pytest.mark.parametrize("failing", [1, 2, 5])
def test_a_forward_without_memory_is_repeated_with_fewer_rows(
    loop: StepLoop, quiet: list[Pixels], failing: int
) -> None:
    rows: list[int] = []

    def refuse(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        rows.append(len(args[0]))
        if len(rows) == failing:
            raise NO_MEMORY

    _add(loop, _mixed(loop))
    with _before(loop.family.denoiser, refuse):
        done = _finish(loop)

    _same(done, quiet)
    assert max(rows[failing:]) <= rows[failing - 1] // 2  # learned and kept
    assert loop._caps.rows(32 * 32, 2, urgent=False, strict=False) == rows[failing - 1] // 2


def test_a_sampler_step_without_memory_changes_no_frame(
    loop: StepLoop, quiet: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = _mixed(loop)
    _add(loop, asks)
    kind = type(fresh_sampler("dpm++2m-sde", loop.family._sampler_config, steps=5))  # the fifth frame to step
    step, calls = kind.step, []

    def refuse(self: Any, *args: Any, **named: Any) -> Any:
        calls.append(self.config.algorithm_type)
        result = step(self, *args, **named)  # its history and its generator have moved on
        if calls.count("sde-dpmsolver++") == 2 and calls[-1] == "sde-dpmsolver++":
            calls.append("sde-dpmsolver++")
            raise NO_MEMORY
        return result

    monkeypatch.setattr(kind, "step", refuse)
    rows: list[int] = []
    with _rows(loop, rows):
        done = _finish(loop)

    _same(done, quiet)
    assert rows[1] > rows[2]  # the second forward was repeated with half


def test_a_decoder_without_memory_tries_again_and_no_frame_fails(loop: StepLoop, quiet: list[Pixels]) -> None:
    calls: list[int] = []

    def refuse(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise NO_MEMORY

    _add(loop, _mixed(loop))
    with _before(loop.family.pipe.vae.decoder, refuse):
        done = _finish(loop)

    _same(done, quiet)
    assert len(calls) == len(SETTINGS) + 1


def test_a_frame_that_runs_out_of_memory_alone_twice_fails_alone(loop: StepLoop, quiet: list[Pixels]) -> None:
    large = tiny_ask(loop.model, width=64, height=64)

    def refuse(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[-1] == 8:
            raise NO_MEMORY

    _add(loop, _mixed(loop))
    loop.add(UUID(int=9), large, priority=5)
    with _before(loop.family.denoiser, refuse):
        done = _finish(loop)

    assert isinstance(done[UUID(int=9)], OutOfMemory)
    _same(done, quiet)


def test_a_frame_whose_sampler_breaks_fails_alone(
    loop: StepLoop, quiet: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    _add(loop, _mixed(loop))
    loop.tick()
    sampler = loop._flight[UUID(int=2)].sampler
    sampler.timestep_list = []  # as if its history had been lost

    done = _finish(loop)

    assert str(done[UUID(int=2)]).startswith("IndexError")
    _same(done, quiet, but=[2])


def test_a_frame_whose_inputs_break_the_forward_fails_alone(loop: StepLoop, quiet: list[Pixels]) -> None:
    _add(loop, _mixed(loop))
    record = loop._flight[UUID(int=1)]
    record.conditions = {name: c[..., :-1] for name, c in record.conditions.items()}

    done = _finish(loop)

    failed = done[UUID(int=1)]
    assert isinstance(failed, RenderFailed)
    assert not isinstance(failed, OutOfMemory)
    _same(done, quiet, but=[1])


def test_a_model_that_breaks_for_every_frame_comes_out_of_the_tick(loop: StepLoop) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the weights are gone")

    _add(loop, _mixed(loop))
    with (
        _before(loop.family.denoiser, broken),
        pytest.raises(RuntimeError, match="the weights are gone"),
    ):
        loop.tick()

    loop.drop(list(loop.frames))


def test_a_text_encoder_without_memory_is_asked_twice_and_nothing_is_in_flight_then(loop: StepLoop) -> None:
    calls: list[int] = []

    def refuse(*_: Any) -> None:
        calls.append(1)
        raise NO_MEMORY

    with _before(loop.family.pipe.text_encoder, refuse), pytest.raises(OutOfMemory):
        loop.add(FIRST, tiny_ask(loop.model, "never seen"), priority=5)

    assert len(calls) == 2
    assert not loop.frames


# ---------------------------------------------------------------------------------------------- saving


def test_frames_saved_in_the_middle_go_on_in_another_engine(
    loop: StepLoop, tmp_path: Path, quiet: list[Pixels]
) -> None:
    asks = _mixed(loop)
    _add(loop, asks)
    done = {**loop.tick().done, **loop.tick().done}
    states = {frame: loop.save(frame) for frame in loop.frames}
    elsewhere = tiny_steps(tmp_path, "sd")  # another process would load the same checkpoint

    for frame, state in states.items():
        elsewhere.add(frame, asks[frame.int], priority=5, saved=state)
    first = elsewhere.tick()
    done |= {**first.done, **_finish(elsewhere)}

    assert set(first.steps.values()) == {(3, 6), (3, 4), (3, 7), (3, 5), (3, 3)}  # heun: two stages a step
    _same(done, quiet)


def test_a_frame_that_memory_is_too_short_to_save_goes_on(
    loop: StepLoop, quiet: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    _add(loop, _mixed(loop))
    loop.tick()
    with monkeypatch.context() as full:

        def refuse(*_: Any) -> bytes:
            raise NO_MEMORY

        full.setattr(saved, "dump", refuse)

        assert loop.save(FIRST) is None

    assert loop.save(FIRST) is not None
    _same(_finish(loop), quiet)


def test_a_frame_saved_after_its_last_step_is_only_decoded(loop: StepLoop, quiet: list[Pixels]) -> None:
    asks = _mixed(loop)

    def refuse(*_: Any) -> None:
        raise KeyboardInterrupt  # the process is stopped while it decodes

    loop.add(UUID(int=1), asks[1], priority=5)
    for _ in range(3):
        loop.tick()
    with _before(loop.family.pipe.vae.decoder, refuse), pytest.raises(KeyboardInterrupt):
        loop.tick()
    state = loop.save(UUID(int=1))
    loop.drop([UUID(int=1)])

    loop.add(UUID(int=1), asks[1], priority=5, saved=state)
    tick = loop.tick()

    assert tick.rows == 0
    assert levels_apart(good(tick.done[UUID(int=1)]), quiet[1]) <= 1


def test_a_frame_saved_in_its_second_pass_goes_on_there(loop: StepLoop) -> None:
    ask = tiny_ask(loop.model, steps=3, hires=Hires(width=48, height=64, steps=6, strength=0.5))
    quiet = good(_run(loop, [ask])[FIRST])
    loop.add(FIRST, ask, priority=5)
    for _ in range(4):
        tick = loop.tick()
    assert tick.steps[FIRST] == (4, 6)  # three, and one of the second pass's three
    state = loop.save(FIRST)
    loop.drop([FIRST])

    loop.add(FIRST, ask, priority=5, saved=state)

    assert loop.tick().steps[FIRST] == (5, 6)
    assert levels_apart(good(_finish(loop)[FIRST]), quiet) <= 1


@pytest.mark.parametrize(
    "harm",
    [
        lambda state: state[: len(state) // 2],
        lambda state: b"",
        lambda state: b"\xff" * 64,
        lambda state: state.replace(b"latents", b"latentz"),
        lambda state: state.replace(b"F32", b"F16"),
        lambda state: state.replace(b"_step_index", b"__class__\\u0020"[:11]),
    ],
    ids=["half", "empty", "noise", "no latents", "other dtype", "other name"],
)
def test_a_damaged_state_is_ignored_and_the_frame_starts_over(
    loop: StepLoop, quiet: list[Pixels], harm: Callable[[bytes], bytes]
) -> None:
    ask = _mixed(loop)[0]
    loop.add(FIRST, ask, priority=5)
    loop.tick()
    loop.tick()
    state = loop.save(FIRST)
    assert state is not None
    loop.drop([FIRST])

    loop.add(FIRST, ask, priority=5, saved=harm(state))

    assert loop.tick().steps[FIRST] == (1, 6)
    assert levels_apart(good(_finish(loop)[FIRST]), quiet[0]) <= 1


def test_a_state_is_good_for_its_own_frame_only(loop: StepLoop) -> None:
    ask = _mixed(loop)[0]
    loop.add(FIRST, ask, priority=5)
    loop.tick()
    state = loop.save(FIRST)
    loop.drop([FIRST])

    for other in (replace(ask, seed=8), replace(ask, spec=replace(ask.spec, prompt="another"))):
        loop.add(FIRST, other, priority=5, saved=state)
        assert loop.tick().steps[FIRST] == (1, 6)
        loop.drop([FIRST])


def test_a_state_holds_tensors_and_plain_facts_alone(loop: StepLoop) -> None:
    _add(loop, _mixed(loop))
    loop.tick()
    loop.tick()

    for frame in loop.frames:
        state = loop.save(frame)
        assert state is not None
        header = json.loads(state[8 : 8 + int.from_bytes(state[:8], "little")])
        assert {"latents", "generator"} <= set(safetensors.torch.load(state))
        assert set(json.loads(header["__metadata__"]["state"])) == {"of", "stage", "index", "sampler"}
        assert len(state) < 32_000
    assert loop.save(UUID(int=99)) is None
    loop.drop(list(loop.frames))


# ---------------------------------------------------------------------------------------------- strict


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strict_frames_are_bit_equal_whatever_their_neighbours(tmp_path: Path, dtype: str) -> None:
    loop = tiny_steps(tmp_path, "sd", dtype=dtype)
    asks = _mixed(loop, reproducible="strict")
    alone = [_latents(loop, [ask])[FIRST] for ask in asks]
    rows: list[int] = []

    with _rows(loop, rows):
        together = _latents(loop, asks)
        backwards = _latents(loop, asks[::-1])

    for k, latents in enumerate(alone):
        assert torch.equal(latents, together[UUID(int=k)])
        assert torch.equal(latents, backwards[UUID(int=len(asks) - 1 - k)])
    assert set(rows) == {8}
    if dtype == "float32":  # in bfloat16 the rounding hides what the number of rows changes
        plain = _latents(loop, _mixed(loop))
        assert not all(torch.equal(one, plain[UUID(int=k)]) for k, one in enumerate(alone))


def _latents(loop: StepLoop, asks: Sequence[Ask]) -> dict[UUID, torch.Tensor]:
    """What the decoder gets of each frame."""
    seen: list[torch.Tensor] = []
    frames: list[UUID] = []
    with _before(loop.family.pipe.vae.decoder, lambda _, args: seen.append(args[0].clone())):
        _add(loop, asks)
        while loop.frames:
            frames += loop.tick().done
    return dict(zip(frames, seen, strict=True))


def test_strict_frames_stay_bit_equal_after_memory_ran_out(loop: StepLoop) -> None:
    asks = _mixed(loop, reproducible="strict")[:3]
    before = _run(loop, asks)
    loop._caps.ran_out(32 * 32, rows=4)

    after = _run(loop, asks)

    for frame, image in before.items():
        assert np.array_equal(good(image), good(after[frame]))


# ---------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("sampler", ["dpm++2m", "euler", "ddim"])
def test_a_preview_is_a_small_picture_close_to_the_image(starter: StepLoop, sampler: str) -> None:
    ask = tiny_ask(starter.model, "a red circle", width=64, height=64, steps=6, sampler=sampler)
    starter.add(FIRST, ask, priority=5)
    assert starter.preview(FIRST) is None  # no step yet
    for _ in range(4):
        starter.tick()

    preview = starter.preview(FIRST)
    image = good(_finish(starter)[FIRST])

    assert preview is not None
    assert preview.shape == (16, 16, 3)  # one pixel a latent
    small = image.reshape(*preview.shape[:1], -1, *preview.shape[1:2], 64 // preview.shape[1], 3).mean((1, 3))
    flat = np.abs(small - image.mean((0, 1))).mean()  # how wrong the mean colour would be
    assert np.abs(preview - small).mean() < 0.7 * flat
    assert starter.preview(FIRST) is None


def test_texts_are_encoded_once_and_the_cache_stays_within_its_bytes(opened: StepLoop) -> None:
    loop, calls = StepLoop(opened.family, ageing_s=60), []
    asks = [tiny_ask(loop.model, f"twice {k % 2}", negative_prompt="same", seed=k) for k in range(4)]

    with _before(loop.family.pipe.text_encoder, lambda *_: calls.append(1)):
        _run(loop, asks)
    assert len(calls) == 3

    cache = TextCache(limit_bytes=1000)
    row = {"text": torch.zeros(1, 100)}  # 400 bytes
    for text in "abcb":
        cache.get(text, lambda: row)
    assert (len(cache), cache.bytes) == (2, 800)
    cache.get("large", lambda: {"text": torch.zeros(1, 1000)})
    assert cache.bytes == 0


def test_a_pipeline_that_is_not_admitted_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "sd", engine="step", packs_by="shape", pipeline="Kandinsky3Pipeline")

    with pytest.raises(Misconfigured) as refused:
        open_step_engine(model, device="cpu")

    assert "Kandinsky3Pipeline is not admitted" in str(refused.value)
    assert all(name in str(refused.value) for name in ADMITTED)


def test_a_step_model_is_not_opened_to_run_to_completion(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "sd", engine="step", packs_by="shape")

    with pytest.raises(Misconfigured, match="step by step"):
        open_engine(model, device="cpu")
