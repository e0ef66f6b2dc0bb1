"""What prompts, samplers and graphs of others mean here, without a farm."""

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.api.dialects import emphasis, samplers
from farm.api.dialects.comfyui.errors import BadGraph
from farm.api.dialects.comfyui.graph import Walk
from farm.api.dialects.comfyui.nodes import every
from farm.catalog import catalog
from farm.errors import Invalid, NotFound
from farm.features import Given

STARTER = catalog()["starter"]
FLUX = catalog()["flux1-dev"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a red circle", [("a red circle", 1)]),
        ("a (red:1.4) circle", [("a ", 1), ("red", 1.4), (" circle", 1)]),
        ("((red)) [circle]", [("red", 1.21), (" ", 1), ("circle", 0.909)]),
        ("(a (b:1.2) c:0.5)", [("a ", 0.5), ("b", 0.6), (" c", 0.5)]),
        (r"a \(round\) thing", [("a (round) thing", 1)]),
        ("at 12:30 :)", [("at 12:30 :)", 1)]),
        ("(never closed", [("never closed", 1.1)]),
    ],
)
def test_weights_are_read_as_the_web_ui_reads_them(text: str, parts: list[tuple[str, float]]) -> None:
    assert [(t, pytest.approx(w, abs=0.001)) for t, w in parts] == emphasis.weights(text)


@given(st.text("ab :.()[]\\<>|0123456789,lora", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    for model in (STARTER, FLUX):
        for webui in (True, False):
            try:
                read = emphasis.read(text, model, field="prompt", webui=webui)
            except Invalid:
                continue
            assert read.weighted <= ("prompt_weights" in model.takes)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 8000,
        "(a" * 4000,
        ":" + "1" * 8000,
        "[" + "|" * 8000,
        "[" + ":" * 8000,
        ": " * 4000,
        "[:" + " " * 8000,
    ],
)
def test_no_text_takes_long_to_read(text: str) -> None:
    began = time.process_time()
    for webui in (True, False):
        with suppress(Invalid):
            emphasis.read(text, STARTER, field="prompt", webui=webui)

    assert time.process_time() - began < 1


def test_a_model_without_weights_keeps_brackets_and_refuses_numbers() -> None:
    kept = emphasis.read("a (smiling) man", FLUX, field="prompt", webui=False)

    assert (kept.text, kept.weighted) == ("a (smiling) man", False)
    with pytest.raises(Invalid, match="takes no weights"):
        emphasis.read("a (smiling:1.3) man", FLUX, field="prompt", webui=False)


def test_loras_leave_the_prompt() -> None:
    read = emphasis.read("a circle <lora:ink:0.8> <lora:wash>", STARTER, field="prompt", webui=True)

    assert (read.text, read.loras) == ("a circle", (("ink", 0.8), ("wash", 1.0)))


def test_every_sampler_has_a_name_everywhere_and_comes_back_by_it() -> None:
    for model in catalog().values():
        for sampler in model.samplers:
            (known,) = [k for k in samplers.TABLE if k.sampler == sampler]
            assert samplers.of_webui(known.webui[0], known.webui[1][0], model) == sampler
            assert samplers.of_comfy(known.comfy[0], known.comfy[1][0], model) == sampler
            if known.replicate:
                assert samplers.of_replicate(known.replicate, model) == sampler


def test_samplers_are_named_as_the_web_ui_changed_its_mind() -> None:
    assert samplers.of_webui("DPM++ 2M Karras", None, STARTER) == "dpm++2m-karras"
    assert samplers.of_webui("DPM++ 2M", None, STARTER) == "dpm++2m-karras"
    assert samplers.of_webui("DPM++ 2M", "Normal", STARTER) == "dpm++2m"
    assert samplers.of_webui(None, None, STARTER) is None
    with pytest.raises(Invalid, match="scheduler"):
        samplers.of_webui(None, "Beta", STARTER)
    with pytest.raises(Invalid, match="sampler_name"):
        samplers.of_webui("PLMS", None, STARTER)


# ------------------------------------------------------------------------------------------------ graphs


