"""Stability's first REST API, as its documentation calls it: there is no client of it but requests."""

import base64
import io
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.dialects.conftest import RED, RunningFarm, pixels

pytestmark = pytest.mark.xdist_group("dialects")

FAST = {"steps": 4, "cfg_scale": 4}
PROMPTS = [{"text": RED, "weight": 1}]


@pytest.fixture(scope="module")
def api(farm: RunningFarm) -> httpx.Client:
    return farm.client(farm.api_key)


def draw(api: httpx.Client, *, accept: str = "application/json", **body: Any) -> httpx.Response:
    return api.post(
        "/v1/generation/starter/text-to-image",
        headers={"Accept": accept},
        json={"text_prompts": PROMPTS, **FAST, **body},
    )


def form(api: httpx.Client, path: str, files: dict[str, bytes], **fields: Any) -> httpx.Response:
    return api.post(
        f"/v1/generation/starter/{path}",
        headers={"Accept": "application/json"},
        files=files,
        data={"text_prompts[0][text]": RED, "text_prompts[0][weight]": "1", "steps": "4", "cfg_scale": "4"}
        | fields,
    )


def images(answer: httpx.Response) -> list[bytes]:
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(a["base64"]) for a in answer.json()["artifacts"]]


def png(colour: str, half: str | None = None, size: tuple[int, int] = (64, 64)) -> bytes:
    image = Image.new("RGB", size, colour)
    if half:
        image.paste(half, (0, 0, size[0] // 2, size[1]))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def test_images_are_the_native_apis_for_the_same_seed(farm: RunningFarm, api: httpx.Client) -> None:
    answer = draw(api, samples=2, seed=11, width=64, height=96, clip_guidance_preset="FAST_BLUE", extras={})

    native = farm.native(RED, seed=11, count=2, width=64, height=96, steps=4, guidance=4.0)
    assert images(answer) == native
    found = [(a["seed"], a["finishReason"]) for a in answer.json()["artifacts"]]
    assert found == [(11, "SUCCESS"), (12, "SUCCESS")]


def test_the_raw_image_comes_with_its_seed(farm: RunningFarm, api: httpx.Client) -> None:
    answer = draw(api, accept="image/png", seed=12)

    assert answer.content == farm.native(RED, seed=12, steps=4, guidance=4.0)[0]
    assert (answer.headers["Seed"], answer.headers["Finish-Reason"]) == ("12", "SUCCESS")
    assert answer.headers["Content-Type"] == "image/png"


def test_an_image_is_changed_by_a_form(farm: RunningFarm, api: httpx.Client) -> None:
    start = farm.native(RED, seed=1, steps=4)[0]
    answer = form(api, "image-to-image", {"init_image": start}, image_strength="0.25", seed="3")

    native = farm.native(RED, image=url(start), strength=0.75, seed=3, steps=4, guidance=4.0)
    assert images(answer) == native


def test_a_mask_says_what_is_painted_anew(farm: RunningFarm, api: httpx.Client) -> None:
    start, mask = png("red"), png("white", "black")
    answer = form(
        api,
        "image-to-image/masking",
        {"init_image": start, "mask_image": mask},
        mask_source="MASK_IMAGE_BLACK",
        seed="4",
    )

    native = farm.native(
        RED, image=url(start), mask=url(png("black", "white")), seed=4, steps=4, guidance=4.0
    )
    assert list(map(pixels, images(answer))) == list(map(pixels, native))


def test_an_image_is_enlarged_to_twice_its_size(farm: RunningFarm, api: httpx.Client) -> None:
    start = farm.native(RED, seed=1, steps=4)[0]
    answer = api.post(
        "/v1/generation/esrgan-v1-x2plus/image-to-image/upscale",
        files={"image": start},
        headers={"Accept": "image/png"},
    )
    sized = form(api, "image-to-image/upscale", {"image": start}, width="96", seed="5")
    refused = form(api, "image-to-image/upscale", {"image": start}, height="512")

    assert Image.open(io.BytesIO(answer.content)).size == (128, 128)
    assert [Image.open(io.BytesIO(i)).size for i in images(sized)] == [(96, 96)]
    assert (refused.status_code, refused.json()["name"]) == (400, "bad_request")
    assert "height: starter makes sides of 64 to 128" in refused.json()["message"]


def test_engines_and_balance(farm: RunningFarm, api: httpx.Client) -> None:
    engines = {e["id"]: e for e in api.get("/v1/engines/list").json()}
    unlimited = api.get("/v1/user/balance").json()["credits"]
    admin = farm.client(farm.admin_key)
    stranger = farm.client(farm.stranger_key)
    put = admin.put("/v1/budget", json={"account": "stranger", "period": "total", "limit": "12.5"})

    assert put.status_code == 200, put.text
    assert engines["starter"]["type"] == "PICTURE"
    assert unlimited == 1_000_000
    left = float(put.json()["budgets"][0]["left"])  # others of these tests draw as the stranger
    assert 12 < left <= 12.5
    assert stranger.get("/v1/user/balance").json() == {"credits": left}


@pytest.mark.parametrize(
    ("answer", "status", "name", "said"),
    [
        (lambda a: draw(a, width=1024), 400, "bad_request", "width: allowed are multiples of 8"),
        (lambda a: draw(a, samples=11), 400, "bad_request", "samples: allowed are up to 10"),
        (lambda a: draw(a, init_image="x"), 400, "bad_request", "init_image: there is no such field"),
        (lambda a: draw(a, samples=2, accept="image/png"), 400, "bad_request", "samples"),
        (lambda a: form(a, "image-to-image", {}), 400, "bad_request", "multipart/form-data"),
        (lambda a: form(a, "image-to-image", {"init_image": b"no"}), 400, "bad_request", "init_image: it is no"),
        (lambda a: form(a, "image-to-image/masking", {"init_image": png("red")}), 400, "bad_request",
         "mask_source: it is required"),
        (lambda a: a.post("/v1/generation/nothing/text-to-image", json={}), 404, "invalid_engine", "starter"),
        (lambda a: a.post("/v1/generation/starter/text-to-image", headers={"Authorization": "Bearer x"}), 401,
         "unauthorized", "malformed"),
    ],
)  # fmt: skip
def test_errors_have_id_name_and_message(
    api: httpx.Client, answer: Any, status: int, name: str, said: str
) -> None:
    found: httpx.Response = answer(api)

    assert found.status_code == status
    body = found.json()
    assert body.keys() == {"id", "name", "message"}
    assert body["name"] == name
    assert said in body["message"]
