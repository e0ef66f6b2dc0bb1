"""Who shares the next forward: priority, arrival, ageing, caps, and turns between shapes."""

from dataclasses import dataclass
from typing import Any

import pytest

from farm.catalog import BUILTIN, Model, read
from workers.engine.step.pick import GROW_AFTER, Caps, Picker, bucket

SMALL = 64 * 64


@dataclass
class Frame:
    name: str
    shape: str = "64"
    rows: int = 2
    pixels: int = SMALL
    priority: int = 5
    arrival: int = 0
    waiting_since: float = 0.0
    strict: bool = False


def _model(**pack: Any) -> Model:
    entry = read(BUILTIN)["starter"].model_dump()
    limits = {"frames": 8, "pixels": 8 * SMALL, "rows": 8, **pack}
    return Model(**{**entry, "engine": "step", "packs_by": "shape", "pack": limits})


def _picker(ageing_s: float = 60, **pack: Any) -> Picker:
    return Picker(Caps(_model(**pack)), ageing_s)


def _names(frames: list[Frame]) -> list[str]:
    return [f.name for f in frames]


def test_the_most_urgent_come_first_then_the_oldest_until_the_rows_are_full() -> None:
    frames = [
        Frame(n, priority=p, arrival=k)
        for k, (n, p) in enumerate(zip("abcdef", (5, 5, 1, 5, 9, 5), strict=True))
    ]

    picked = _picker().pick(frames, 0)

    assert _names(picked) == ["e", "a", "b", "d"]


def test_a_frame_of_one_row_takes_the_last_row() -> None:
    frames = [Frame("a"), Frame("b", arrival=1), Frame("c", arrival=2), Frame("d", rows=1, arrival=3)]

    picked = _picker(rows=5).pick(frames, 0)

    assert _names(picked) == ["a", "b", "d"]


def test_a_frame_larger_than_the_cap_runs_alone() -> None:
    picked = _picker(pixels=SMALL).pick(
        [Frame("big", pixels=16 * SMALL), Frame("other", pixels=16 * SMALL)], 0
    )

    assert _names(picked) == ["big"]


def test_while_an_urgent_frame_runs_a_forward_stays_within_the_knee() -> None:
    frames = [Frame(n, arrival=k) for k, n in enumerate("abcd")]
    picker = _picker(knee=4 * SMALL)

    assert len(picker.pick(frames, 0)) == 4
    assert _names(picker.pick([*frames, Frame("urgent", priority=9, arrival=9)], 0)) == ["urgent", "a"]


def test_shapes_of_one_class_take_turns_by_the_work_they_were_served() -> None:
    small = [Frame(f"s{k}", arrival=k) for k in range(4)]  # 8 rows of 1
    large = [Frame(f"l{k}", shape="128", pixels=4 * SMALL, arrival=9 + k) for k in range(4)]  # 4 rows of 4
    picker, turns = _picker(), []

    for tick in range(30):
        picked = picker.pick([*small, *large], tick)
        picker.charge(picked, tick)
        turns.append(picked[0].shape)

    work = {"64": turns.count("64") * 8, "128": turns.count("128") * 4 * 4}
    assert work["64"] == pytest.approx(work["128"], abs=16)


def test_a_shape_that_comes_later_has_no_credit_for_the_time_before() -> None:
    picker = _picker()
    old, new = Frame("old"), Frame("new", shape="96", arrival=1)
    for tick in range(20):
        picker.charge(picker.pick([old], tick), tick)

    turns = []
    for tick in range(20, 30):
        picked = picker.pick([old, new], tick)
        picker.charge(picked, tick)
        turns.append(picked[0].name)

    assert 4 <= turns.count("new") <= 6


def test_a_more_urgent_shape_does_not_wait_for_its_turn() -> None:
    picker = _picker()
    bulk, urgent = Frame("bulk"), Frame("urgent", shape="96", priority=9, arrival=1)
    picker.charge([urgent] * 4, 0)

    assert _names(picker.pick([bulk, urgent], 1)) == ["urgent"]


def test_a_frame_passed_over_for_the_ageing_time_gets_a_tick_but_not_every_tick() -> None:
    picker = _picker(ageing_s=10)
    urgent, bulk = Frame("urgent", priority=9), Frame("bulk", shape="96", priority=1, arrival=1)

    turns = []
    for tick in range(30):
        picked = picker.pick([urgent, bulk], tick)
        picker.charge(picked, tick)
        turns.append(picked[0].name)

    assert turns.index("bulk") == 10
    assert turns.count("bulk") == 2
    assert "bulk bulk" not in " ".join(turns)


def test_a_cap_is_halved_where_memory_ran_out_and_grows_back_slowly() -> None:
    caps = Caps(_model())
    rows = {"urgent": False, "strict": False}

    caps.ran_out(SMALL, rows=8)
    assert caps.rows(SMALL, 2, **rows) == 4
    assert caps.rows(2 * SMALL, 2, **rows) == 8  # another size is not touched
    caps.ran_out(SMALL, rows=4)
    caps.ran_out(SMALL, rows=2)
    assert caps.rows(SMALL, 2, **rows) == 2  # never less than a frame has

    for _ in range(GROW_AFTER * 4):
        caps.fitted(SMALL, rows=caps.rows(SMALL, 2, **rows))
    assert caps.rows(SMALL, 2, **rows) == 8


def test_rows_are_padded_to_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 3, 9, 17, 32, 33)] == [2, 2, 4, 12, 24, 32, 64]


def test_strict_frames_have_one_row_count_whatever_was_learned() -> None:
    caps = Caps(_model(rows=32, pixels=32 * SMALL))
    before = caps.strict_rows(SMALL)

    caps.ran_out(SMALL, rows=8)

    assert caps.strict_rows(SMALL) == before == 8
