"""A worker and the queue around a step engine: joining, leaving, preemption, blame, checkpoints, draining."""

import io
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from itertools import groupby
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from redis import Redis as RedisClient

from farm import accounts, ids, jobs, pricing, queue
from farm.api.app import create_app
from farm.catalog import Catalog
from farm.db import transaction
from farm.settings import settings
from farm.spec import Spec
from tests.chaos.engine import BAD, FakeEngine, picture
from tests.factories import (
    account,
    ask,
    expire,
    fail,
    model,
    must_claim,
    one,
    statuses,
    submit,
    violations,
)
from tests.stepping import BREAKS, Device, Noted
from workers import claims, engines, leases, progress, steps
from workers.checkpoints import key_of
from workers.encode import pixel_hash
from workers.run import Worker

STEP: dict[str, Any] = {
    "engine": "step",
    "packs_by": "shape",
    "free": (),
    "pack": {"frames": 4, "pixels": 4 << 20, "rows": 8},
    "steps": {"min": 1, "max": 1000, "default": 4},
}
STEPPER = model("stepper", **STEP)
OTHER = model("other", **STEP)
PIPE = model("alpha")
MODELS = Catalog([STEPPER, OTHER, PIPE])
PATIENCE_S = 30.0

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def house(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A farm with these models; its books must be right when the test is over. Yields what changes settings."""
    with transaction() as session:
        pricing.sync(session, MODELS)
    monkeypatch.setattr(leases, "LOOK_S", 0.02)
    yield monkeypatch
    assert violations() == []


@pytest.fixture
def device(house: pytest.MonkeyPatch) -> Device:
    return Device(house)


def let(patch: pytest.MonkeyPatch, **changes: object) -> None:
    """Change settings."""
    for name, value in changes.items():
        patch.setenv(f"FARM_{name.upper()}", str(value))
    settings.cache_clear()


def asked(caller: Any, count: int = 1, *, steps: int = 5, **spec: Any) -> UUID:
    return submit(caller, count, models=MODELS, **{"model": "stepper", "steps": steps, **spec})


def worker(name: str = "w", *models: Any) -> Worker:
    return Worker(name, pool="both", models=list(models or [STEPPER]), device="cpu")


def burst(name: str = "w", *models: Any) -> None:
    worker(name, *models).burst(lambda _: None)


@contextmanager
def at_work(one_worker: Worker) -> Iterator[None]:
    """A burst beside the test, which ends when the worker drains or has no more to do."""
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(one_worker.burst, lambda _: None)
        try:
            yield
        finally:
            one_worker.drain()
            running.result(PATIENCE_S)


def await_that(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def frames_of(job: UUID) -> list[UUID]:
    return [r.id for r in ask("SELECT id FROM frames WHERE job_id = :job ORDER BY id", job=job)]


def together(ticks: list[Noted], frame: UUID) -> set[UUID]:
    """The frames that were in a tick with this one."""
    return {f for tick in ticks if frame in tick.frames for f in tick.frames} - {frame}


def pictures(job: UUID) -> list[bytes]:
    rows = ask(
        "SELECT i.pixel_sha256 FROM frames AS f JOIN images AS i ON i.id = f.image_id"
        " WHERE f.job_id = :job ORDER BY f.id",
        job=job,
    )
    return [r.pixel_sha256 for r in rows]


# ------------------------------------------------------------------------------------------ joining and leaving


def test_frames_of_other_steps_and_accounts_share_ticks_and_the_device_is_never_half_empty(
    house: pytest.MonkeyPatch,
) -> None:
    device = Device(house, tick_s=0.05)
    # given
    callers = [account("a"), account("b")]
    every = [asked(callers[k % 2], 2, steps=3 + k, guidance=float(k), seed=10 * k) for k in range(10)]

    # when
    burst()

    # then
    assert all(statuses(job) == ["done"] * 2 for job in every)
    owner = {f: (k % 2, k) for k, job in enumerate(every) for f in frames_of(job)}
    shared = [{owner[f] for f in t.frames} for t in device.ticks]
    assert any(len({account for account, _ in s}) == 2 and len({job for _, job in s}) >= 2 for s in shared)
    steps = sum(2 * (3 + k) for k in range(10))
    assert sum(len(t.frames) for t in device.ticks) == steps  # no step was made twice
    assert len(device.ticks) <= steps / 4 * 1.4


def test_what_the_device_took_is_shared_among_the_packs(device: Device) -> None:
    caller = account()
    for k in range(6):
        asked(caller, 2, steps=2 + k)

    burst()

    packs = ask("SELECT gpu_ms, frames FROM packs")
    assert len(packs) > 2
    assert sum(p.gpu_ms for p in packs) == pytest.approx(1000 * device.engines[0].seconds, abs=len(packs))


def test_a_pack_by_shape_holds_frames_of_all_settings_and_of_that_shape_alone(books: str) -> None:
    # given
    caller, other = account(), account("other")
    first = submit(caller, 1, steps=4, guidance=3.0)
    second = submit(other, 1, steps=9, sampler="euler")
    submit(caller, 1, steps=4, width=256)

    # when
    with transaction() as session:
        head = queue.find_head(session, models=["alpha"])
        assert head is not None
        pack = queue.take(session, head, worker="a", frames=4, by_shape=True)

    # then
    assert {f.job_id for f in pack.frames} == {first, second}
    assert pack.call_key == head.shape_key


def test_a_frame_whose_own_inputs_break_fails_alone(device: Device) -> None:
    caller = account()
    bad = asked(caller, prompt=BAD)
    good = asked(caller, 3)

    burst()

    assert (statuses(bad), statuses(good)) == (["failed"], ["done"] * 3)
    assert one("SELECT reason FROM frames WHERE job_id = :job", job=bad) == BAD
    assert one("SELECT count(*) FROM frames WHERE job_id = :job AND attempts > 0", job=good) == 0


# ------------------------------------------------------------------------------------------ who comes first


def test_an_urgent_frame_is_in_the_tick_after_its_claim(house: pytest.MonkeyPatch) -> None:
    # given a device full of bulk frames
    device = Device(house, tick_s=0.1)
    caller = account()
    bulk = asked(caller, 12, steps=20, priority=1)
    with at_work(worker()):
        await_that(lambda: len(device.ticks) > 3)

        # when
        urgent = asked(account("other"), steps=2, priority=9)
        committed = time.time()
        await_that(lambda: statuses(urgent) == ["done"])

    # then
    (frame,) = frames_of(urgent)
    claimed: datetime = one(
        "SELECT p.claimed_at FROM usage AS u JOIN packs AS p ON p.id = u.pack_id WHERE u.frame_id = :f",
        f=frame,
    )
    first = next(t.began for t in device.ticks if frame in t.frames)
    assert len([t for t in device.ticks if claimed.timestamp() < t.began < first]) <= 1
    assert first - committed <= 2 * device.tick_s + 0.05
    assert (
        len(next(t for t in device.ticks if frame in t.frames).frames) == 4
    )  # one of bulk is not picked, and waits
    assert "done" not in statuses(bulk)[4:]


def test_no_more_urgent_frames_are_taken_in_than_a_tick_holds(house: pytest.MonkeyPatch) -> None:
    device = Device(house, tick_s=0.05)
    caller = account()
    asked(caller, 4, steps=40, priority=1)
    with at_work(worker()):
        await_that(lambda: len(device.ticks) > 2)

        urgent = asked(caller, 12, steps=20, priority=9)
        await_that(lambda: statuses(urgent).count("claimed") == 4)
        then = len(device.ticks)
        await_that(lambda: len(device.ticks) > then + 5)

        assert statuses(urgent).count("claimed") == 4


def test_a_frame_held_up_too_long_is_given_back_and_goes_on_later(house: pytest.MonkeyPatch) -> None:
    # given bulk frames that made some steps
    let(house, parked_s=0.2)
    device = Device(house)
    caller = account()
    bulk = asked(caller, 4, steps=30, priority=1)
    with at_work(worker()):
        await_that(lambda: len(device.ticks) > 5)

        # when more urgent ones take the device
        urgent = asked(caller, 8, steps=40, priority=9)
        await_that(lambda: statuses(bulk) == ["queued"] * 4)

        # then they go on where they were, once it is free
        assert statuses(urgent).count("claimed") == 4
        await_that(lambda: statuses(bulk) == ["done"] * 4)
    assert sorted(device.engines[0].resumed) == frames_of(bulk)
    assert all(done > 5 for done in device.engines[0].resumed.values())
    assert one("SELECT count(*) FROM frames WHERE attempts > 0") == 0
    assert one("SELECT count(*) FROM usage") == 12


def test_a_job_made_urgent_in_flight_is_picked_from_then_on(house: pytest.MonkeyPatch) -> None:
    # given a frame that is not picked: an urgent one joined a device full of older ones
    device = Device(house, cap=2)
    caller = account()
    asked(caller, 1, steps=400, priority=5)
    last = asked(caller, 1, steps=400, priority=5)
    with at_work(worker()):
        await_that(lambda: len(device.ticks) > 2)
        asked(caller, 1, steps=400, priority=9)
        (frame,) = frames_of(last)
        await_that(lambda: frame not in device.ticks[-1].frames)

        # when
        with transaction() as session:
            jobs.reprioritise(session, caller.account_id, last, 9)

        # then
        await_that(lambda: frame in device.ticks[-1].frames)


def head(*, priority: int = 5, shape: str = "a", pixels: int = 512 * 512) -> queue.Head:
    account_id = frame_id = UUID(int=0)
    return queue.Head("stepper", priority, account_id, False, frame_id, False, "call", shape, pixels, pixels)


@pytest.mark.parametrize(
    ("flying", "wanted", "above"),
    [
        ({}, {5: 4, 9: 4}, -1),
        ({("a", 5): 3}, {1: 1, 5: 1, 9: 4}, -1),
        ({("a", 5): 4}, {1: 0, 5: 0, 9: 4}, 5),
        ({("a", 1): 4, ("a", 9): 3}, {1: 0, 5: 1, 9: 1}, 1),
        ({("a", 9): 4, ("a", 1): 4}, {5: 0, 9: 0}, 1),
        ({("b", 5): 4}, {5: 4}, 5),
        ({(shape, 5): 1 for shape in "bcde"}, {5: 0, 9: 4}, -1),
    ],
)
def test_there_is_room_beside_what_is_as_urgent(
    flying: dict[tuple[str, int], int], wanted: dict[int, int], above: int
) -> None:
    room = claims.Room(STEPPER, dict.fromkeys("abcde", 4), flying)

    assert {p: room.of(head(priority=p)) for p in wanted} == wanted
    assert room.above == above


def test_room_is_what_the_catalog_says_until_a_tick_took_some() -> None:
    room = claims.Room(STEPPER)

    assert [room.of(head(pixels=n)) for n in (512 * 512, 1024 * 1024, 4096 * 4096)] == [4, 4, 1]


def test_what_fills_up_a_full_engine_is_as_urgent_as_its_head(books: str) -> None:
    # given an urgent frame, and bulk that could share its forward
    urgent = submit(account(), 1, priority=9)
    submit(account("other"), 3, priority=1)

    # when
    with transaction() as session:
        found = queue.find_head(session, models=["alpha"], above=1)
        assert found is not None
        pack = queue.take(session, found, worker="a", frames=4, by_shape=True, above=8)

    # then
    assert [f.job_id for f in pack.frames] == [urgent]
    with transaction() as session:
        assert queue.find_head(session, models=["alpha"], above=1) is None


def test_a_worker_hears_of_cancellations_priorities_and_drains(books: str) -> None:
    # given
    caller = account()
    gone, kept = submit(caller, 1), submit(caller, 2)
    pack = must_claim("w")
    ask(
        "INSERT INTO workers (id, pool, models, device, state) VALUES ('w', 'both', '{alpha}', 'cpu', 'draining')"
    )
    with transaction() as session:
        jobs.cancel(session, caller.account_id, gone)
        jobs.reprioritise(session, caller.account_id, kept, 8)

    # when
    with transaction() as session:
        heard = queue.look(session, worker="w", packs=[pack.id])
        elsewhere = queue.look(session, worker="other", packs=[pack.id])

    # then
    assert heard.packs == {pack.id: frozenset(frames_of(gone))}
    assert heard.drain
    assert [heard.priorities[f] for f in frames_of(kept)] == [8, 8]
    assert elsewhere.packs == {}


# ------------------------------------------------------------------------------------------ who is blamed


def test_frames_that_shared_an_engine_are_not_blamed_also_in_a_pack_of_their_own(books: str) -> None:
    # given packs of one frame each, claimed for one engine
    caller = account()
    every = [submit(caller, steps=4 + k) for k in range(2)]
    packs = []
    for _ in every:
        with transaction() as session:
            head = queue.find_head(session, models=["alpha"])
            assert head is not None
            packs.append(queue.take(session, head, worker="a", frames=1, by_shape=True))

    # when one fails, and the worker is lost with the other
    fail(packs[0])
    expire(packs[1])
    with transaction() as session:
        queue.reclaim(session)

    # then both are suspects, to be claimed alone
    assert ask("SELECT attempts, suspect FROM frames") == [(0, True)] * 2
    with transaction() as session:
        head = queue.find_head(session, models=["alpha"])
        assert head is not None
        alone = queue.take(session, head, worker="a", frames=4, by_shape=True)
    assert (alone.alone, len(alone.frames)) == (True, 1)
    fail(alone)
    assert one("SELECT attempts FROM frames WHERE id = :f", f=alone.frames[0].id) == 1


def test_the_one_frame_that_breaks_the_engine_is_found_and_no_other_is_blamed(device: Device) -> None:
    caller = account()
    good = [asked(caller, steps=3 + k) for k in range(5)]
    bad = asked(caller, prompt=BREAKS)
    good.append(asked(caller, 3, steps=6))

    while one("SELECT count(*) FROM frames WHERE ended_at IS NULL"):
        burst()

    assert statuses(bad) == ["failed"]
    assert all(set(statuses(job)) == {"done"} for job in good)
    assert one("SELECT attempts FROM frames WHERE job_id = :job", job=bad) == 3
    assert one("SELECT count(*) FROM frames WHERE attempts > 0") == 1


def test_a_suspect_runs_alone_and_soon_in_a_stream_of_work(house: pytest.MonkeyPatch) -> None:
    # given a suspect behind nothing, and a device that is busy with more work than it ever gets done
    let(house, suspect_s=0.2)
    device = Device(house)
    caller = account()
    suspect = asked(caller, steps=5)
    fail(must_claim(models=["stepper"], frames=1))
    ask("UPDATE frames SET suspect = true, attempts = 0")
    ask("UPDATE jobs SET status = 'paused', runnable = false WHERE id = :job", job=suspect)
    stream = asked(caller, 60, steps=8)
    (frame,) = frames_of(suspect)
    with at_work(worker()):
        await_that(lambda: len(device.ticks) > 3)

        # when
        with transaction() as session:
            jobs.resume(session, caller.account_id, suspect)
        then = len(device.ticks)
        await_that(lambda: statuses(suspect) == ["done"])

    # then
    assert together(device.ticks, frame) == set()
    assert len([t for t in device.ticks[then:] if frame not in t.frames]) * device.tick_s < 3
    assert "queued" in statuses(stream)


def test_a_suspect_of_a_less_urgent_class_waits_for_its_turn(house: pytest.MonkeyPatch) -> None:
    let(house, suspect_s=0.05)
    device = Device(house)
    caller = account()
    suspect = asked(caller, steps=5, priority=1)
    fail(must_claim(models=["stepper"], frames=1))
    urgent = asked(caller, 20, steps=8, priority=9)

    burst()

    (frame,) = frames_of(suspect)
    alone = next(k for k, t in enumerate(device.ticks) if frame in t.frames)
    assert not any(set(frames_of(urgent)) & t.frames.keys() for t in device.ticks[alone:])
    assert all(len(t.frames) == 4 for t in device.ticks[:30])


# ------------------------------------------------------------------------------------------ cancel, lose, drain


def test_a_cancelled_frame_leaves_and_its_neighbours_are_as_they_would_be(house: pytest.MonkeyPatch) -> None:
    # given
    device = Device(house)
    caller = account()
    kept = asked(caller, 2, steps=40, seed=3)
    gone = asked(caller, 1, steps=200)
    with at_work(worker()):
        await_that(lambda: len(device.ticks) > 3)

        # when
        with transaction() as session:
            jobs.cancel(session, caller.account_id, gone)
        then = len(device.ticks)
        await_that(lambda: len(device.ticks[-1].frames) == 2)
        heard = len(device.ticks)
        await_that(lambda: statuses(kept) == ["done"] * 2)

    # then
    assert heard - then < 20  # most of them until the worker hears of it
    assert statuses(gone) == ["cancelled"]
    assert one("SELECT count(*) FROM usage") == 2
    assert pictures(kept) == [pixel_hash(picture(spec, seed)) for spec, seed in _asked_for(kept)]


def _asked_for(job: UUID) -> list[tuple[Spec, int]]:
    rows = ask("SELECT CAST(spec AS text) AS spec, seed FROM frames WHERE job_id = :job ORDER BY id", job=job)
    return [(Spec.from_text(r.spec), r.seed) for r in rows]


def test_a_frame_that_is_somebody_elses_by_now_is_dropped(house: pytest.MonkeyPatch) -> None:
    device = Device(house)
    caller = account()
    job = asked(caller, 2, steps=300)
    with at_work(worker()):
        await_that(lambda: len(device.ticks) > 2)

        ask("UPDATE packs SET lease_until = clock_timestamp() - interval '1 s'")
        with transaction() as session:
            assert queue.reclaim(session) == 1
        ask("UPDATE jobs SET status = 'paused', runnable = false WHERE id = :job", job=job)

        await_that(lambda: not device.engines[0].frames)
    assert statuses(job) == ["queued"] * 2


def test_draining_hands_frames_over_at_the_step_where_they_are(house: pytest.MonkeyPatch) -> None:
    # given frames of several packs in flight
    let(house, grace_s=600)
    device = Device(house)
    caller = account()
    every = [asked(caller, 1, steps=60 + k, seed=k) for k in range(4)]
    first = worker("first")
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(first.burst, lambda _: None)
        await_that(lambda: len(device.ticks) > 10)

        # when
        first.drain()
        started = time.monotonic()
        report = running.result(PATIENCE_S)

    # then it ends at once, and another goes on
    assert time.monotonic() - started < 2
    assert report.outcome == "drained"
    assert [statuses(job) for job in every] == [["queued"]] * 4
    made = {f: t.frames[f] + 1 for t in device.ticks for f in t.frames}
    burst("second")
    assert device.engines[1].resumed == made
    assert [statuses(job) for job in every] == [["done"]] * 4
    assert sum(len(t.frames) for t in device.ticks) == sum(60 + k for k in range(4))
    assert one("SELECT count(*) FROM frames WHERE suspect OR attempts > 0") == 0
    with RedisClient.from_url(settings().broker_url.get_secret_value()) as client:
        await_that(lambda: not client.keys("farm.saved.*"))


def test_a_worker_an_admin_drains_hears_of_it_soon(house: pytest.MonkeyPatch) -> None:
    let(house, grace_s=600)
    device = Device(house)
    job = asked(account(), 2, steps=1000)
    ask(
        "INSERT INTO workers (id, pool, models, device, state) VALUES ('w', 'both', '{stepper}', 'cpu', 'up')"
    )
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(worker().burst, lambda _: None)
        await_that(lambda: len(device.ticks) > 2)

        ask("UPDATE workers SET state = 'draining'")

        assert running.result(PATIENCE_S).outcome == "drained"
    assert statuses(job) == ["queued"] * 2


def test_frames_are_saved_every_few_seconds_and_go_on_from_there(house: pytest.MonkeyPatch) -> None:
    # given a worker that is lost without a word
    let(house, checkpoint_s=0.1)
    device = Device(house)
    job = asked(account(), 2, steps=80)
    frames = frames_of(job)
    with RedisClient.from_url(settings().broker_url.get_secret_value()) as client, at_work(worker("lost")):
        await_that(lambda: client.exists(*[key_of(f) for f in frames]) == 2)
        await_that(lambda: len(device.ticks) > 10)
        saved = {key_of(f): client.get(key_of(f)) for f in frames}
        assert all(0 < client.ttl(key) <= 3600 for key in saved)
        # given also what its last words took back
        client.mset({key: state for key, state in saved.items() if state})
    ask("UPDATE frames SET suspect = false")

    # when
    burst("other")

    # then
    assert set(device.engines[1].resumed) == set(frames)
    assert statuses(job) == ["done"] * 2


@pytest.mark.parametrize("broken", ["away", "flushed"])
def test_without_redis_frames_only_start_again(house: pytest.MonkeyPatch, broken: str) -> None:
    # given
    let(house, checkpoint_s=0.05, grace_s=0.3)
    if broken == "away":
        let(house, broker_url="redis://127.0.0.1:1/0")
    device = Device(house)
    job = asked(account(), 3, steps=100)
    one_worker = worker("first")
    with at_work(one_worker):
        await_that(lambda: len(device.ticks) > 5)
    assert set(statuses(job)) == {"queued"}
    if broken == "flushed":
        with RedisClient.from_url(settings().broker_url.get_secret_value()) as client:
            client.flushall()

    # when
    ask("UPDATE frames SET spec = spec || '{\"steps\": 5}'")
    burst("second")

    # then
    assert device.engines[1].resumed == {}
    assert statuses(job) == ["done"] * 3


def test_what_is_too_large_is_not_saved(house: pytest.MonkeyPatch) -> None:
    let(house, checkpoint_bytes=10, grace_s=0.3)
    device = Device(house)
    job = asked(account(), 1, steps=500)
    with at_work(worker("first")):
        await_that(lambda: len(device.ticks) > 5)

    assert statuses(job) == ["queued"]
    with RedisClient.from_url(settings().broker_url.get_secret_value()) as client:
        assert not client.keys("farm.saved.*")


# ------------------------------------------------------------------------------------------ several models


def test_a_loaded_model_is_preferred_inside_a_class_and_never_above_it(books: str) -> None:
    # given lanes of two models, of which beta's was served less
    submit(account(), 8, model="alpha")
    submit(account("other"), 4, model="beta")
    must_claim(models=["alpha"], frames=1)

    def head(warm: str | None) -> str:
        with transaction() as session:
            found = queue.find_head(session, models=["alpha", "beta"], warm=warm)
            assert found is not None
            return found.model

    # then
    assert (head(None), head("alpha"), head("beta")) == ("beta", "alpha", "beta")
    submit(account("third"), 1, model="beta", priority="urgent")
    assert head("alpha") == "beta"


def test_after_32_packs_in_a_row_a_loaded_model_is_preferred_no_more(house: pytest.MonkeyPatch) -> None:
    turns = claims.Turns()
    pack = replace(_pack(), model="alpha")

    for _ in range(32):
        assert turns.warm in (None, "alpha")
        turns.took(pack)

    assert turns.preferred is None
    turns.took(pack)  # it was its turn
    assert turns.preferred == "alpha"
    turns.took(replace(pack, model="beta"))
    assert turns.preferred == "beta"


def _pack() -> queue.ClaimedPack:
    asked(account())
    return must_claim(models=["stepper"], frames=1)


def test_models_of_a_pool_get_their_share_in_turns_without_being_mixed(house: pytest.MonkeyPatch) -> None:
    # given work for two models, and few packs in a row
    house.setattr(claims, "AHEAD", 3)
    house.setattr(claims.Turns, "ahead", 3)
    device = Device(house, tick_s=0.01)
    every = [
        asked(account("a"), 24, steps=6),
        asked(account("b"), 24, steps=6, model="other"),
        asked(account("c"), 24, steps=6, model="alpha"),
    ]
    house.setattr(engines, "open_engine", lambda model, device: FakeEngine(0.001))

    # when
    burst("w", STEPPER, OTHER, PIPE)

    # then
    assert [set(statuses(job)) for job in every] == [{"done"}] * 3
    served = [r.model for r in ask("SELECT model FROM packs ORDER BY id")]
    runs = [len(list(group)) for _, group in groupby(served)]
    assert len(runs) >= 5  # they took turns
    assert {e.model.name for e in device.engines} == {"stepper", "other"}
    assert not ask("SELECT 1 FROM packs WHERE closed_at IS NULL")


@pytest.mark.parametrize("urgent_model", ["other", "alpha"])
def test_what_is_more_urgent_of_another_model_comes_between_two_ticks(
    house: pytest.MonkeyPatch, urgent_model: str
) -> None:
    # given a device full of frames of one model
    device = Device(house)
    house.setattr(engines, "open_engine", lambda model, device: FakeEngine(0.001))
    bulk = asked(account(), 4, steps=300, priority=1)
    with at_work(worker("w", STEPPER, OTHER, PIPE)):
        await_that(lambda: len(device.ticks) > 3)

        # when
        urgent = asked(account("other"), 2, steps=5, priority=9, model=urgent_model)
        await_that(lambda: statuses(urgent) == ["done"] * 2)
        then = len(device.engines[0].ticks)

        # then those in flight went on where they were
        assert statuses(bulk) == ["claimed"] * 4
        await_that(lambda: len(device.engines[0].ticks) > then + 3)
        assert then < 250
    made = [t.frames[f] for t in device.engines[0].ticks for f in t.frames if f == frames_of(bulk)[0]]
    assert made == list(range(len(made)))


# ------------------------------------------------------------------------------------------ what is seen of it


def test_steps_and_pictures_of_frames_in_flight_are_seen_by_who_watches(house: pytest.MonkeyPatch) -> None:
    # given
    house.setattr(progress, "PREVIEW_EVERY_S", 0.05)
    house.setattr(steps, "PREVIEW_EVERY_S", 0.05)
    device = Device(house, tick_s=0.05)
    caller = account()
    job, unseen = asked(caller, 1, steps=600), asked(caller, 1, steps=300)
    with transaction() as session:
        key = accounts.issue_key(session, accounts.find(session, "acme"))[1]
        stranger = accounts.issue_key(session, accounts.create(session, "stranger"))[1]
    with TestClient(create_app()) as api, at_work(worker()):
        where = f"/v1/jobs/{ids.public('job', job)}/frames/0"
        headers = {"Authorization": f"Bearer {key}"}
        await_that(lambda: len(device.ticks) > 2)

        # when nobody asked before there is nothing to see
        assert api.get(f"{where}/preview", headers=headers).status_code == 404
        await_that(lambda: api.get(f"{where}/preview", headers=headers).status_code == 200)

        # then
        answer = api.get(f"{where}/preview", headers=headers)
        assert answer.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(answer.content)).size == (8, 8)
        before = api.get(where, headers=headers).json()["progress"]
        assert 0 < before < 1
        await_that(lambda: api.get(where, headers=headers).json()["progress"] > before)
        assert api.app.state.progress._previews.keys() == {(job.hex, 0)}
        assert api.get(f"{where}/preview", headers={"Authorization": f"Bearer {stranger}"}).status_code == 404
        assert statuses(unseen) == ["claimed"]
        assert (
            api.get(f"/v1/jobs/{ids.public('job', unseen)}/frames/1/preview", headers=headers).status_code
            == 404
        )


def test_a_claim_that_goes_wrong_is_no_fault_of_what_is_in_flight(house: pytest.MonkeyPatch) -> None:
    # given inputs that cannot be fetched, once, in a way that nobody thought of
    device = Device(house)
    caller = account()
    first = asked(caller, 2, steps=60)
    one_worker = worker()
    fetch, failing = one_worker._inputs.ask, [True]

    def ask_for(frame: queue.ClaimedFrame) -> Any:
        if frame.job_id != first and failing:
            failing.pop()
            raise ValueError("of the test")
        return fetch(frame)

    house.setattr(one_worker._inputs, "ask", ask_for)

    # when
    with at_work(one_worker):
        await_that(lambda: len(device.ticks) > 3)
        second = asked(caller, 2, steps=5, guidance=3.0)
        await_that(lambda: statuses(second) == ["done"] * 2)
        await_that(lambda: statuses(first) == ["done"] * 2)

    # then
    assert not failing
    assert one("SELECT count(*) FROM frames WHERE suspect OR attempts > 0") == 0
    assert one("SELECT count(*) FROM packs WHERE closed_at IS NULL") == 0
