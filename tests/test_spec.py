"""Specs: what may be asked, and what frames must share to be packed."""

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.catalog import Method
from farm.errors import Fault
from farm.features import steps_run
from farm.spec import (
    MAX_PROMPT,
    MAX_SEED,
    Asked,
    Format,
    Spec,
    call_key,
    fingerprint,
    quantity,
    random_seed,
    resolve,
    rows,
    seeds,
    shape_key,
    work,
)
from tests.factories import CATALOG

ALPHA, FLUX = CATALOG["alpha"], CATALOG["flux"]


def spec(**asked: Any) -> Spec:
    resolved = resolve(Asked(**{"prompt": "a red circle", "model": "alpha", **asked}), CATALOG)
    assert isinstance(resolved, Spec), resolved
    return resolved


def faults(**asked: Any) -> list[Fault]:
    resolved = resolve(Asked(**{"prompt": "a red circle", "model": "alpha", **asked}), CATALOG, path="spec")
    assert not isinstance(resolved, Spec)
    return resolved


def test_what_is_left_out_the_catalog_decides() -> None:
    assert spec() == Spec("alpha", "a red circle", "", 512, 512, 4, 7.5, "dpm++2m", Format.PNG)


def test_what_is_asked_for_is_taken() -> None:
    asked = spec(
        negative_prompt="text", width=64, height=2048, steps=100, guidance=0, sampler="lcm", format="webp"
    )

    assert asked == Spec("alpha", "a red circle", "text", 64, 2048, 100, 0.0, "lcm", Format.WEBP)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"width": 56}, "spec.width"),
        ({"width": 2056}, "spec.width"),
        ({"height": 513}, "spec.height"),
        ({"height": 0}, "spec.height"),
        ({"height": -512}, "spec.height"),
        ({"steps": 0}, "spec.steps"),
        ({"steps": 101}, "spec.steps"),
        ({"guidance": -0.1}, "spec.guidance"),
        ({"guidance": 30.1}, "spec.guidance"),
        ({"sampler": "flow-euler"}, "spec.sampler"),
    ],
)
def test_beyond_the_models_limits_is_a_fault_of_that_field(asked: dict[str, Any], field: str) -> None:
    (fault,) = faults(**asked)

    assert fault.field == field
    assert fault.value == next(iter(asked.values()))
    assert fault.allowed.startswith("allowed are")


def test_every_fault_is_named_at_once() -> None:
    assert [f.field for f in faults(width=7, height=9, steps=0)] == [
        "spec.width",
        "spec.height",
        "spec.steps",
    ]


def test_an_unknown_model_is_told_the_known_ones() -> None:
    (fault,) = faults(model="gamma")

    assert (fault.field, fault.allowed) == ("spec.model", "allowed are alpha, beta, flat, flux")


def test_a_negative_prompt_is_refused_by_a_model_that_takes_none() -> None:
    assert [f.field for f in faults(model="flux", negative_prompt="x")] == ["spec.negative_prompt"]


@pytest.mark.parametrize("length", [0, MAX_PROMPT + 1])
def test_a_prompt_has_a_length(length: int) -> None:
    with pytest.raises(ValueError, match="prompt"):
        Asked(prompt="x" * length)


def test_a_spec_comes_back_from_json_as_it_was() -> None:
    asked = spec(guidance=3.3, format="jpeg")

    assert Spec.from_json(asked.to_json()) == asked


# ------------------------------------------------------------------------------------------------ keys


@pytest.mark.parametrize("change", [{"width": 520}, {"height": 520}])
def test_size_is_in_both_keys(change: dict[str, Any]) -> None:
    assert shape_key(spec(**change), ALPHA) != shape_key(spec(), ALPHA)
    assert call_key(spec(**change), ALPHA) != call_key(spec(), ALPHA)


@pytest.mark.parametrize("change", [{"steps": 5}, {"sampler": "euler"}, {"guidance": 1.0}])
def test_what_a_call_takes_once_is_in_the_call_key_only(change: dict[str, Any]) -> None:
    assert shape_key(spec(**change), ALPHA) == shape_key(spec(), ALPHA)
    assert call_key(spec(**change), ALPHA) != call_key(spec(), ALPHA)


