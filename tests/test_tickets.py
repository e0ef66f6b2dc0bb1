"""Tickets of other APIs' clients, in the database: they outlive a process, and are one account's alone."""

import base64
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from sqlalchemy.exc import IntegrityError

from farm import accounts, outcomes, pricing, queue, tickets
from farm.accounts import Caller, Role
from farm.api.app import create_app
from farm.catalog import catalog
from farm.db import transaction
from farm.errors import Conflict, Invalid, NotFound
from farm.settings import settings
from farm.storage import open_store
from farm.tickets import Dialect
from tests.factories import account, ask, claim, must_claim, stored, submit

GRAPH: dict[str, Any] = {
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "starter"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"batch_size": 2, "height": 64, "width": 64}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "a red circle"}},
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["4", 0], "positive": ["6", 0], "negative": ["6", 0], "latent_image": ["5", 0], "seed": 1,
            "steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
        },
    },
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}},
}  # fmt: skip


@pytest.fixture
def key(database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """acme's; nobody renders, and who waits does not wait long."""
    monkeypatch.setenv("FARM_SYNC_WAIT_S", "0.3")
    settings.cache_clear()
    with transaction() as db:
        pricing.sync(db, catalog())
        return accounts.issue_key(db, accounts.create(db, "acme"))[1]


@pytest.fixture
def api(key: str) -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        yield client


def who(key: str) -> Caller:
    with transaction() as db:
        return accounts.authenticate(db, key)


def render_one() -> None:
    """Do as a worker does with all of a pack, with pictures that are none."""
    pack = must_claim(models=["starter"], frames=16)
    frames = stored(pack)
    for frame in frames:
        open_store(settings().storage_url.get_secret_value()).put(
            frame.key, frame.frame_id.bytes, content_type="image/png"
        )
    with transaction() as db:
        queue.settle(db, frames)
    with transaction() as db:
        queue.finish(db, sorted({f.job_id for f in pack.frames}))


def fail_all(reason: str) -> None:
    while (pack := claim(models=["starter"], frames=16)) is not None:
        with transaction() as db:
            queue.fail(db, pack.id, reason)
    with transaction() as db:
        queue.finish(db, list({r.id for r in ask("SELECT id FROM jobs")}))


# ------------------------------------------------------------------------------------------------ in the database


def test_a_ticket_is_its_accounts_and_says_what_was_asked(books: str) -> None:
    acme, umbrella = account(), account("umbrella")
    job = submit(acme)
    asked = {"prompt": "half a pair \ud83d, and \0", "n": 10**30}
    with transaction() as db:
        tickets.write(db, acme.account_id, job, dialect=Dialect.FAL, name="x", asked=asked)

    with transaction() as db:
        found = tickets.find(db, acme.account_id, Dialect.FAL, "x")
        assert tickets.asked(found) == asked
        for whose, dialect, name in (
            (umbrella, Dialect.FAL, "x"),
            (acme, Dialect.COMFYUI, "x"),
            (acme, Dialect.FAL, "x\0"),
            (acme, Dialect.FAL, "\ud83d"),
        ):
            with pytest.raises(NotFound):
                tickets.find(db, whose.account_id, dialect, name)


def test_a_name_is_an_accounts_once(books: str) -> None:
    acme, umbrella = account(), account("umbrella")
    for caller in (acme, umbrella):
        job = submit(caller)
        with transaction() as db:
            tickets.write(db, caller.account_id, job, dialect=Dialect.FAL, name="x", asked={})
    other = submit(acme)

    with pytest.raises(Conflict), transaction() as db:
        tickets.write(db, acme.account_id, other, dialect=Dialect.FAL, name="x", asked={})
    with pytest.raises(Invalid), transaction() as db:
        tickets.write(db, acme.account_id, other, dialect=Dialect.FAL, name="y", asked={"n": float("nan")})
    with pytest.raises(IntegrityError, match="tickets_dialect_check"):
        ask(
            "INSERT INTO tickets (job_id, account_id, dialect, name, asked) VALUES (:job, :account, 'x', 'x', '{}')",
            job=other, account=acme.account_id,
        )  # fmt: skip


def test_who_was_to_begin_and_did_not_is_given_up(books: str) -> None:
    acme = account()
    begun, late, early = (submit(acme, steps=n) for n in (1, 2, 3))
    past, ahead = datetime.now(UTC) - timedelta(seconds=5), datetime.now(UTC) + timedelta(hours=1)
    for job, start_by in ((begun, past), (late, past), (early, ahead)):
        with transaction() as db:
            tickets.write(
                db, acme.account_id, job, dialect=Dialect.FAL, name=str(job), asked={}, start_by=start_by
            )
    assert must_claim().frames[0].job_id == begun

    with transaction() as db:
        assert outcomes.give_up(db) == 1
    with transaction() as db:
        assert outcomes.give_up(db) == 0

    rows = ask("SELECT j.id, j.status, t.timed_out FROM jobs AS j JOIN tickets AS t ON t.job_id = j.id")
    assert {(r.id, r.status, r.timed_out) for r in rows} == {
        (begun, "active", False),
        (late, "cancelled", True),
        (early, "active", False),
    }


def test_uploads_are_called_by_the_first_of_that_name(api: TestClient, key: str) -> None:
    def upload(colour: str, **more: str) -> dict[str, str]:
        out = io.BytesIO()
        Image.new("RGB", (64, 64), colour).save(out, "PNG")
        answer = api.post("/upload/image", files={"image": ("cat.png", out.getvalue())}, data=more)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    assert upload("red")["name"] == "cat.png"
    assert upload("red")["name"] == "cat.png"
    assert upload("blue")["name"] == "cat (1).png"
    assert upload("blue", overwrite="true")["name"] == "cat.png"
    assert upload("green", subfolder="a/b") == {"name": "cat.png", "subfolder": "a/b", "type": "input"}
    with transaction() as db:
        assert tickets.input_names(db, who(key).account_id) == ["a/b/cat.png", "cat (1).png", "cat.png"]
    for field, value in (("subfolder", "../x"), ("type", "output"), ("magic", "1")):
        answer = api.post("/upload/image", files={"image": ("x.png", b"")}, data={field: value})
        assert answer.status_code == 422
        assert field in answer.text


# ------------------------------------------------------------------------------------------------ after a restart


def test_another_process_knows_what_was_asked_and_what_became_of_it(api: TestClient, key: str) -> None:
    prompt = api.post("/prompt", json={"prompt": GRAPH, "client_id": "me"}).json()["prompt_id"]
    asked = {"input": {"prompt": "a red circle", "image": "data:image/png;base64," + "A" * 200}}
    assert api.post("/v1/models/farm/starter/predictions", json=asked).status_code == 422  # no picture
    prediction = api.post(
        "/v1/models/farm/starter/predictions", json={"input": {"prompt": "a red circle", "seed": 5}}
    ).json()
    request = api.post("/farm/starter", json={"prompt": "a red circle", "seed": 6}).json()["request_id"]

    with TestClient(create_app()) as other:
        other.headers["Authorization"] = f"Bearer {key}"
        assert other.get(f"/history/{prompt}").json() == {}
        (pending,) = other.get("/queue").json()["queue_pending"]
        assert pending[1:3] == [prompt, GRAPH]
        while (pack := claim(models=["starter"], frames=16)) is not None:
            with transaction() as db:
                queue.release(db, [pack.id])
            render_one()
        entry = other.get(f"/history/{prompt}").json()[prompt]
        shown = other.get(f"/v1/predictions/{prediction['id']}").json()
        result = other.get(f"/farm/starter/requests/{request}")

    assert len(entry["outputs"]["9"]["images"]) == 2
    assert entry["status"]["completed"] is True
    assert (shown["status"], len(shown["output"]), shown["input"]["seed"]) == ("succeeded", 1, 5)
    assert shown["started_at"] is not None
    assert result.json()["seed"] == 6


def test_a_wait_that_runs_out_says_starting_though_it_is_processing(api: TestClient, key: str) -> None:
    """The client takes any other status for an end."""
    url, headers = "/v1/models/farm/starter/predictions", {"Idempotency-Key": "once"}
    body = {"input": {"prompt": "x", "num_outputs": 2}}
    made = api.post(url, json=body, headers=headers).json()
    must_claim(models=["starter"], frames=1)

    now = api.get(f"/v1/predictions/{made['id']}").json()
    waited = api.post(url, json=body, headers={**headers, "Prefer": "wait=1"}).json()

    assert now["status"] == "processing"
    assert (waited["id"], waited["status"]) == (made["id"], "starting")


def test_the_vendors_own_names_and_versions_are_found(api: TestClient) -> None:
    version = "39ed52f2a78e934b3ba6e2a89f5b1c712de7dfea535525255b1aa35c5565e08b"
    asked = {"prompt": "x", "num_inference_steps": 20}

    shown = api.get(f"/v1/models/stability-ai/sdxl/versions/{version}")
    other = api.get(f"/v1/models/black-forest-labs/flux-schnell/versions/{version}")
    made = api.post("/v1/predictions", json={"version": version, "input": asked})
    queued = api.post("/fal-ai/flux/schnell", json={"prompt": "x", "image_size": "landscape_4_3"})

    assert (shown.status_code, shown.json()["id"]) == (200, version)
    assert other.status_code == 404
    assert made.status_code == 201
    assert queued.status_code == 200
    specs = {r.model: r.spec for r in ask("SELECT spec->>'model' AS model, spec FROM frames")}
    assert specs.keys() == {"sdxl", "flux1-schnell"}
    assert (specs["flux1-schnell"]["width"], specs["flux1-schnell"]["height"]) == (1024, 768)


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_a_failed_render_is_a_failure_in_each_of_them(api: TestClient, key: str) -> None:
    prompt = api.post("/prompt", json={"prompt": GRAPH}).json()["prompt_id"]
    prediction = api.post(
        "/v1/predictions", json={"version": "farm/starter", "input": {"prompt": "x", "num_outputs": 2}}
    ).json()["id"]
    request = api.post("/farm/starter", json={"prompt": "x"}).json()["request_id"]
    plain = api.post("/generate", json={"prompt": "x"}).json()["job_id"]
    fail_all("the device is on fire")

    shown = api.get(f"/v1/predictions/{prediction}").json()
    entry = api.get(f"/history/{prompt}").json()[prompt]
    status = api.get(f"/farm/starter/requests/{request}/status").json()
    result = api.get(f"/farm/starter/requests/{request}")
    answer = api.get(f"/result/{plain}")

    assert (shown["status"], shown["error"], shown["output"]) == ("failed", "the device is on fire", None)
    assert entry["status"]["status_str"] == "error"
    assert entry["status"]["messages"][-1][1]["exception_message"] == "the device is on fire"
    assert (status["status"], status["error_type"]) == ("COMPLETED", "generation_error")
    assert (result.status_code, result.json()["detail"][0]["msg"]) == (422, "the device is on fire")
    assert (answer.status_code, "on fire" in answer.json()["detail"]) == (410, True)


def test_a_synchronous_call_that_runs_out_names_the_job_that_goes_on(api: TestClient, key: str) -> None:
    webui = api.post("/sdapi/v1/txt2img", json={"prompt": "x"})
    run = api.post("/fal/run/farm/starter", json={"prompt": "x"})

    assert (webui.status_code, run.status_code) == (504, 504)
    assert run.json()["error_type"] == "request_timeout"
    assert "the job goes on as job_" in webui.json()["detail"]
    assert api.get(f"/farm/starter/requests/{run.headers['x-fal-request-id']}/status").status_code == 202
    assert len(api.get("/v1/jobs").json()["jobs"]) == 2


def test_of_a_job_some_of_whose_frames_failed_the_others_are_delivered(api: TestClient, key: str) -> None:
    body = {"version": "farm/starter", "input": {"prompt": "x", "num_outputs": 2}}
    prediction = api.post("/v1/predictions", json=body).json()["id"]
    first = must_claim(models=["starter"], frames=1)
    frames = stored(first)
    with transaction() as db:
        queue.settle(db, frames)
    fail_all("it would not")

    shown = api.get(f"/v1/predictions/{prediction}").json()

    assert shown["status"] == "succeeded"
    assert len(shown["output"]) == 1
    assert "it would not" in shown["logs"]


def test_whatever_is_sent_gets_an_answer_in_the_apis_own_words(api: TestClient) -> None:
    hostile = (
        '{"prompt": {"4": NaN}}', '{"prompt": "\\ud800"}', '{"prompt": {"\\u0000": 1}}', "[" * 10_000, '{"a":', "",
        '{"prompt": "x", "seed": 1' + "0" * 5000 + "}", '{"prompt": "x", "width": 1e999}', "null", "\xff",
    )  # fmt: skip
    paths = ("/prompt", "/generate", "/farm/starter", "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/options",
             "/queue", "/history", "/v1/predictions", "/v1/models/farm/starter/predictions")  # fmt: skip
    for path in paths:
        for text in hostile:
            sent = text.encode("latin-1")
            answer = api.post(path, content=sent, headers={"Content-Type": "application/json"})
            assert 400 <= answer.status_code < 500, (path, text[:50], answer.text)
            assert json.loads(answer.text)
    assert api.get("/v1/jobs").json()["jobs"] == []


def test_nan_in_what_is_kept_is_refused(api: TestClient) -> None:
    sent = json.dumps({"prompt": GRAPH, "extra_data": {"x": float("nan")}})

    answer = api.post("/prompt", content=sent)

    assert answer.status_code == 422
    assert api.get("/v1/jobs").json()["jobs"] == []


def test_a_reader_may_look_and_not_submit(api: TestClient, key: str) -> None:
    with transaction() as db:
        reader = accounts.issue_key(db, accounts.find(db, "acme"), role=Role.READ)[1]
    headers = {"Authorization": f"Bearer {reader}"}
    calls: list[tuple[str, str, Any]] = [
        ("POST", "/prompt", {"prompt": GRAPH}),
        ("POST", "/generate", {"prompt": "x"}),
        ("POST", "/farm/starter", {"prompt": "x"}),
        ("POST", "/sdapi/v1/txt2img", {"prompt": "x"}),
        ("POST", "/sdapi/v1/interrupt", None),
        ("POST", "/interrupt", None),
        ("POST", "/v1/predictions", {"version": "farm/starter", "input": {"prompt": "x"}}),
    ]

    answers = [api.request(m, p, json=b, headers=headers).status_code for m, p, b in calls]

    assert set(answers) == {403}
    assert api.get("/queue", headers=headers).status_code == 200
    assert api.get("/v1/predictions", headers=headers).json()["results"] == []


# ------------------------------------------------------------------------------------------------ where from


def basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"me:{key}".encode()).decode()