def graph(model: str, **sampler: Any) -> dict[str, Any]:
    return {
        "c": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": model}},
        "l": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 1}},
        "t": {"class_type": "CLIPTextEncode", "inputs": {"text": "a circle", "clip": ["c", 1]}},
        "g": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["t", 0], "guidance": 2.5}},
        "k": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["c", 0], "positive": ["g", 0], "negative": ["t", 0], "latent_image": ["l", 0],
                "seed": 1, "steps": 4, "cfg": 1, "sampler_name": "euler", "scheduler": "simple", "denoise": 1,
                **sampler,
            },
        },
        "d": {"class_type": "VAEDecode", "inputs": {"samples": ["k", 0], "vae": ["c", 2]}},
        "s": {"class_type": "SaveImage", "inputs": {"images": ["d", 0], "filename_prefix": "x"}},
    }  # fmt: skip


def nothing(name: str) -> tuple[str, Given]:
    raise NotFound(name)


def fields(asked: Any) -> Mapping[str, Any]:
    (wanted,) = Walk(asked, every(), nothing).plan().wanted
    return wanted.fields


def test_flux_is_guided_by_its_own_node() -> None:
    found = fields(graph("black-forest-labs/FLUX.1-dev"))

    assert (found["model"], found["guidance"], found["sampler"]) == ("flux1-dev", 2.5, "flow-euler")
    assert found["negative_prompt"] is None
    with pytest.raises(BadGraph) as wrong:
        fields(graph("flux1-dev", cfg=4))
    assert "FluxGuidance" in str(wrong.value.node_errors["k"])
    with pytest.raises(BadGraph) as other:
        fields(graph("starter", scheduler="normal"))
    assert "cfg" in str(other.value.node_errors["g"])


def test_as_many_steps_run_of_an_image_as_there() -> None:
    asked = graph(
        "starter", positive=["t", 0], cfg=4, scheduler="normal", denoise=0.75, latent_image=["v", 0]
    )
    asked["i"] = {"class_type": "LoadImage", "inputs": {"image": "x.png"}}
    asked["v"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["i", 0], "vae": ["c", 2]}}
    asked["k"]["inputs"]["steps"] = 20

    def upload(_: str) -> tuple[str, Given]:
        return "sha256:" + "0" * 64, Given("0" * 64, 67, 128)

    (wanted,) = Walk(asked, every(), upload).plan().wanted

    assert (wanted.fields["width"], wanted.fields["height"]) == (64, 128)
    assert int(wanted.fields["steps"] * wanted.fields["strength"] + 1e-9) == 20


def test_seeds_are_taken_as_far_as_there() -> None:
    asked = graph("starter", positive=["t", 0], cfg=4, scheduler="normal", seed=2**64 - 1)

    (wanted,) = Walk(asked, every(), nothing).plan().wanted

    assert wanted.fields["seed"] == 2**63 - 1
    asked["k"]["inputs"]["seed"] = 2**64
    assert "bigger than max" in str(refusal(asked).node_errors)


def refusal(asked: Any) -> Any:
    try:
        Walk(asked, every(), nothing).plan()
    except BadGraph as e:
        return e
    return None


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(sorted(every())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(
    st.dictionaries(
        st.sampled_from("cltgkds"),
        st.fixed_dictionaries({"class_type": st.sampled_from(sorted(every())), "inputs": JSON}),
    )
    | JSON
)
def test_whatever_a_graph_is_it_is_walked_or_refused(asked: Any) -> None:
    assert refusal(asked) is None or refusal(asked).error["message"]


@given(
    st.sampled_from(["c", "l", "t", "g", "k", "d", "s"]),
    st.text(max_size=8),
    st.lists(st.sampled_from(["c", "l", "t", "k", "d", "s", "x"]) | st.integers(-1, 3), max_size=3) | JSON,
)
def test_any_input_may_be_wrong(node: str, name: str, value: Any) -> None:
    asked = graph("starter")
    known = list(asked[node]["inputs"])
    asked[node]["inputs"][known[len(name) % len(known)]] = value
    assert refusal(asked) is None or refusal(asked).node_errors
