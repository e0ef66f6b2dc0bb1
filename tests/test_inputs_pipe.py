"""Frames with inputs, run to completion: packed they equal the stock pipelines alone."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import ControlNetModel
from PIL import Image

from farm.catalog import ControlNet, Lora
from farm.errors import RenderFailed
from farm.features import Control, Hires, Upscale
from farm.spec import call_key
from tests.starting import lora_use, picture, started, stock, tiny_lora, tiny_net, wide_sd3
from tests.tiny import good, levels_apart, open_tiny, render, tiny_ask, tiny_engine, tiny_model
from workers.engine import Ask, Inputs
from workers.engine.featured import second_start
from workers.engine.pipe import PipeEngine
from workers.engine.weights import lora_file
from workers.gpu import limit_threads

STOCK = {
    "sd": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "sdxl": (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    ),
    "sd3": ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "flux1": ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    limit_threads()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("family", STOCK)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_frames_from_images_equal_the_stock_pipeline_alone(
    family: str, masked: bool, strength: float
) -> None:
    engine = wide_sd3() if family == "sd3" and masked else tiny_engine(family)
    guidance = (1.5, 9.0, 4.0) if "guidance" in engine.model.free else (4.0, 4.0, 4.0)
    asks = [
        started(engine.model, seed, masked=masked, strength=strength, guidance=g)
        for seed, g in enumerate(guidance)
    ]
    expected = [stock(engine.pipe, STOCK[family][2 if masked else 1], ask) for ask in asks]

    images = [good(i) for i in render(engine, asks)]

    assert [levels_apart(i, e) <= 1 for i, e in zip(images, expected, strict=True)] == [True] * 3
    assert levels_apart(images[0], images[1]) > 10


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 29])
def test_just_the_steps_that_are_billed_are_run(steps: int) -> None:
    for family in ("sd", "sd3"):
        engine = tiny_engine(family)
        for strength in (0.1, 0.29, 0.34, 0.5, 0.75, 0.99, 1.0):
            ask = started(engine.model, steps=steps, strength=strength)
            (run,) = ask.spec.passes
            if not run.steps:
                continue
            seen: list[tuple[int, int]] = []
            engine.render([ask], on_step=lambda done, total, seen=seen: seen.append((done, total)))
            assert seen == [(k + 1, run.steps) for k in range(run.steps)], (family, strength)


@pytest.mark.parametrize("family", STOCK)
def test_a_second_pass_equals_two_stock_calls(family: str) -> None:
    engine = tiny_engine(family)
    model = engine.model
    text, image, _ = STOCK[family]
    hires = replace(
        tiny_ask(model, "a square", seed=5), spec=replace(
            tiny_ask(model, "a square").spec, hires=Hires(width=48, height=64, steps=6, strength=0.5)
        )
    )  # fmt: skip
    other = replace(hires, seed=6)
    first = stock(engine.pipe, text, hires)
    wanted = hires.spec.passes[1]
    again = replace(
        hires, spec=replace(hires.spec, width=48, height=64, steps=6, strength=0.5, hires=None),
        inputs=Inputs(image=second_start(first, wanted)),
    )  # fmt: skip
    expected = stock(engine.pipe, image, again)
    seen: list[tuple[int, int]] = []

    images = engine.render([hires, other], on_step=lambda done, total: seen.append((done, total)))

    assert levels_apart(good(images[0]), expected) <= 1
    assert good(images[1]).shape == (64, 48, 3)
    assert seen == [(k + 1, 7) for k in range(7)]


def test_an_upscaled_frame_comes_out_larger() -> None:
    engine = tiny_engine("sd")
    ask = tiny_ask(engine.model, upscale=Upscale(factor=2, steps=4, strength=0.5))

    [image] = render(engine, [ask])

    assert good(image).shape == (64, 64, 3)


# ------------------------------------------------------------------------------------------------ control nets


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def netted(request: pytest.FixtureRequest, folder: Path) -> tuple[PipeEngine, dict[str, Any]]:
    """An engine with two control nets, and these."""
    family = request.param
    model = tiny_model(folder / f"netted-{family}", family)
    engine = open_tiny(model)
    nets = {n: tiny_net(engine.pipe, folder / f"{family}-{n}", k) for k, n in enumerate(("lines", "depth"))}
    entries = {n: ControlNet(source=f"dir:{folder / f'{family}-{n}'}", kind="canny") for n in nets}
    engine.model = engine.featured._modes.model = model.model_copy(update={"controls": entries})
    return engine, nets


@pytest.mark.parametrize("names", [("lines",), ("lines", "depth")])
@pytest.mark.parametrize("kind", ["", "Img2Img", "Inpaint"])
def test_frames_that_follow_control_images_equal_the_stock_pipeline(
    netted: tuple[PipeEngine, dict[str, Any]], names: tuple[str, ...], kind: str
) -> None:
    engine, nets = netted
    controls = tuple(
        Control(net=n, image=f"sha256:{9:064}", scale=1.0 - 0.3 * k, start=0.25 * k, end=0.9)
        for k, n in enumerate(names)
    )
    asks = []
    for seed in (1, 2):
        ask = started(engine.model, seed, masked=kind == "Inpaint", control=controls)
        if not kind:
            ask = replace(ask, spec=replace(ask.spec, image=None, strength=None))
        images = tuple(picture(50 + seed + k) for k in range(len(names)))
        asks.append(
            replace(
                ask, inputs=replace(ask.inputs, controls=images, image=ask.inputs.image if kind else None)
            )
        )
    class_name = engine.model.pipeline.replace("Pipeline", f"ControlNet{kind}Pipeline")
    one = len(names) == 1
    expected = []
    for ask in asks:
        shown = [Image.fromarray(c) for c in ask.inputs.controls]
        expected.append(
            stock(
                engine.pipe, class_name, ask,
                parts={"controlnet": nets[names[0]] if one else [nets[n] for n in names]},
                controlnet_conditioning_scale=controls[0].scale if one else [c.scale for c in controls],
                control_guidance_start=controls[0].start if one else [c.start for c in controls],
                control_guidance_end=0.9 if one else [0.9, 0.9],
                **({"control_image": shown[0] if one else shown, "image": Image.fromarray(ask.inputs.image)}
                   if ask.inputs.image is not None else {"image": shown[0] if one else shown}),
            )
        )  # fmt: skip

    images = [good(i) for i in render(engine, asks)]

    assert [levels_apart(i, e) <= 1 for i, e in zip(images, expected, strict=True)] == [True, True]
    plain = replace(
        asks[0], spec=replace(asks[0].spec, control=()), inputs=replace(asks[0].inputs, controls=())
    )
    assert levels_apart(good(render(engine, [plain])[0]), images[0]) > 2


# ------------------------------------------------------------------------------------------------ LoRAs


@pytest.mark.parametrize("family", STOCK)
def test_a_lora_acts_where_it_is_asked_for_and_nowhere_else(family: str, folder: Path) -> None:
    engine = open_tiny(tiny_model(folder / f"lora-{family}", family))
    entries = {
        n: tiny_lora(engine.pipe, folder / f"loras-{family}", n, k) for k, n in enumerate(("ink", "oil"))
    }
    model = engine.model.model_copy(update={"loras": entries})
    engine.model = model
    plain = tiny_ask(model, "a", seed=3)
    uses = (lora_use("ink", entries["ink"], 0.8), lora_use("oil", entries["oil"], -0.5))

    def with_(*used: Any) -> Ask:
        files = tuple(lora_file(model, u) for u in used)
        return replace(plain, spec=replace(plain.spec, loras=used), inputs=Inputs(loras=files))

    before = good(render(engine, [plain])[0])
    images = [good(render(engine, [with_(*u)])[0]) for u in ((uses[0],), uses, (uses[0],))]
    after = good(render(engine, [plain])[0])

    reference = open_tiny(engine.model)
    for k, use in enumerate(uses):
        reference.pipe.load_lora_weights(
            str(folder / f"loras-{family}"), weight_name=f"{use.name}.safetensors", adapter_name=f"r{k}"
        )
    for image, active in ((images[0], [0]), (images[1], [0, 1])):
        reference.pipe.set_adapters([f"r{k}" for k in active], [uses[k].scale for k in active])
        assert levels_apart(image, stock(reference.pipe, STOCK[family][0], plain)) <= 1
    assert np.array_equal(before, after)
    assert np.array_equal(images[0], images[2])
    assert levels_apart(before, images[0]) > 2


def test_loras_in_another_set_or_scale_share_no_call() -> None:
    model = tiny_engine("sd").model
    entry = Lora(source="dir:/x", file="a.safetensors", sha256="0" * 64)
    keys = {
        call_key(replace(tiny_ask(model).spec, loras=loras), model)
        for loras in ((), (lora_use("a", entry),), (lora_use("a", entry, 0.5),))
    }

    assert len(keys) == 3


def test_a_lora_that_does_not_fit_is_refused_naming_its_file(folder: Path) -> None:
    small, large = (
        open_tiny(tiny_model(folder / "fit-sd", "sd")),
        open_tiny(tiny_model(folder / "fit-xl", "sdxl")),
    )
    entry = tiny_lora(large.pipe, folder / "misfit", "big", 1)
    model = small.model.model_copy(update={"loras": {"big": entry}})
    use = lora_use("big", entry)
    ask = tiny_ask(model, loras=(use,))

    with pytest.raises(RenderFailed, match=r"misfit/big\.safetensors does not fit.*size mismatch") as refusal:
        small.render([replace(ask, inputs=Inputs(loras=(lora_file(model, use),)))], on_step=lambda *_: None)

    assert len(str(refusal.value)) < 600  # the first tensor is enough
    good(render(small, [tiny_ask(model)])[0])  # and it goes on


def test_a_pickle_a_wrong_file_and_a_missing_one_are_refused_by_name(folder: Path) -> None:
    model = tiny_engine("sd").model
    made = folder / "wrong"
    made.mkdir()
    (made / "p.safetensors").write_bytes(pickle.dumps({"a": 1}))
    (made / "w.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for file, why in (("p", "pickled"), ("w", "is not the LoRA"), ("gone", "there is no gone.safetensors")):
        entry = Lora(source=f"dir:{made}", file=f"{file}.safetensors", sha256="0" * 64)
        changed = model.model_copy(update={"loras": {"x": entry}})
        with pytest.raises(RenderFailed, match=why) as refusal:
            lora_file(changed, lora_use("x", entry))
        assert str(made) in str(refusal.value)


def test_a_pickled_or_foreign_control_net_is_refused_by_name(folder: Path) -> None:
    engine = open_tiny(tiny_model(folder / "nets-sd", "sd"))
    pickled = folder / "pickled-net"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({}))
    tiny_net(tiny_engine("sdxl").pipe, folder / "foreign-net", 1)
    halved = ControlNetModel.from_unet(engine.pipe.unet, conditioning_embedding_out_channels=(8, 8, 8))
    halved.save_pretrained(folder / "halved-net", safe_serialization=True)
    for name, why in (
        ("pickled-net", r"diffusion_pytorch_model\.bin is pickled"),
        ("foreign-net", "another family"),
        ("halved-net", r"halved-net is of another family: its image is 4 times"),
    ):
        entry = ControlNet(source=f"dir:{folder / name}")
        engine.featured._modes.model = engine.model.model_copy(update={"controls": {"n": entry}})
        ask = tiny_ask(engine.model, control=(Control(net="n", image=f"sha256:{1:064}"),))
        with pytest.raises(RenderFailed, match=why):
            engine.render([replace(ask, inputs=Inputs(controls=(picture(1),)))], on_step=lambda *_: None)


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_clip_skip_takes_the_prompt_from_an_earlier_layer(family: str) -> None:
    """As the stock pipelines mean it; with transformers 5 SD's own fails, so that it gets the layer from here."""
    engine = tiny_engine(family)
    pipe = engine.pipe
    asks = [
        tiny_ask(engine.model, "a", seed=s, clip_skip=1, negative_prompt=n)
        for s, n in ((1, "b"), (2, "ugly"))
    ]

    images = [good(i) for i in render(engine, asks)]

    for ask, image in zip(asks, images, strict=True):
        given: dict[str, Any] = {"clip_skip": 1, "negative_prompt": ask.spec.negative_prompt}
        if family == "sd":
            ids = pipe.tokenizer("a", padding="max_length", max_length=77, return_tensors="pt").input_ids
            hidden = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
            given = {"prompt": None, "prompt_embeds": pipe.text_encoder.final_layer_norm(hidden).detach(),
                     "negative_prompt": ask.spec.negative_prompt}  # fmt: skip
        assert levels_apart(image, stock(pipe, STOCK[family][0], ask, **given)) <= 1
    plain = good(render(engine, [replace(asks[0], spec=replace(asks[0].spec, clip_skip=None))])[0])
    assert levels_apart(plain, images[0]) > 0


