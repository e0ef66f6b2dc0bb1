"""OpenAI's images API through its own client, unmodified, and SiliconFlow's on the same path."""

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from PIL import Image

from farm import accounts, pricing
from farm.api.app import create_app
from farm.catalog import catalog
from farm.db import transaction
from farm.settings import settings
from tests.dialects.conftest import RED, RunningFarm, pixels
from tests.factories import ask, claim, one

pytestmark = pytest.mark.xdist_group("dialects")
FAST = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def client(farm: RunningFarm) -> OpenAI:
    return OpenAI(base_url=f"{farm.url}/v1", api_key=farm.api_key)


def png(size: tuple[int, int] = (64, 64), *, hole: bool = False, colour: str = "red") -> bytes:
    image = Image.new("RGBA", size, colour)
    if hole:
        image.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


# ------------------------------------------------------------------------------------------------ generations


def test_an_image_is_the_native_apis_for_the_same_seed(farm: RunningFarm, client: OpenAI) -> None:
    made = client.images.generate(
        prompt=RED, model="starter", response_format="b64_json", extra_body={"seed": 11, **FAST}
    )

    assert made.data
    assert made.data[0].b64_json
    assert base64.b64decode(made.data[0].b64_json) == farm.native(RED, seed=11, steps=4)[0]


def test_links_open_with_and_without_a_key_and_follow_no_redirect(farm: RunningFarm, client: OpenAI) -> None:
    made = client.images.generate(prompt=RED, n=2, size="64x64", extra_body={"seed": 21, **FAST})

    native = farm.native(RED, seed=21, count=2, steps=4)
    assert made.data
    links = [str(d.url) for d in made.data]
    assert [httpx.get(link, follow_redirects=False).content for link in links] == native
    with_key = httpx.get(links[0], headers={"Authorization": f"Bearer {farm.api_key}"})
    assert with_key.content == native[0]


def test_size_format_quality_and_style_become_the_specs(farm: RunningFarm, client: OpenAI) -> None:
    made = client.images.generate(
        prompt="a castle",
        model="dall-e-3",
        size="96x64",
        quality="low",
        style="vivid",
        output_format="webp",
        output_compression=60,
        user="somebody",
        response_format="b64_json",
        extra_body={"seed": 5},
    )

    assert made.data
    image = decoded(base64.b64decode(str(made.data[0].b64_json)))
    assert (image.size, image.format) == ((96, 64), "WEBP")
    frame = farm.api.get(f"/v1/jobs/{made.model_extra['job']}/frames/0").json()  # type: ignore[index]
    spec = frame["spec"]
    assert (spec["model"], spec["steps"], spec["quality"]) == ("starter", 10, 60)
    assert spec["original_prompt"] == "a castle"
    assert spec["prompt"].startswith("a castle, vivid")
    assert frame["revised_prompt"] == made.data[0].revised_prompt == spec["prompt"]


@pytest.mark.parametrize(
    ("asked", "is_base64"),
    [
        ({"model": "gpt-image-1"}, True),
        ({"output_format": "webp"}, True),
        ({"model": "dall-e-2"}, False),
        ({}, False),
        ({"model": "starter", "output_format": "webp"}, False),
        ({"model": "gpt-image-1", "response_format": "url"}, False),
    ],
)
def test_what_is_left_open_is_answered_as_the_model_of_that_name_does(
    client: OpenAI, asked: dict[str, Any], is_base64: bool
) -> None:
    made = client.images.generate(prompt=RED, extra_body={"seed": 11, **FAST}, **asked)

    assert made.data
    assert (made.data[0].b64_json is not None, made.data[0].url is not None) == (is_base64, not is_base64)


def test_models_are_listed_and_shown(client: OpenAI) -> None:
    assert "starter" in [m.id for m in client.models.list()]
    assert client.models.retrieve("stable-diffusion-xl-v1").id == "sdxl"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_a_stream_ends_with_the_image(farm: RunningFarm, client: OpenAI) -> None:
    stream = client.images.generate(
        prompt=RED, stream=True, partial_images=2, extra_body={"seed": 31, "num_inference_steps": 20}
    )
    events = list(stream)

    last: Any = events[-1]
    assert last.type == "image_generation.completed"
    assert base64.b64decode(last.b64_json) == farm.native(RED, seed=31)[0]
    assert {e.type for e in events[:-1]} <= {"image_generation.partial_image"}


def test_siliconflows_names_and_answer_on_the_same_path(farm: RunningFarm) -> None:
    made = farm.api.post(
        "/v1/images/generations",
        json={
            "model": "starter",
            "prompt": RED,
            "negative_prompt": "blurry",
            "image_size": "64x96",
            "batch_size": 2,
            "num_inference_steps": 4,
            "guidance_scale": 3.5,
            "seed": 41,
        },
    ).json()

    native = farm.native(
        RED, negative_prompt="blurry", width=64, height=96, count=2, steps=4, guidance=3.5, seed=41
    )
    assert [httpx.get(i["url"]).content for i in made["images"]] == native
    assert made["data"] == made["images"]
    assert made["seed"] == 41
    assert made["timings"]["inference"] > 0


