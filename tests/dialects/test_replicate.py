"""Replicate's own client, unmodified: against a running farm, by http and through a TLS front."""

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import replicate
from PIL import Image
from replicate.exceptions import ReplicateError
from replicate.helpers import FileOutput
from replicate.webhook import Webhooks, WebhookSigningSecret

from tests.dialects.conftest import RED, RunningFarm
from tests.dialects.front import Front, busy, receiver, tls_front

pytestmark = pytest.mark.xdist_group("dialects")

SMALL = {"num_inference_steps": 4}
WEBP = {"steps": 4, "format": "webp", "quality": 80}


@pytest.fixture(scope="module")
def front(farm: RunningFarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with tls_front(farm.url, tmp_path_factory.mktemp("tls")) as found:
        yield found


@pytest.fixture
def client(farm: RunningFarm) -> replicate.Client:
    return replicate.Client(api_token=farm.api_key, base_url=farm.url)


@pytest.fixture
def by_https(farm: RunningFarm, front: Front, monkeypatch: pytest.MonkeyPatch) -> replicate.Client:
    monkeypatch.setenv("SSL_CERT_FILE", str(front.ca_file))
    return replicate.Client(api_token=farm.api_key, base_url=front.url)


def pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_run_gives_files_with_the_pixels_of_the_native_api(
    farm: RunningFarm, by_https: replicate.Client, front: Front
) -> None:
    output = by_https.run("farm/starter", input={"prompt": RED, "seed": 7, "num_outputs": 2, **SMALL})

    assert all(isinstance(o, FileOutput) for o in output)
    assert all(o.url.startswith(front.url) for o in output)
    assert [pixels(o.read()) for o in output] == [pixels(i) for i in farm.native(seed=7, count=2, **WEBP)]


def test_async_run_and_a_version_give_the_same(farm: RunningFarm, by_https: replicate.Client) -> None:
    version = by_https.models.get("farm/starter").latest_version
    assert version is not None

    async def run() -> bytes:
        (output,) = await by_https.async_run(
            f"farm/starter:{version.id}", input={"prompt": RED, "seed": 8, **SMALL}
        )
        return bytes(await output.aread())

    assert pixels(asyncio.run(run())) == pixels(farm.native(seed=8, **WEBP)[0])


def test_sizes_formats_and_what_only_tunes_the_vendors_hosting(
    farm: RunningFarm, by_https: replicate.Client
) -> None:
    asked = {"prompt": RED, "seed": 9, "aspect_ratio": "1:2", "output_format": "png", "guidance": 2.5}
    (output,) = by_https.run(
        "farm/starter",
        input={**asked, **SMALL, "go_fast": True, "disable_safety_checker": True, "scheduler": "K_EULER"},
    )

    image = Image.open(io.BytesIO(output.read()))
    native = {"width": image.width, "height": image.height, "guidance": 2.5, "sampler": "euler"}
    assert image.format == "PNG"
    assert image.width < image.height
    assert pixels(output.read()) == pixels(farm.native(seed=9, steps=4, **native)[0])


def test_an_open_file_is_uploaded_and_started_from(
    farm: RunningFarm, by_https: replicate.Client, tmp_path: Path
) -> None:
    start = tmp_path / "start.png"
    start.write_bytes(farm.native(seed=5, steps=4)[0])

    with start.open("rb") as image:
        (output,) = by_https.run(
            "farm/starter", input={"prompt": RED, "seed": 6, "image": image, "prompt_strength": 0.5, **SMALL}
        )

    kept = farm.api.post("/v1/inputs", content=start.read_bytes(), headers={"Content-Type": "image/png"})
    native = farm.native(seed=6, image=kept.json()["id"], strength=0.5, **WEBP)
    assert pixels(output.read()) == pixels(native[0])


def test_files_are_listed_and_deleted(client: replicate.Client, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")

    file = client.files.create(path)
    listed = client.files.list()
    deleted = client.files.delete(file.id)

    assert file in listed
    assert deleted
    assert file.id not in [f.id for f in client.files.list()]


def test_a_prediction_is_shown_from_its_start_to_its_end(client: replicate.Client, farm: RunningFarm) -> None:
    version = client.models.get("farm/starter").latest_version
    assert version is not None
    assert client.accounts.current().username == farm.account

    made = client.predictions.create(version=version, input={"prompt": RED, "seed": 3, **SMALL})
    assert made.status in ("starting", "processing", "succeeded")
    made.wait()

    assert made.status == "succeeded"
    assert made.version == version.id
    assert made.input == {"prompt": RED, "seed": 3, **SMALL}
    assert made.logs is not None
    assert "Using seed: 3" in made.logs
    assert made.progress is not None
    assert (made.progress.percentage, made.progress.current, made.progress.total) == (1.0, 4, 4)
    assert made.metrics is not None
    assert made.metrics["image_count"] == 1
    assert made.output is not None
    assert httpx.get(made.output[0], trust_env=False).content  # without a key


def test_a_wait_that_runs_out_says_starting_and_the_prediction_goes_on(
    farm: RunningFarm, client: replicate.Client
) -> None:
    with busy(farm):
        made = client.models.predictions.create(
            "farm/starter", input={"prompt": RED, "seed": 11, **SMALL}, wait=1
        )
        assert made.status == "starting"
        assert made.output is None
    made.wait()

    assert made.status == "succeeded"


def test_cancelled_is_canceled_by_hand_and_by_the_clock(farm: RunningFarm, client: replicate.Client) -> None:
    with busy(farm):
        by_hand = client.models.predictions.create("farm/starter", input={"prompt": RED})
        by_hand.cancel()
        answer = farm.api.post(
            "/v1/models/farm/starter/predictions",
            json={"input": {"prompt": RED}},
            headers={"Cancel-After": "5s"},
        )
        by_clock = client.predictions.get(answer.json()["id"])
        by_clock.wait()
        by_hand.wait()

    assert (by_hand.status, by_clock.status) == ("canceled", "canceled")
    assert by_hand.output is None
    assert client.predictions.cancel(by_hand.id).status == "canceled"


def test_pages_of_predictions_lead_on_and_back(farm: RunningFarm, client: replicate.Client) -> None:
    for seed in range(3):
        client.models.predictions.create("farm/starter", input={"prompt": RED, "seed": seed, **SMALL})

    newest = client.predictions.list().results
    older = farm.api.get("/v1/predictions", params={"cursor": f"before-{newest[0].id}"}).json()
    newer = farm.api.get("/v1/predictions", params={"cursor": f"after-{newest[2].id}"}).json()

    assert [p["id"] for p in older["results"][:2]] == [newest[1].id, newest[2].id]
    assert client.predictions.list(older["previous"]).results[0].id == newest[0].id
    assert [p["id"] for p in newer["results"]] == [newest[0].id, newest[1].id]
    assert newer["previous"] is None


def test_webhooks_are_signed_with_the_secret_that_the_client_is_told(
    farm: RunningFarm, client: replicate.Client
) -> None:
    with receiver() as hook:
        made = client.models.predictions.create(
            "farm/starter",
            input={"prompt": RED, "seed": 12, **SMALL},
            webhook=hook.url,
            webhook_events_filter=["start", "completed"],
        )
        first, last = hook.wait(2)
        headers, body = hook.came[-1]

    assert (first["id"], first["status"], first["output"]) == (made.id, "starting", None)
    assert (last["id"], last["status"], len(last["output"])) == (made.id, "succeeded", 1)
    assert last["output"][0].startswith(farm.url)
    secret: WebhookSigningSecret = client.webhooks.default.secret()
    Webhooks.validate(headers=headers, body=body.decode(), secret=secret)
    with pytest.raises(Exception, match=r"[Ss]ignature"):
        Webhooks.validate(headers=headers, body=body.decode() + " ", secret=secret)


def test_errors_name_the_field(client: replicate.Client, farm: RunningFarm) -> None:
    with pytest.raises(ReplicateError) as unknown:
        client.run("farm/starter", input={"prompt": RED, "magic": 1, "width": 63})
    with pytest.raises(ReplicateError) as size:
        client.run("farm/starter", input={"prompt": RED, "width": 63})
    with pytest.raises(ReplicateError) as model:
        client.run("farm/nothing", input={"prompt": RED})
    with pytest.raises(ReplicateError) as key:
        replicate.Client(api_token="r8_wrong", base_url=farm.url).run("farm/starter", input={"prompt": RED})

    assert unknown.value.status == 422
    assert "input.magic: there is no such field" in str(unknown.value.detail)
    assert "input.width: allowed are multiples of 8" in str(size.value.detail)
    assert (model.value.status, key.value.status) == (404, 401)
    answer = farm.api.post(
        "/v1/models/farm/starter/predictions", json={"input": {"prompt": RED, "width": 63}}
    )
    assert answer.json()["invalid_fields"][0]["field"] == "input.width"
    assert json.loads(answer.text)["status"] == 422


def test_a_version_nobody_has_is_refused(farm: RunningFarm) -> None:
    refused = farm.api.post("/v1/predictions", json={"version": "0" * 64, "input": {"prompt": RED}})

    assert refused.status_code == 422
    assert "version" in refused.json()["detail"]


def test_another_accounts_predictions_are_not_there(farm: RunningFarm, client: replicate.Client) -> None:
    made = client.models.predictions.create("farm/starter", input={"prompt": RED, **SMALL})
    stranger = farm.client(farm.stranger_key)

    assert stranger.get(f"/v1/predictions/{made.id}").status_code == 404
    assert stranger.post(f"/v1/predictions/{made.id}/cancel").status_code == 404
    assert made.id not in stranger.get("/v1/predictions").text
    assert stranger.get("/v1/predictions/job_0").json()["status"] == 404
    made.wait()
    assert made.status == "succeeded"