@pytest.mark.parametrize(("family", "most"), [("sd", 3), ("sdxl", 2)])
def test_more_layers_than_there_are_cannot_be_skipped(family: str, most: int) -> None:
    engine = tiny_engine(family)
    good(render(engine, [tiny_ask(engine.model, clip_skip=most)])[0])

    [failed] = render(engine, [tiny_ask(engine.model, clip_skip=most + 1)])

    assert isinstance(failed, RenderFailed)
    assert f"has {most} layers to leave out" in str(failed)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_prompt_without_weights_is_the_same_read_either_way(family: str) -> None:
    engine = tiny_engine(family)
    plain = [
        tiny_ask(engine.model, "a red circle", seed=s, negative_prompt=n) for s, n in ((1, ""), (2, "ugly"))
    ]
    expected = [good(i) for i in render(engine, plain)]

    for feature in ("prompt_weights", "long_prompt"):
        read = [replace(a, spec=replace(a.spec, **{feature: True})) for a in plain]
        for image, e in zip(render(engine, read), expected, strict=True):
            assert levels_apart(good(image), e) <= 1


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_weights_and_what_is_beyond_77_tokens_change_the_image(family: str) -> None:
    engine = tiny_engine(family)
    words = "abcd " * 40

    def image(prompt: str, **changes: Any) -> Any:
        return good(render(engine, [tiny_ask(engine.model, prompt, seed=1, **changes)])[0])

    weighted = image("a (red)1.9 circle", prompt_weights=True)
    assert levels_apart(weighted, image("a red circle")) > 0
    assert levels_apart(image(words + "x", long_prompt=True), image(words + "y", long_prompt=True)) > 0
    assert levels_apart(image(words + "x"), image(words + "y")) == 0  # cut, as the stock pipeline does