@pytest.mark.parametrize(
    "change",
    [{"prompt": "another"}, {"negative_prompt": "text"}, {"guidance": 3.0}, {"format": "webp"}, {"seed": 7}],
)
def test_what_may_differ_from_frame_to_frame_is_in_no_key(change: dict[str, Any]) -> None:
    assert call_key(spec(**change), ALPHA) == call_key(spec(), ALPHA)


def test_the_revision_and_the_precision_of_a_model_are_in_the_keys() -> None:
    keys = {
        call_key(spec(), ALPHA.model_copy(update=change))
        for change in ({}, {"revision": "0" * 40}, {"dtype": "float32"}, {"name": "beta"})
    }

    assert len(keys) == 4


def test_width_and_height_are_not_mixed_up() -> None:
    assert shape_key(spec(width=64, height=128), ALPHA) != shape_key(spec(width=128, height=64), ALPHA)


@pytest.mark.parametrize(("guidance", "guided"), [(0.0, False), (1.0, False), (1.0001, True), (7.5, True)])
def test_guidance_above_one_takes_two_rows_and_a_key_of_its_own(guidance: float, guided: bool) -> None:
    asked = spec(guidance=guidance)

    assert asked.guided is guided
    assert rows(asked, ALPHA) == (2 if guided else 1)
    assert work(asked, ALPHA) == 512 * 512 * 4 * (2 if guided else 1)
    assert (call_key(asked, ALPHA) == call_key(spec(guidance=9.0), ALPHA)) is guided


def test_a_guidance_that_is_embedded_takes_one_row_and_is_in_the_key() -> None:
    low, high = spec(model="flux", guidance=3.5), spec(model="flux", guidance=4.0)

    assert rows(low, FLUX) == 1
    assert call_key(low, FLUX) != call_key(high, FLUX)
    assert call_key(low, FLUX) == call_key(spec(model="flux", guidance=3.5), FLUX)


@given(st.floats(0, 30), st.floats(0, 30))
def test_embedded_guidances_share_a_key_only_if_they_are_equal(one: float, other: float) -> None:
    same = call_key(spec(model="flux", guidance=one), FLUX) == call_key(
        spec(model="flux", guidance=other), FLUX
    )

    assert same == (one == other)


# ------------------------------------------------------------------------------------------------ fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue circle"},
        {"negative_prompt": "text"},
        {"width": 520},
        {"height": 520},
        {"steps": 5},
        {"guidance": 7.0},
        {"sampler": "euler"},
    ],
)
def test_whatever_decides_the_pixels_is_in_the_fingerprint(change: dict[str, Any]) -> None:
    assert fingerprint(spec(**change), ALPHA, 1) != fingerprint(spec(), ALPHA, 1)


def test_the_seed_the_revision_and_the_precision_are_in_the_fingerprint() -> None:
    prints = {
        fingerprint(spec(), ALPHA, 1),
        fingerprint(spec(), ALPHA, 2),
        fingerprint(spec(), ALPHA.model_copy(update={"revision": "0" * 40}), 1),
        fingerprint(spec(), ALPHA.model_copy(update={"dtype": "float32"}), 1),
        fingerprint(replace(spec(), model="beta"), CATALOG["beta"], 1),
    }

    assert len(prints) == 5
    assert {len(p) for p in prints} == {32}


def test_a_plain_spec_says_and_hashes_what_it_did_before_there_were_inputs() -> None:
    said = {
        "model": "alpha", "prompt": "a red circle", "negative_prompt": "", "width": 512, "height": 512, "steps": 4,
        "guidance": 7.5, "sampler": "dpm++2m", "format": "png",
    }  # fmt: skip
    hashed = {**said, "seed": 1, "revision": ALPHA.revision, "dtype": ALPHA.dtype}
    del hashed["format"]

    assert spec().to_json() == said
    assert (
        fingerprint(spec(), ALPHA, 1) == hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).digest()
    )
    assert call_key(spec(), ALPHA) == f"alpha@{ALPHA.revision[:12]}/{ALPHA.dtype} 512x512 4 dpm++2m guided"