def test_an_image_to_start_from_comes_as_a_data_url_and_as_the_farms_own_link(
    farm: RunningFarm, client: OpenAI
) -> None:
    start = farm.native(RED, seed=7, steps=4)[0]
    data_url = f"data:image/png;base64,{base64.b64encode(start).decode()}"
    link = client.images.generate(prompt=RED, extra_body={"seed": 7, **FAST}).data[0].url  # type: ignore[index]

    asked = {"prompt": RED, "seed": 8, "response_format": "b64_json", **FAST}
    made = [
        farm.api.post("/v1/images/generations", json={**asked, "image": image}).json()["data"][0]["b64_json"]
        for image in (data_url, link)
    ]

    assert made[0] == made[1]
    assert base64.b64decode(made[0]) == farm.native(RED, image=data_url, seed=8, steps=4)[0]


def test_prompt_enhancement_says_what_was_rendered(farm: RunningFarm) -> None:
    asked = {"prompt": "a red circle", "prompt_enhancement": True, "seed": 3, **FAST}
    made = farm.api.post("/v1/images/generations", json=asked).json()

    assert made["data"][0]["revised_prompt"] == "a red circle on a white background"
    frame = farm.api.get(f"/v1/jobs/{made['job']}/frames/0").json()
    assert frame["spec"]["original_prompt"] == "a red circle"
    assert frame["spec"]["enhanced_by"] == "template"


# ------------------------------------------------------------------------------------------------ edits


def test_an_edit_paints_what_the_mask_leaves_transparent(farm: RunningFarm, client: OpenAI) -> None:
    start, mask = png(), png(hole=True)
    made = client.images.edit(
        image=("start.png", start, "image/png"),
        mask=("mask.png", mask, "image/png"),
        prompt="a blue square",
        n=1,
        response_format="b64_json",
        extra_body={"seed": 51, **FAST},
    )

    assert made.data
    image = decoded(base64.b64decode(str(made.data[0].b64_json))).convert("RGB")
    right = image.crop((40, 0, 64, 64)).resize((1, 1)).getpixel((0, 0))
    assert right[0] > 200  # type: ignore[index]
    assert right[2] < 60  # type: ignore[index]
    white = Image.new("L", (64, 64), 0)
    white.paste(255, (0, 0, 32, 64))
    out = io.BytesIO()
    white.save(out, "PNG")
    native = farm.native(
        "a blue square",
        image=f"data:image/png;base64,{base64.b64encode(start).decode()}",
        mask=f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}",
        seed=51,
        steps=4,
    )
    assert pixels(base64.b64decode(str(made.data[0].b64_json))) == pixels(native[0])


def test_an_edit_takes_a_list_of_one_and_keeps_the_images_size(client: OpenAI) -> None:
    made = client.images.edit(
        image=[("start.png", png((96, 64)), "image/png")],
        prompt=RED,
        input_fidelity="high",
        response_format="b64_json",
        extra_body=FAST,
    )

    assert made.data
    assert decoded(base64.b64decode(str(made.data[0].b64_json))).size == (96, 64)


def test_what_is_no_edit_is_refused_by_name(client: OpenAI) -> None:
    two = [("a.png", png(), "image/png"), ("b.png", png(colour="blue"), "image/png")]
    with pytest.raises(openai.BadRequestError, match="send one") as many:
        client.images.edit(image=two, prompt=RED)
    with pytest.raises(openai.BadRequestError, match="transparent"):
        client.images.edit(image=two[0], mask=two[1], prompt=RED)
    with pytest.raises(openai.BadRequestError, match="64 × 64"):
        client.images.edit(image=two[0], mask=("m.png", png((32, 32), hole=True), "image/png"), prompt=RED)
    with pytest.raises(openai.BadRequestError, match="variations are not served"):
        client.images.create_variation(image=two[0])
    assert many.value.param == "image"


# ------------------------------------------------------------------------------------------------ errors


def test_a_wrong_key_is_an_authentication_error(farm: RunningFarm) -> None:
    stranger = OpenAI(base_url=f"{farm.url}/v1", api_key="sk-nothing", max_retries=0)

    with pytest.raises(openai.AuthenticationError) as refused:
        stranger.images.generate(prompt=RED)

    assert refused.value.type == "authentication_error"
    assert refused.value.code == "invalid_api_key"