def test_pages_of_other_hosts_may_not_use_the_browsers_password(api: TestClient, key: str) -> None:
    there = {"Authorization": basic(key), "Origin": "https://evil.example"}
    here = {"Authorization": basic(key), "Origin": "http://testserver"}
    calls = (("GET", "/prompt"), ("GET", "/sdapi/v1/samplers"), ("POST", "/interrupt"), ("POST", "/generate"))

    assert {api.request(m, p, headers=there, content=b"{}").status_code for m, p in calls} == {403}
    assert {api.request(m, p, headers=here, content=b"{}").status_code for m, p in calls} == {200, 422}
    assert api.get("/prompt", headers={"Origin": "https://a.example"}).status_code == 200  # it has a key


def test_links_begin_as_the_request_came_unless_that_is_no_host(api: TestClient) -> None:
    for host, shown in (
        ("farm.example:8443", "http://farm.example:8443"),
        ("[::1]:8000", "http://[::1]:8000"),
        ('evil"><script>', "http://testserver:80"),
        ("a.example/path?x=", "http://testserver:80"),
        ("user@a.example", "http://testserver:80"),
    ):
        sent = api.post("/farm/starter", json={"prompt": "x"}, headers={"Host": host}).json()
        assert sent["response_url"].startswith(f"{shown}/farm/starter/requests/")


def test_a_public_url_names_the_farm_whatever_the_host_says(
    api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_PUBLIC_URL", "https://farm.example/")
    settings.cache_clear()

    sent = api.post("/farm/starter", json={"prompt": "x"}, headers={"Host": "evil.example"}).json()
    made = api.post("/v1/predictions", json={"version": "farm/starter", "input": {"prompt": "x"}}).json()
    job = api.post("/v1/jobs", json={"spec": {"prompt": "x"}}).json()

    assert sent["status_url"].startswith("https://farm.example/farm/")
    assert made["urls"]["get"].startswith("https://farm.example/v1/predictions/")
    assert job["urls"]["self"].startswith("https://farm.example/v1/jobs/")


def test_a_key_in_the_path_is_for_these_apis_and_gone_from_what_is_said(api: TestClient, key: str) -> None:
    del api.headers["Authorization"]

    listed = api.get(f"/k/{key}/queue")
    native = api.get(f"/k/{key}/v1/jobs")
    wrong = api.get(f"/k/{key[:-1]}/queue")
    scraped = api.get("/metrics").text

    assert (listed.status_code, native.status_code, wrong.status_code) == (200, 404, 401)
    assert key not in native.text + wrong.text + scraped
    assert "/k/" not in scraped
