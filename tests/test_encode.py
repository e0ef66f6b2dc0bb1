"""Files hold the pixels and what made them, and nothing that names a frame or a job."""

import json
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from farm.catalog import BUILTIN, read
from farm.features import LoraUse
from farm.spec import MAX_PROMPT, Format, Spec
from workers.encode import encode, pixel_hash, provenance, read_metadata

MODEL = read(BUILTIN)["sd15"]
SPEC = Spec(
    "sd15", "a <red> & \"blue\" 'circle' \u2603\n\U0001f600", "ugly", 16, 24, 4, 7.5, "euler", Format.PNG
)


@pytest.fixture
def pixels() -> np.ndarray:
    y, x = np.mgrid[:24, :16]
    return np.stack([x * 16, y * 10, x * y % 256], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("fmt", Format)
def test_metadata_comes_back_as_it_went_in(pixels: np.ndarray, fmt: Format) -> None:
    facts = provenance(SPEC, 2**63 - 1, MODEL, prompt=True)

    data = encode(pixels, fmt, facts)

    assert read_metadata(data) == facts
    assert facts["seed"] == "9223372036854775807"
    assert facts["revision"] == MODEL.revision
    assert facts["prompt"] == SPEC.prompt


def test_webp_is_lossless_unless_it_has_a_quality_and_jpeg_gets_smaller_with_less(pixels: np.ndarray) -> None:
    lossless = encode(pixels, Format.WEBP, {})
    small, large = (encode(pixels, Format.JPEG, {}, quality=q) for q in (10, 95))

    assert np.array_equal(np.asarray(Image.open(BytesIO(lossless)).convert("RGB")), pixels)
    lossy = np.asarray(Image.open(BytesIO(encode(pixels, Format.WEBP, {}, quality=30))).convert("RGB"))
    assert not np.array_equal(lossy, pixels)
    assert len(small) < len(large)


def test_what_a_frame_was_made_from_is_inside_its_file_by_hash() -> None:
    use = LoraUse(name="ink", scale=0.5, sha256="a" * 64)
    facts = provenance(replace(SPEC, image="sha256:" + "b" * 64, strength=0.5, loras=(use,)), 1, MODEL)

    assert facts["image"] == "sha256:" + "b" * 64
    assert json.loads(facts["loras"]) == [{"name": "ink", "scale": 0.5, "sha256": "a" * 64}]
    assert "control" not in facts


@given(text=st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40))
@pytest.mark.parametrize("fmt", Format)
def test_any_text_comes_back_as_it_went_in(fmt: Format, text: str) -> None:
    data = encode(np.zeros((8, 8, 3), np.uint8), fmt, {"prompt": text})

    assert read_metadata(data) == {"prompt": text}


@pytest.mark.parametrize("fmt", Format)
@pytest.mark.parametrize("letter", ['"', "\U0001f600", "\x01", "&"])
def test_the_longest_prompts_fit(fmt: Format, letter: str) -> None:
    facts = {"prompt": letter * MAX_PROMPT, "negative_prompt": letter * MAX_PROMPT}

    assert read_metadata(encode(np.zeros((8, 8, 3), np.uint8), fmt, facts)) == facts


def test_the_prompt_is_left_out_unless_asked_for() -> None:
    assert not {"prompt", "negative_prompt"} & set(provenance(SPEC, 1, MODEL))


def test_the_engine_is_named_with_its_versions() -> None:
    assert "diffusers 0." in provenance(SPEC, 1, MODEL)["engine"]


def test_png_keeps_every_pixel(pixels: np.ndarray) -> None:
    image = Image.open(BytesIO(encode(pixels, Format.PNG, {})))

    assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("fmt", [Format.WEBP, Format.JPEG])
def test_lossy_formats_stay_close(fmt: Format) -> None:
    smooth = np.full((64, 64, 3), (200, 120, 40), np.uint8)

    image = Image.open(BytesIO(encode(smooth, fmt, {})))

    assert image.format == fmt.value.upper()
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - smooth).max() <= 4


@pytest.mark.parametrize("fmt", Format)
def test_equal_pixels_and_metadata_make_equal_files(pixels: np.ndarray, fmt: Format) -> None:
    facts = provenance(SPEC, 1, MODEL)

    assert encode(pixels, fmt, facts) == encode(pixels.copy(), fmt, dict(facts))


def test_an_image_from_elsewhere_has_no_metadata(pixels: np.ndarray) -> None:
    for fmt, xmp in (("JPEG", b"<broken"), ("WEBP", b'<!DOCTYPE x [<!ENTITY a "b">]><x/>'), ("PNG", None)):
        out = BytesIO()
        Image.fromarray(pixels).save(out, format=fmt, **({"xmp": xmp} if xmp else {}))
        assert read_metadata(out.getvalue()) == {}


def test_pixel_hash_depends_on_pixels_and_shape_alone(pixels: np.ndarray) -> None:
    turned = pixels.reshape(16, 24, 3)
    strided = np.repeat(pixels, 2, axis=1)[:, ::2]
    changed = pixels.copy()
    changed[0, 0, 0] ^= 1

    assert pixel_hash(pixels) == pixel_hash(strided)
    assert len({pixel_hash(pixels), pixel_hash(turned), pixel_hash(changed)}) == 3
