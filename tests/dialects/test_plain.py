"""The plain server of the guides, against a running farm."""

import io
import threading

import httpx
import pytest
from PIL import Image

from tests.dialects.conftest import RED, RunningFarm
from tests.dialects.front import busy

pytestmark = pytest.mark.xdist_group("dialects")


def result(client: httpx.Client, job: str) -> httpx.Response:
    """The result, once it is more than that it is processed."""
    pause = threading.Event()
    for _ in range(600):
        answer = client.get(f"/result/{job}")
        if answer.headers["content-type"] != "application/json" or answer.json()["status"] != "processing":
            return answer
        pause.wait(0.1)
    raise AssertionError(answer.text)


def test_a_picture_is_the_native_apis(farm: RunningFarm) -> None:
    made = farm.api.post("/generate", json={"prompt": RED, "width": 64, "height": 64, "seed": 7}).json()
    assert made["status"] == "queued"

    answer = result(farm.api, made["job_id"])

    assert answer.headers["content-type"] == "image/png"
    assert answer.content == farm.native(seed=7)[0]
    assert Image.open(io.BytesIO(answer.content)).size == (64, 64)


def test_it_says_that_it_is_processed_and_what_became_of_it(farm: RunningFarm) -> None:
    with busy(farm):
        job = farm.api.post("/generate", json={"prompt": RED}).json()["job_id"]
        waiting = farm.api.get(f"/result/{job}")
        farm.api.post(f"/v1/jobs/{job}/cancel")
        cancelled = farm.api.get(f"/result/{job}")

    assert waiting.json() == {"job_id": job, "status": "processing"}
    assert cancelled.status_code == 410
    assert cancelled.json()["status"] == 410
    assert "cancelled" in cancelled.json()["detail"]


def test_a_key_in_the_path_serves_and_none_does_not(farm: RunningFarm) -> None:
    with httpx.Client(base_url=farm.url, trust_env=False) as nobody:
        made = nobody.post(f"/k/{farm.api_key}/generate", json={"prompt": RED, "seed": 7})
        without = nobody.post("/generate", json={"prompt": RED})
        wrong = nobody.post(f"/k/{farm.api_key[:-1]}x/generate", json={"prompt": RED})
        native = nobody.get(f"/k/{farm.api_key}/v1/jobs")

    assert made.status_code == 200
    assert (without.status_code, wrong.status_code, native.status_code) == (401, 401, 404)


def test_what_is_unknown_is_never_done(farm: RunningFarm) -> None:
    job = farm.api.post("/generate", json={"prompt": RED}).json()["job_id"]
    native = farm.api.post("/v1/jobs", json={"spec": {"prompt": RED}}).json()["id"]

    assert farm.client(farm.stranger_key).get(f"/result/{job}").status_code == 404
    assert farm.api.get("/result/job_1").status_code == 404
    assert farm.api.get(f"/result/{native}").status_code == 404  # it was not asked for here
    assert result(farm.api, job).status_code == 200


def test_a_wrong_field_is_named(farm: RunningFarm) -> None:
    answer = farm.api.post("/generate", json={"prompt": RED, "width": 63, "steps": 3})

    assert answer.status_code == 422
    assert "steps: there is no such field" in answer.json()["detail"]
