"""fal's own client, unmodified. It speaks https alone: through a TLS front."""

import base64
import importlib
import io
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from PIL import Image

from tests.dialects.conftest import RED, RunningFarm
from tests.dialects.front import Front, busy, receiver, tls_front

pytestmark = pytest.mark.xdist_group("dialects")

APP = "farm/starter"
SMALL = {"num_inference_steps": 4, "output_format": "png"}


@pytest.fixture(scope="module")
def front(farm: RunningFarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with tls_front(farm.url, tmp_path_factory.mktemp("tls")) as found:
        yield found


@pytest.fixture(scope="module")
def fal(farm: RunningFarm, front: Front) -> Iterator[ModuleType]:
    """The client, which reads where fal is when it is imported."""
    told = {
        "FAL_KEY": farm.api_key,
        "FAL_RUN_HOST": f"{front.host}/fal/run",
        "FAL_QUEUE_RUN_HOST": front.host,
        "SSL_CERT_FILE": str(front.ca_file),
    }
    with patch.dict(os.environ, told):
        for name in [n for n in sys.modules if n.partition(".")[0] == "fal_client"]:
            del sys.modules[name]
        yield importlib.import_module("fal_client")


def pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def fetched(front: Front, url: str) -> bytes:
    assert url.startswith(front.url)
    answer = httpx.get(url, verify=str(front.ca_file), trust_env=False)  # without a key
    assert answer.status_code == 200
    return answer.content


def test_subscribe_gives_the_images_of_the_native_api(
    fal: ModuleType, farm: RunningFarm, front: Front
) -> None:
    seen: list[Any] = []
    asked = {"prompt": RED, "seed": 7, "num_images": 2, "enable_safety_checker": True, **SMALL}

    result = fal.subscribe(APP, asked, with_logs=True, on_queue_update=seen.append)

    assert isinstance(seen[-1], fal.Completed)
    assert seen[-1].logs
    assert [i["content_type"] for i in result["images"]] == ["image/png"] * 2
    assert [pixels(fetched(front, i["url"])) for i in result["images"]] == [
        pixels(i) for i in farm.native(seed=7, steps=4, count=2)
    ]
    assert (result["seed"], result["prompt"], result["has_nsfw_concepts"]) == (7, RED, [False, False])


def test_run_waits_and_sync_mode_puts_the_image_into_the_answer(fal: ModuleType, farm: RunningFarm) -> None:
    result = fal.run(APP, {"prompt": RED, "seed": 8, "sync_mode": True, **SMALL})

    head, _, data = result["images"][0]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert pixels(base64.b64decode(data)) == pixels(farm.native(seed=8, steps=4)[0])


def test_an_image_to_start_from_and_a_named_size(fal: ModuleType, farm: RunningFarm, front: Front) -> None:
    start = farm.native(seed=5, steps=4)[0]
    url = fal.encode(start, "image/png")

    result = fal.subscribe(
        f"{APP}/image-to-image",
        {"prompt": RED, "seed": 6, "image_url": url, "strength": 0.5, "image_size": "square", **SMALL},
    )

    kept = farm.api.post("/v1/inputs", content=start, headers={"Content-Type": "image/png"})
    native = farm.native(seed=6, steps=4, image=kept.json()["id"], strength=0.5)
    assert pixels(fetched(front, result["images"][0]["url"])) == pixels(native[0])


def test_the_queue_is_shown_and_left(fal: ModuleType, farm: RunningFarm) -> None:
    with busy(farm):
        first = fal.submit(APP, {"prompt": RED, **SMALL}, priority="low")
        second = fal.submit(APP, {"prompt": RED, **SMALL})
        queued = fal.status(APP, second.request_id)
        early = farm.api.get(f"/{APP}/requests/{second.request_id}")
        second.cancel()
        gone = second.status()
        job = farm.api.get(f"/v1/jobs/job_{first.request_id.replace('-', '')}").json()

    assert isinstance(queued, fal.Queued)
    assert (early.status_code, early.json()) == (400, {"detail": "Request is still in progress"})
    assert queued.position >= 1
    assert (gone.error_type, job["priority"]) == ("client_cancelled", 1)
    with pytest.raises(fal.FalClientHTTPError) as cancelled:
        second.get()
    assert cancelled.value.status_code == 499
    with pytest.raises(fal.FalClientHTTPError) as twice:
        second.cancel()
    assert twice.value.status_code == 400
    assert first.get()["images"]


def test_what_does_not_start_in_time_is_given_up(fal: ModuleType, farm: RunningFarm) -> None:
    with busy(farm):
        handle = fal.submit(APP, {"prompt": RED, **SMALL}, start_timeout=1.5)
        with pytest.raises(fal.FalClientHTTPError) as late:
            handle.get()

    assert late.value.status_code == 504
    assert late.value.error_type == "request_timeout"
    assert late.value.response_headers["x-fal-request-timeout-type"] == "user"


def test_a_webhook_brings_the_result(fal: ModuleType, farm: RunningFarm, front: Front) -> None:
    with receiver() as hook:
        handle = fal.submit(APP, {"prompt": RED, "seed": 9, **SMALL}, webhook_url=hook.url)
        (told,) = hook.wait(1)

    assert (told["request_id"], told["status"]) == (handle.request_id, "OK")
    assert told["payload"]["seed"] == 9
    assert fetched(front, told["payload"]["images"][0]["url"])


def test_the_status_is_streamed_until_it_is_completed(fal: ModuleType, farm: RunningFarm) -> None:
    handle = fal.submit(APP, {"prompt": RED, **SMALL})

    url = f"/{APP}/requests/{handle.request_id}/status/stream"
    with farm.api.stream("GET", url, params={"logs": 1}) as stream:
        lines = [line for line in stream.iter_lines() if line]

    assert lines[0].startswith('data: {"status": ')
    assert '"status": "COMPLETED"' in lines[-1]


def test_the_host_says_whether_to_queue(farm: RunningFarm) -> None:
    body = {"prompt": RED, "seed": 3, **SMALL}
    queued = farm.api.post(f"/{APP}", json=body, headers={"Host": "queue.farm.example"})
    run = farm.api.post(f"/{APP}", json=body, headers={"Host": "run.farm.example"})

    assert queued.json()["response_url"].startswith("http://queue.farm.example/farm/starter/requests/")
    assert run.json()["images"][0]["url"].startswith("http://run.farm.example/v1/files/")


def test_errors_name_the_field(fal: ModuleType, farm: RunningFarm) -> None:
    with pytest.raises(fal.FalClientHTTPError) as field:
        fal.submit(APP, {"prompt": RED, "image_size": {"width": 63, "height": 64}})
    with pytest.raises(fal.FalClientHTTPError) as model:
        fal.submit("fal-ai/nothing", {"prompt": RED})
    with pytest.raises(fal.FalClientHTTPError) as key:
        fal.SyncClient(key="id:secret").submit(APP, {"prompt": RED})
    priority = farm.api.post(f"/{APP}", json={"prompt": RED}, headers={"X-Fal-Queue-Priority": "high"})

    assert field.value.status_code == 422
    assert field.value.message[0]["loc"] == ["body", "image_size.width"]
    assert (model.value.status_code, key.value.status_code) == (404, 401)
    assert priority.json()["detail"][0]["msg"] == "allowed are normal, low"


def test_another_accounts_requests_are_not_there(fal: ModuleType, farm: RunningFarm) -> None:
    handle = fal.submit(APP, {"prompt": RED, **SMALL})
    stranger, url = farm.client(farm.stranger_key), f"/{APP}/requests/{handle.request_id}"

    assert stranger.get(url).status_code == 404
    assert stranger.get(f"{url}/status").status_code == 404
    assert stranger.get(f"{url}/status/stream").status_code == 404
    assert stranger.put(f"{url}/cancel").json() == {"status": "NOT_FOUND"}
    assert handle.get()["images"]