def test_prompts_of_different_length_render_in_one_pack_as_alone() -> None:
    engine = tiny_engine("sd")
    asks = [
        tiny_ask(engine.model, p, seed=s, long_prompt=True, negative_prompt=n)
        for s, (p, n) in enumerate((("a", ""), ("abcd " * 40, "x"), ("b", "abcd " * 40), ("abcd " * 80, "")))
    ]

    together = [good(i) for i in render(engine, asks)]

    for ask, image in zip(asks, together, strict=True):
        assert levels_apart(good(render(engine, [ask])[0]), image) <= 1


def test_a_prompt_whose_weights_cannot_be_read_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.engine.words import Words

    engine, real = tiny_engine("sd"), Words.pair
    asks = [tiny_ask(engine.model, p, prompt_weights=True) for p in ("a", "broken", "b")]

    def pair(self: Words, spec: Any) -> Any:
        if spec.prompt == "broken":
            raise RenderFailed("the prompt's weights cannot be read: )(")
        return real(self, spec)

    monkeypatch.setattr(Words, "pair", pair)
    results = render(engine, asks)

    assert [isinstance(r, RenderFailed) for r in results] == [False, True, False]


def test_strict_frames_are_bit_equal_whatever_they_are_packed_with() -> None:
    engine = tiny_engine("sd")
    asks = [tiny_ask(engine.model, "a" * k, seed=k, reproducible="strict") for k in range(1, 5)]

    together = [good(i) for i in render(engine, asks)]

    for ask, image in zip(asks, together, strict=True):
        assert np.array_equal(good(render(engine, [ask])[0]), image)
