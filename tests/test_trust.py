"""Whose fault a failure is, what is set aside for it, and when it is forgiven."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from farm import tokens
from farm.accounts import Caller
from farm.catalog import Catalog, Model
from farm.db import sql, transaction
from farm.errors import RenderFailed
from tests.factories import account, ask, one, submit
from tests.starting import lora_use, tiny_lora
from tests.tiny import open_tiny, tiny_ask, tiny_model
from workers import gpu
from workers.ailing import note, remembered
from workers.engine import Inputs
from workers.engine.plain import what_is_wrong
from workers.run import Worker
from workers.trust import DEVICE, DEVICE_S, IN_A_ROW, MODEL_S, PAUSE_MAX_S, Ailment, Blame, Trust, too_fast


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    gpu.limit_threads()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def told() -> list[Ailment]:
    return []


class Device:
    """A device that can be broken."""

    wrong = ""

    def probe(self) -> str:
        return self.wrong


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def trust(clock: Clock, told: list[Ailment], device: Device) -> Trust:
    return Trust(probe=device.probe, tell=told.append, clock=clock)


FRAMES = ("a", "b", "c", "d", "e")


def fail(trust: Trust, model: str = "sd", frames: tuple[str, ...] = FRAMES[:IN_A_ROW]) -> list[Blame]:
    return [trust.bad(model, [frame], "the image is not a number") for frame in frames]


def test_a_frame_that_fails_again_and_again_is_to_blame_itself(trust: Trust) -> None:
    assert fail(trust, frames=("a",) * 5) == [Blame.FRAME] * 5
    assert trust.may("sd")


def test_a_frame_is_to_blame_while_others_of_its_model_come_out_well(trust: Trust) -> None:
    for frame in FRAMES:
        assert trust.bad("sd", [frame], "the image is all black") is Blame.FRAME
        trust.good("sd")

    assert trust.may("sd")


def test_a_model_that_renders_nothing_is_set_aside_and_the_others_go_on(
    trust: Trust, told: list[Ailment]
) -> None:
    trust.good("flux")

    assert fail(trust) == [Blame.FRAME, Blame.FRAME, Blame.MODEL]

    assert not trust.may("sd")
    assert trust.may("flux")
    assert trust.sick == ""
    assert told == [Ailment("sd", "the image is not a number", 1, MODEL_S)]


def test_a_model_that_was_set_aside_is_judged_by_its_next_failure(trust: Trust, clock: Clock) -> None:
    fail(trust)
    clock.now += MODEL_S
    assert trust.may("sd")

    assert fail(trust, frames=("d",)) == [Blame.MODEL]

    clock.now += MODEL_S
    assert not trust.may("sd")  # longer this time


def test_what_was_in_flight_when_a_model_was_set_aside_makes_its_pause_no_longer(
    trust: Trust, clock: Clock, told: list[Ailment]
) -> None:
    fail(trust)
    clock.now += MODEL_S

    assert fail(trust, frames=("d", "e", "f", "g")) == [Blame.MODEL] * 4

    assert [a.pause_s for a in told] == [MODEL_S, 2 * MODEL_S]


def test_frames_on_a_device_that_was_set_aside_are_not_blamed(trust: Trust, device: Device) -> None:
    device.wrong = "it computes wrong"
    fail(trust)

    assert fail(trust, "flux", frames=("d", "e")) == [Blame.DEVICE] * 2


def test_frames_that_break_in_a_row_are_to_blame_while_a_plain_one_comes_out_well(clock: Clock) -> None:
    tried: list[str] = []

    def renders(model: str) -> str:
        tried.append(model)
        return ""

    trust = Trust(probe=lambda: "", try_model=renders, clock=clock)

    assert set(fail(trust, frames=tuple("abcdefghi"))) == {Blame.FRAME}

    assert trust.may("sd")
    assert tried == ["sd"] * 3  # one plain image for three failures at most


def test_a_pack_that_went_down_once_is_one_failure_however_many_frames_it_had(trust: Trust) -> None:
    assert trust.bad("sd", FRAMES, "broken") is Blame.FRAME
    assert trust.may("sd")


def test_a_device_that_computes_wrong_is_to_blame_and_stops_claiming(
    trust: Trust, device: Device, told: list[Ailment]
) -> None:
    device.wrong = "it computes wrong"

    assert fail(trust)[-1] is Blame.DEVICE

    assert not trust.may("sd")
    assert not trust.may("flux")
    assert trust.sick == "it computes wrong"
    assert told == [Ailment(DEVICE, "it computes wrong", 1, DEVICE_S)]


def test_two_models_that_render_nothing_are_the_devices_fault(trust: Trust) -> None:
    assert fail(trust, "sd")[-1] is Blame.MODEL

    assert fail(trust, "flux")[-1] is Blame.DEVICE

    assert not trust.may("other")


def test_two_models_that_render_nothing_one_after_the_other_are_not(trust: Trust) -> None:
    fail(trust, "sd")
    trust.good("other")

    assert fail(trust, "flux")[-1] is Blame.MODEL

    assert trust.may("other")


def test_a_model_is_forgiven_after_a_pause_that_doubles_until_something_was_good(
    trust: Trust, clock: Clock, told: list[Ailment]
) -> None:
    trust.cannot_load("sd", "no checkpoint")
    assert not trust.may("sd")
    clock.now += MODEL_S
    assert trust.may("sd")
    trust.cannot_load("sd", "no checkpoint")
    clock.now += MODEL_S
    assert not trust.may("sd")
    clock.now += MODEL_S
    assert trust.may("sd")

    trust.good("sd")
    trust.cannot_load("sd", "no checkpoint")

    assert [a.pause_s for a in told] == [MODEL_S, 2 * MODEL_S, 0, MODEL_S]
    for _ in range(20):
        trust.cannot_load("sd", "no checkpoint")
    assert told[-1].pause_s == PAUSE_MAX_S


def test_a_sick_device_is_forgiven_after_a_time_only_if_it_computes_right(
    trust: Trust, device: Device, clock: Clock
) -> None:
    device.wrong = "it computes wrong"
    fail(trust)
    clock.now += DEVICE_S
    assert not trust.may("sd")  # the probe failed: longer this time
    device.wrong = ""
    clock.now += DEVICE_S
    assert not trust.may("sd")

    clock.now += DEVICE_S

    assert trust.may("sd")
    assert trust.sick == ""


def test_one_device_error_may_be_a_frames_and_the_second_in_a_row_is_the_devices(
    trust: Trust, told: list[Ailment]
) -> None:
    assert trust.device_failed("CUDA error: illegal address") is Blame.FRAME
    assert trust.may("sd")

    assert trust.device_failed("CUDA error: illegal address") is Blame.DEVICE

    assert not trust.may("sd")
    assert [a.pause_s for a in told] == [0, 2 * DEVICE_S]


def test_good_images_between_two_device_errors_clear_the_device(trust: Trust) -> None:
    trust.device_failed("CUDA error")
    trust.good("sd")

    assert trust.device_failed("CUDA error") is Blame.FRAME


def test_what_an_earlier_process_told_is_remembered(trust: Trust, clock: Clock) -> None:
    trust.remember({DEVICE: ("CUDA error", 1, 0.0), "sd": ("no checkpoint", 2, 30.0)})

    assert trust.may("flux")
    assert not trust.may("sd")
    clock.now += 30
    assert trust.may("sd")
    assert trust.device_failed("CUDA error") is Blame.DEVICE


def test_an_image_that_came_faster_than_it_can_is_named() -> None:
    assert "one takes 3.000 s" in too_fast(0.2, measured_s=3.0)
    assert too_fast(0.4, measured_s=3.0) == ""
    assert too_fast(0.0001, measured_s=0) == ""


def test_a_device_that_is_well_computes_right() -> None:
    assert gpu.probe() == ""


def test_a_device_that_computes_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def wrong(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.mm(one, other).mul(1.1 if one.dtype == torch.float32 else 1)

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)

    assert "computes wrong" in gpu.probe()


# ------------------------------------------------------------------------------------------------ the farm


@pytest.fixture
def worker(books: str) -> str:
    ask(
        "INSERT INTO workers (id, pool, models, device, state) VALUES ('w', 'both', '{alpha,beta}', 'cpu', 'up')"
    )
    return "w"


def idle() -> dict[str, int]:
    with transaction() as db:
        rows = db.execute(sql("idle_workers"), {"models": None, "lost_s": 30})
        return {row.model: row.idle for row in rows}


def test_a_worker_is_not_woken_for_a_model_it_cannot_load(worker: str) -> None:
    caller = account()
    submit(caller, model="alpha")
    submit(caller, model="beta")
    assert idle() == {"alpha": 1, "beta": 1}

    note(worker, Ailment("alpha", "no checkpoint", 1, 60.0))

    assert idle() == {"beta": 1}
    ask("UPDATE ailments SET until = since")  # its pause is over
    assert idle() == {"alpha": 1, "beta": 1}


def test_a_sick_worker_is_woken_for_nothing_and_its_next_process_knows(worker: str) -> None:
    submit(account(), model="alpha")

    note(worker, Ailment(DEVICE, "it computes wrong", 2, 240.0))

    assert idle() == {}
    reason, times, left_s = remembered(worker)[DEVICE]
    assert (reason, times) == ("it computes wrong", 2)
    assert 200 < left_s <= 240
    note(worker, Ailment(DEVICE, "", 0, 0.0))
    assert remembered(worker) == {}
    assert set(idle()) == {"alpha"}


def test_what_is_wrong_with_a_worker_nobody_knows_is_not_kept(books: str) -> None:
    note("nobody", Ailment(DEVICE, "it computes wrong", 1, 60.0))

    assert one("SELECT count(*) FROM ailments") == 0


def test_tokens_are_not_kept_up_for_a_model_no_worker_can_load(worker: str) -> None:
    submit(account(), model="alpha")
    note(worker, Ailment("alpha", "no checkpoint", 1, 60.0))

    with transaction() as db:
        assert tokens.top_up(db) == 0


# ------------------------------------------------------------------------------------------------ a real worker


@pytest.fixture
def rendering(books: str, tmp_path: Path) -> Worker:
    """A worker with tiny checkpoints of alpha and beta."""
    entries = Catalog([tiny_model(tmp_path / name, name=name, pool="both") for name in ("alpha", "beta")])
    ask(
        "INSERT INTO workers (id, pool, models, device, state) VALUES ('w', 'both', '{alpha,beta}', 'cpu', 'up')"
    )
    return Worker("w", pool="both", models=list(entries.values()), device="cpu")


def burst(worker: Worker) -> str:
    return worker.burst(lambda report: None).outcome


def send(worker: Worker, caller: Caller, count: int = 1, **spec: Any) -> None:
    models = Catalog(list(worker._models.values()))
    submit(caller, count, models=models, **{"width": 32, "height": 32, "guidance": 4.0, "steps": 2, **spec})


def spoil(monkeypatch: pytest.MonkeyPatch, *, model: str) -> None:
    """Let the decoder of a model give no numbers."""
    from workers.engine import pipe

    real = pipe.PipeEngine.open.__func__  # type: ignore[attr-defined]

    def opened(kind: Any, entry: Model, *, device: str) -> Any:
        engine = real(kind, entry, device=device)
        if entry.name == model:
            engine.pipe.vae.decoder.register_forward_hook(lambda _m, _a, image: image * float("nan"))
        return engine

    monkeypatch.setattr(pipe.PipeEngine, "open", classmethod(opened))


def test_a_model_whose_checkpoint_does_not_load_is_not_claimed_again_at_once(rendering: Worker) -> None:
    caller = account()
    shutil.rmtree(Path(rendering._models["alpha"].source.removeprefix("dir:")))
    send(rendering, caller, model="alpha")
    send(rendering, caller, model="beta")

    assert burst(rendering) == "empty"

    assert ask("SELECT spec->>'model' AS model, status FROM frames ORDER BY 1") == [
        ("alpha", "queued"),
        ("beta", "done"),
    ]
    assert "alpha" not in idle()  # nobody is woken for it, so no burst a second
    assert "model_index.json" in one("SELECT reason FROM ailments WHERE model = 'alpha'")
    assert one("SELECT sum(attempts) FROM frames") == 0


def test_frames_of_a_model_that_renders_nothing_are_not_blamed(
    rendering: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = account()
    spoil(monkeypatch, model="alpha")
    send(rendering, caller, 12, model="alpha")

    while burst(rendering) == "empty" and not one("SELECT count(*) FROM ailments"):
        pass

    assert one("SELECT reason FROM ailments").startswith("the image is not a number")
    assert ask("SELECT DISTINCT status FROM frames") == [("queued",)]
    spoiled = one("SELECT max(attempts) FROM frames")
    assert spoiled < 3
    send(rendering, caller, model="beta")
    burst(rendering)
    assert one("SELECT count(*) FROM frames WHERE status = 'done'") == 1


def test_an_accounts_broken_frames_do_not_take_a_model_from_the_others(
    rendering: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.engine import pipe

    real = pipe.PipeEngine.render

    def render(self: Any, asks: Any, **more: Any) -> Any:
        if any("broken" in a.spec.prompt for a in asks):
            raise RenderFailed("the prompt's weights cannot be read")
        return real(self, asks, **more)

    monkeypatch.setattr(pipe.PipeEngine, "render", render)
    for k in range(5):
        send(rendering, account(f"evil-{k}"), model="alpha", prompt=f"broken {k}", steps=3 + k)
    for _ in range(20):
        burst(rendering)
        if not one("SELECT count(*) FROM frames WHERE ended_at IS NULL"):
            break

    assert one("SELECT count(*) FROM ailments") == 0
    assert ask("SELECT DISTINCT status, attempts FROM frames") == [("failed", 3)]


def test_a_plain_image_has_no_lora(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "alpha", name="alpha")
    engine = open_tiny(model)
    entry = tiny_lora(engine.pipe, tmp_path / "loras", "broken", 1)
    file = tmp_path / "loras" / entry.file
    weights = {name: value * float("nan") for name, value in load_file(file).items()}
    save_file(weights, file)
    plain = tiny_ask(model, loras=(lora_use("broken", entry),))
    ask = replace(plain, inputs=Inputs(loras=(file,)))

    assert isinstance(engine.render([ask], on_step=lambda done, total: None)[0], RenderFailed)

    assert what_is_wrong(engine, model) == ""  # one account's LoRA takes no model from the others


@pytest.mark.parametrize("engine", ["pipe", "step"])
def test_an_image_that_comes_too_fast_fails(books: str, tmp_path: Path, engine: str) -> None:
    packs_by = "shape" if engine == "step" else "call"
    entry = tiny_model(tmp_path, name="alpha", pool="both", engine=engine, packs_by=packs_by, free=())
    rendering = Worker("w", pool="both", models=[entry], device="cpu")
    send(rendering, account(), model="alpha")
    device = gpu.describe().name
    ask(
        "INSERT INTO measurements (model, revision, precision, device, width, height, steps, load_s, seconds,"
        " resident_bytes, peak_bytes) VALUES ('alpha', 'tiny', 'float32', :device, 32, 32, 4, 1, 3600, 0, 1)",
        device=device,
    )
    rendering.warm_up()

    burst(rendering)

    while burst(rendering) == "empty" and one("SELECT status FROM frames") == "queued":
        pass
    assert "one takes 1800.000 s" in one("SELECT reason FROM frames")