def test_an_unknown_model_is_not_found_and_nothing_else_is(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.images.generate(prompt=RED, model="no-such-model")

    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    body: Any = refused.value.response.json()
    assert (body["code"], body["data"]) == (20012, None)
    assert "starter" in body["message"]


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"size": "1024x1024"}, "size", "multiples of 8 from 64 to 128"),
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"image_size": "64x60"}, "image_size", "multiples of 8"),
        ({"n": 11}, "n", "up to 10"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"svg": {}}, "svg", "no such field"),
        ({"style": "baroque"}, "style", "vivid"),
        ({"quality": "best"}, "quality", "auto, low, medium"),
        ({"num_inference_steps": 500}, "num_inference_steps", "1 to 100"),
        ({"prompt": ""}, "prompt", "1 to 4096"),
        ({"prompt": "a\0b"}, "prompt", "NUL"),
        ({"image": "https://10.0.0.1/x.png"}, "image", "not on the public Internet"),
        ({"output_compression": 50}, "output_compression", "a PNG has none"),
    ],
)
def test_what_is_not_allowed_is_named(
    client: OpenAI, farm: RunningFarm, asked: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        client.images.generate(prompt=RED, extra_body=asked)  # type: ignore[arg-type]

    assert refused.value.param == param
    assert refused.value.message.count(f"{param}: ") == 1  # width and height are one field there
    assert refused.value.type == "invalid_request_error"


# ------------------------------------------------------------------------------------------------ in time


@pytest.fixture
def unmanned(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """An API whose models nobody renders."""
    monkeypatch.setenv("FARM_SYNC_WAIT_S", "0.3")
    settings.cache_clear()
    with transaction() as db:
        pricing.sync(db, catalog())
        key = accounts.issue_key(db, accounts.create(db, "acme"))[1]
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        yield client


def generate(api: TestClient, attempt: int | None = None, **asked: Any) -> Any:
    headers = {} if attempt is None else {"x-stainless-retry-count": str(attempt)}
    return api.post("/v1/images/generations", json={"prompt": RED, **asked}, headers=headers)


def test_a_wait_that_runs_out_answers_408_and_the_job_goes_on(unmanned: TestClient) -> None:
    answer = generate(unmanned)

    assert answer.status_code == 408
    error = answer.json()["error"]
    assert error["type"] == "timeout"
    (job,) = unmanned.get("/v1/jobs").json()["jobs"]
    assert job["id"] in error["message"]
    assert job["status"] == "queued"


def test_a_client_that_tries_again_waits_for_the_same_job(unmanned: TestClient) -> None:
    for attempt in (0, 1, 2):
        assert generate(unmanned, attempt).status_code == 408
    assert one("SELECT count(*) FROM jobs") == 1

    # another call for the same is another job, and its second try its own
    assert [generate(unmanned, attempt).status_code for attempt in (0, 1)] == [408, 408]
    assert one("SELECT count(*) FROM jobs") == 2
    assert sorted(r.attempt for r in ask("SELECT attempt FROM open_calls")) == [1, 2]


def test_a_second_try_of_another_body_is_a_call_of_its_own(unmanned: TestClient) -> None:
    generate(unmanned, 0)
    generate(unmanned, 1, seed=9)

    assert one("SELECT count(*) FROM jobs") == 2


def test_an_idempotency_key_finds_the_job_again(unmanned: TestClient) -> None:
    headers = {"Idempotency-Key": "once"}
    for _ in range(2):
        unmanned.post("/v1/images/generations", json={"prompt": RED}, headers=headers)
    other = unmanned.post("/v1/images/generations", json={"prompt": "else"}, headers=headers)

    assert one("SELECT count(*) FROM jobs") == 1
    assert other.status_code == 400
    assert other.json()["error"]["param"] == "Idempotency-Key"


def test_a_budget_that_does_not_cover_it_is_no_reason_to_try_again(unmanned: TestClient) -> None:
    ask(
        "INSERT INTO budgets (account_id, period, currency, amount)"
        " SELECT id, 'total', 'USD', 0.00000001 FROM accounts"
    )

    answer = generate(unmanned)

    assert (answer.status_code, answer.headers["x-should-retry"]) == (429, "false")
    assert answer.json()["error"]["code"] == "insufficient_quota"


def test_an_answered_call_is_open_no_more(farm: RunningFarm, client: OpenAI) -> None:
    asked = {"prompt": "a green star on a black background", **FAST}
    first, second = (
        farm.api.post("/v1/images/generations", json=asked, headers={"x-stainless-retry-count": n}).json()
        for n in ("0", "1")
    )

    assert first["job"] != second["job"]


def test_a_stream_shows_the_previews_that_workers_publish(
    unmanned: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_SYNC_WAIT_S", "3")
    settings.cache_clear()
    jpeg = base64.b64encode(b"a small picture").decode()
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(generate, unmanned, stream=True, partial_images=1)
        while (pack := claim(models=["starter"], frames=4)) is None:
            assert not answer.done()
        (frame,) = pack.frames
        told = [frame.job_id.hex, 0, pack.id, jpeg]
        unmanned.app.state.progress.take(json.dumps({"preview": told}))  # type: ignore[attr-defined]
        text = answer.result().text

    assert text.count("event: image_generation.partial_image") == 1
    data = json.loads(text.split("event: image_generation.partial_image\ndata: ", 1)[1].split("\n")[0])
    assert (data["b64_json"], data["partial_image_index"], data["output_format"]) == (jpeg, 0, "jpeg")


def test_a_stream_that_runs_out_says_so_in_an_event(unmanned: TestClient) -> None:
    answer = generate(unmanned, stream=True)

    assert answer.status_code == 200
    assert "event: error" in answer.text
    data = json.loads(answer.text.split("data: ", 1)[1].split("\n")[0])
    assert data["error"]["type"] == "timeout"