FEATURES: list[dict[str, Any]] = [
    {"image": "sha256:" + "1" * 64, "strength": 0.5},
    {"image": "sha256:" + "1" * 64, "mask": "sha256:" + "2" * 64, "strength": 0.5},
    {"hires": {"width": 640, "height": 576, "steps": 4, "strength": 0.5}},
    {"upscale": {"factor": 1.5, "steps": 8, "strength": 0.25}},
    {"clip_skip": 2},
    {"prompt_weights": True},
    {"long_prompt": True},
    {"reproducible": "strict"},
]


def test_what_is_asked_for_beside_text_comes_back_from_json_and_shares_no_call() -> None:
    asked = [spec(), *(spec(**feature) for feature in FEATURES)]

    assert [Spec.from_json(json.loads(json.dumps(a.to_json()))) for a in asked] == asked
    assert len({call_key(a, ALPHA) for a in asked}) == len(asked)
    assert len({fingerprint(a, ALPHA, 1) for a in asked}) == len(asked)
    again = [resolve(Asked(**a.to_json()), CATALOG) for a in asked]
    assert again == asked


def test_images_may_differ_from_frame_to_frame_in_a_call_and_strengths_may_not() -> None:
    one, other = (spec(image="sha256:" + n * 64, strength=0.5) for n in "12")

    assert call_key(one, ALPHA) == call_key(other, ALPHA)
    assert fingerprint(one, ALPHA, 1) != fingerprint(other, ALPHA, 1)
    assert call_key(one, ALPHA) != call_key(spec(image=one.image, strength=0.75), ALPHA)


def test_the_steps_that_run_are_counted_over_all_passes() -> None:
    two = spec(steps=20, image="sha256:" + "1" * 64, strength=0.29, upscale={"factor": 1.5, "strength": 0.5})

    assert [(p.width, p.height, p.schedule, p.steps) for p in two.passes] == [
        (512, 512, 20, 5),
        (768, 768, 20, 10),
    ]
    assert quantity(two, Method.MPX_STEP) == 512 * 512 * 5 + 768 * 768 * 10
    assert work(two, ALPHA) == 2 * quantity(two, Method.MPX_STEP)
    assert two.largest_pixels == 768 * 768


@pytest.mark.parametrize(
    ("steps", "strength", "run"), [(100, 0.29, 29), (10, 0.7, 7), (10, 0.75, 7), (3, 0.3, 0)]
)
def test_steps_are_rounded_down_and_binary_fractions_forgiven(steps: int, strength: float, run: int) -> None:
    assert steps_run(steps, strength) == run


def test_a_quality_makes_another_file_and_so_another_fingerprint() -> None:
    assert fingerprint(spec(format="jpeg", quality=50), ALPHA, 1) != fingerprint(
        spec(format="jpeg"), ALPHA, 1
    )


def test_the_format_is_not_in_the_fingerprint() -> None:
    assert fingerprint(spec(format="webp"), ALPHA, 1) == fingerprint(spec(format="png"), ALPHA, 1)


def test_a_guidance_written_as_a_whole_number_is_the_same() -> None:
    assert fingerprint(spec(guidance=7), ALPHA, 1) == fingerprint(spec(guidance=7.0), ALPHA, 1)


# ------------------------------------------------------------------------------------------------ seeds


@given(st.integers(0, MAX_SEED), st.integers(1, 50))
def test_seeds_count_up_and_go_round_the_end(first: int, count: int) -> None:
    drawn = seeds(first, count)

    assert len(drawn) == count
    assert all(0 <= seed <= MAX_SEED for seed in drawn)
    assert all((b - a) % 2**63 == 1 for a, b in pairwise(drawn))
    assert drawn[0] == first


def test_drawn_seeds_are_in_range_and_differ() -> None:
    drawn = [random_seed() for _ in range(1000)]

    assert len(set(drawn)) == 1000
    assert all(0 <= seed <= MAX_SEED for seed in drawn)
    assert 2**51 < max(drawn) < 2**53  # JavaScript reads them exactly
