"""The starter model draws what it is asked for: pixels are read back, over several seeds."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from diffusers import (  # noqa: E402
    EulerAncestralDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from workers import starter  # noqa: E402
from workers.starter.measure import (  # noqa: E402
    CHECKS,
    asked_scenes,
    load_pipeline,
    one_thing,
    paint,
    shares,
    words_for,
)
from workers.starter.pictures import Scene, Thing, caption, draw, imagine  # noqa: E402
from workers.starter.reading import read, size_of  # noqa: E402

LEAST = {"background": 0.85, "colour": 0.85, "shape": 0.75, "place": 0.75}
LEAST_OF_WORD = {"shape star": 0.5}  # a small one is at the autoencoder's limit (MODEL_CARD.md)
ASK = "a red circle on a blue background"


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe(two_threads: None) -> StableDiffusionPipeline:
    return load_pipeline()


def share(found: list[bool]) -> float:
    return sum(found) / len(found)


def short_of(shown: dict[str, float]) -> dict[str, float]:
    return {word: value for word, value in shown.items() if value < least(word)}


def least(word: str) -> float:
    return LEAST_OF_WORD.get(word, LEAST[word.split(maxsplit=1)[0]])


# The reader first: a test that believes whatever it is shown is worthless.


def test_the_reader_reads_every_drawn_picture_right() -> None:
    scenes = asked_scenes(504)
    shown = shares([draw(scene) for scene in scenes], scenes)
    assert {word for word, value in shown.items() if value < 1} == set()
    assert len(shown) == len(CHECKS) + 8 + 8 + 7 + 9


def test_the_figures_fall_when_one_word_goes_wrong() -> None:
    scenes = asked_scenes(112)
    drawn = [
        one_thing("heart", t.colour, scene.background, place=t.place or "", size=t.size or "")
        if t.shape == "star"
        else scene
        for scene in scenes
        for t in scene.things
    ]
    assert set(short_of(shares([draw(scene) for scene in drawn], scenes))) == {"shape star"}


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (128, 128)])
def test_the_reader_agrees_with_made_up_scenes(size: tuple[int, int]) -> None:
    plain = [scene for seed in range(200) if (scene := imagine(seed, *size)).style == "plain"]
    for scene in plain:
        seen = read(draw(scene, *size))
        assert seen.background == scene.background
        assert sorted(t.colour + t.shape for t in seen.things) == sorted(
            t.colour + t.shape for t in scene.things
        )
        if len(scene.things) == 1 and scene.things[0].size:
            assert size_of(seen.things[0].radius) == scene.things[0].size


@pytest.mark.parametrize(
    ("check", "drawn"),
    [
        ("background", one_thing("circle", "red", "green")),
        ("colour", one_thing("circle", "orange", "blue")),
        ("shape", one_thing("heart", "red", "blue")),
        ("place", one_thing("circle", "red", "blue", place="left")),
        ("shape", Scene("blue")),
        ("colour", Scene("red")),
    ],
)
def test_the_reader_refuses_a_wrong_picture(check: str, drawn: Scene) -> None:
    asked = one_thing("circle", "red", "blue")
    assert not CHECKS[check](read(draw(drawn)), asked)


def test_the_reader_finds_nothing_in_noise_that_fits() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    asked = one_thing("circle", "red", "blue")
    right = [all(check(read(picture), asked) for check in CHECKS.values()) for picture in noise]
    assert not any(right)


def test_pictures_and_captions_come_from_their_seed_alone() -> None:
    assert imagine(5) == imagine(5)
    assert caption(imagine(5), 9) == caption(imagine(5), 9)
    assert np.array_equal(draw(imagine(5)), draw(imagine(5)))
    assert len({caption(imagine(seed), seed) for seed in range(100)}) > 90


def test_an_object_never_has_its_backgrounds_colour() -> None:
    for scene in map(imagine, range(2000)):
        assert not {t.colour for t in scene.things} & {scene.background, scene.second_background}


# Then the model.


def folder_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def test_the_folders_are_small() -> None:
    assert folder_mb(starter.path()) <= 12
    assert folder_mb(starter.clip_path()) <= 6


def test_pixels_show_what_the_prompt_asks_for(pipe: StableDiffusionPipeline) -> None:
    scenes = asked_scenes(126)

    pictures = paint(pipe, [words_for(scene) for scene in scenes], list(range(126)), num_inference_steps=12)

    assert short_of(shares(pictures, scenes)) == {}


def test_pixels_show_the_first_prompt_everybody_tries(pipe: StableDiffusionPipeline) -> None:
    for background in ("blue", "white"):
        seens = [
            read(p) for p in paint(pipe, [f"a red circle on a {background} background"] * 16, list(range(16)))
        ]
        right = [
            s.background == background and [(t.colour, t.shape) for t in s.things] == [("red", "circle")]
            for s in seens
        ]
        assert share(right) >= 0.9


def test_pictures_of_other_prompts_do_not_pass(pipe: StableDiffusionPipeline) -> None:
    scenes = asked_scenes(40)
    others = [words_for(scene) for scene in scenes[20:]]

    pictures = paint(pipe, others, list(range(20)), num_inference_steps=8)

    shown = shares(pictures, scenes[:20])
    assert {name for name in CHECKS if shown[name] < LEAST[name]} == set(CHECKS)


def test_two_things_stand_as_told(pipe: StableDiffusionPipeline) -> None:
    asked = {
        "a red circle above a yellow square on a blue background": "red above yellow",
        "a green cross below an orange triangle on a white background": "orange above green",
        "a white ring left of a purple heart on a black background": "white left of purple",
    }
    prompts = [prompt for prompt in asked for _ in range(6)]
    seens = [read(picture) for picture in paint(pipe, prompts, list(range(len(prompts))))]
    right = [seen.relation() == asked[prompt] for seen, prompt in zip(seens, prompts, strict=True)]
    assert share(right) >= 0.75


@pytest.mark.parametrize(("width", "height"), [(96, 96), (128, 128), (96, 64), (64, 96)])
def test_other_sizes_hold_together(pipe: StableDiffusionPipeline, width: int, height: int) -> None:
    pictures = paint(pipe, [ASK] * 6, list(range(6)), width=width, height=height)
    assert pictures[0].shape == (height, width, 3)
    seens = [read(picture) for picture in pictures]
    right = [seen.background == "blue" and [t.colour for t in seen.things] == ["red"] for seen in seens]
    assert share(right) >= 0.6


@pytest.mark.parametrize("steps", [8, 20])
def test_few_steps_and_many_show_the_same(pipe: StableDiffusionPipeline, steps: int) -> None:
    seens = [read(picture) for picture in paint(pipe, [ASK] * 8, list(range(8)), num_inference_steps=steps)]
    assert share([seen.background == "blue" and seen.things[0].colour == "red" for seen in seens]) >= 0.85


def test_another_sampler_takes_over_the_settings(pipe: StableDiffusionPipeline) -> None:
    sampler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    other = StableDiffusionPipeline(
        **{**pipe.components, "scheduler": sampler}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    seens = [read(picture) for picture in paint(other, [ASK] * 8, list(range(8)), num_inference_steps=20)]
    assert share([seen.background == "blue" and seen.things[0].colour == "red" for seen in seens]) >= 0.85


def test_a_picture_is_the_same_alone_and_in_a_batch(pipe: StableDiffusionPipeline) -> None:
    prompts = [ASK, "a small green star in the top left on white", "a black ring", ""]
    together = paint(pipe, prompts, [1, 2, 3, 4])
    for row, prompt in enumerate(prompts):
        alone = paint(pipe, [prompt], [row + 1])[0]
        assert np.abs(alone.astype(int) - together[row]).max() <= 1


@pytest.mark.parametrize("prompt", ["", "xylophone über 漢字 🎨 \x00 'quoted' 12,3\n\t", "word " * 300])
def test_any_text_gives_a_picture(pipe: StableDiffusionPipeline, prompt: str) -> None:
    picture = paint(pipe, [prompt], [0], num_inference_steps=4)[0]
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 0


def test_an_unknown_word_is_passed_over(pipe: StableDiffusionPipeline) -> None:
    seens = [read(p) for p in paint(pipe, ["a splendid red circle on a blue background"] * 8, list(range(8)))]
    assert share([seen.background == "blue" and seen.things[0].colour == "red" for seen in seens]) >= 0.75


def test_img2img_starts_from_a_picture(pipe: StableDiffusionPipeline) -> None:
    drawn = one_thing("circle", "red", "white", size="large")
    img2img = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    start = Image.fromarray(draw(drawn))
    made = img2img(
        "a large red circle on a white background",
        image=start,
        strength=0.5,
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    seen = read(np.rint(made * 255).astype(np.uint8))
    assert CHECKS["background"](seen, drawn)
    assert CHECKS["colour"](seen, drawn)


def test_inpaint_changes_what_is_masked_and_keeps_the_rest(pipe: StableDiffusionPipeline) -> None:
    before = draw(Scene("white", (Thing("square", "blue", 0.25, 0.25, 0.16),)))
    mask = np.zeros((64, 64), np.uint8)
    mask[32:, 32:] = 255
    inpaint = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    inpaint.set_progress_bar_config(disable=True)
    made = inpaint(
        "a red circle in the bottom right on a white background",
        image=Image.fromarray(before),
        mask_image=Image.fromarray(mask),
        height=64,
        width=64,
        strength=1.0,
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    after = np.rint(made * 255).astype(np.int64)
    kept = np.abs(after[:28, :28] - before[:28, :28]).mean()
    changed = np.abs(after[36:, 36:] - before[36:, 36:]).mean()
    assert kept < 10
    assert changed > 20


def test_the_clip_tells_the_right_caption_from_others() -> None:
    from transformers import CLIPModel, CLIPTokenizer

    clip = CLIPModel.from_pretrained(starter.clip_path(), use_safetensors=True, local_files_only=True).eval()
    tokenizer = CLIPTokenizer.from_pretrained(starter.clip_path(), local_files_only=True)
    scenes = asked_scenes(64)
    pixels = torch.from_numpy(np.stack([draw(scene) for scene in scenes])).permute(0, 3, 1, 2) / 127.5 - 1
    words = tokenizer([words_for(scene) for scene in scenes], padding=True, return_tensors="pt")
    with torch.inference_mode():
        scores = clip(pixel_values=pixels, **words).logits_per_image
    best = scores.argmax(1).tolist()
    assert share([found == row for row, found in enumerate(best)]) >= 0.85
