"""The HTTP API, over a real database: what it takes, what it refuses, and how it says so."""

import base64
import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator
from PIL import Image
from redis import Redis as RedisClient
from sqlalchemy import text

from farm import accounts, events, ids, ledger, pricing, queue, sweep, tokens
from farm.accounts import Role
from farm.api.app import create_app
from farm.api.progress import Progress
from farm.catalog import catalog
from farm.db import engine, transaction
from farm.queue import ClaimedPack, StoredFrame
from farm.settings import settings
from farm.spec import MAX_SEED
from farm.storage import image_key, open_store
from tests.factories import claim, must_claim

RED = {"prompt": "a red circle"}


OPEN = {"/v1/files/{token}"}  # the link is the key


@pytest.fixture
def keys(database: str) -> dict[str, str]:
    """API keys of two accounts: acme may submit, read and administer, umbrella may submit."""
    with transaction() as db:
        pricing.sync(db, catalog())
        acme, umbrella = accounts.create(db, "acme"), accounts.create(db, "umbrella")
        return {
            "acme": accounts.issue_key(db, acme)[1],
            "reader": accounts.issue_key(db, acme, role=Role.READ)[1],
            "admin": accounts.issue_key(db, acme, role=Role.ADMIN)[1],
            "umbrella": accounts.issue_key(db, umbrella)[1],
        }


@pytest.fixture
def api(keys: dict[str, str]) -> Iterator[TestClient]:
    """The API, called with acme's key."""
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {keys['acme']}"
        yield client


def as_(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def submitted(api: TestClient, spec: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    answer = api.post("/v1/jobs", json={"spec": spec or RED, **more})
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def rows(table: str) -> int:
    with transaction() as db:
        return int(db.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


def claimed(frames: int = 8) -> ClaimedPack:
    return must_claim("w1", models=("starter",), frames=frames)


def picture(colour: str, width: int = 64, height: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def settled(pack: ClaimedPack) -> list[bytes]:
    """Store an image for each frame of the pack and settle it."""
    store, stored, images = open_store(settings().storage_url.get_secret_value()), [], []
    for frame in pack.frames:
        data = picture(f"hsl({frame.index * 40}, 80%, 50%)", frame.spec.width, frame.spec.height)
        key = image_key(frame.account_id, hashlib.sha256(data).digest(), "png")
        store.put(key, data, content_type="image/png")
        images.append(data)
        stored.append(
            StoredFrame(
                frame_id=frame.id,
                job_id=frame.job_id,
                pack_id=pack.id,
                key=key,
                format="png",
                sha256=hashlib.sha256(data).digest(),
                pixel_sha256=hashlib.sha256(data).digest(),
                bytes=len(data),
                width=frame.spec.width,
                height=frame.spec.height,
            )
        )
    with transaction() as db:
        queue.settle(db, stored)
    with transaction() as db:
        queue.finish(db, [f.job_id for f in pack.frames])
    return images


# ------------------------------------------------------------------------------------------------ submit


def test_a_job_is_accepted_and_can_be_found(api: TestClient) -> None:
    answer = api.post(
        "/v1/jobs", json={"spec": {**RED, "count": 3, "seed": 7}, "priority": "urgent", "name": "x"}
    )

    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["Location"] == job["urls"]["self"]
    assert (job["status"], job["priority"], job["frames"], job["name"]) == ("queued", 9, 3, "x")
    nothing = dict.fromkeys(("running", "waiting", "staged", "done", "reused", "failed", "cancelled"), 0)
    assert job["counts"] == {"queued": 3, **nothing}
    # 64 x 64 px, 20 steps, 3 images at 0.0032 a megapixel step
    assert (job["quoted"], job["held"], job["charged"], job["currency"]) == ("0.00075", "0.00075", "0", "USD")
    assert job["created_at"].endswith("Z")
    assert api.get(job["urls"]["self"]).json() == job
    frames = api.get(job["urls"]["frames"]).json()["frames"]
    assert [(f["index"], f["seed"], f["status"], f["cost"], f["image"]) for f in frames] == [
        (n, 7 + n, "queued", None, None) for n in range(3)
    ]
    assert api.get(f"/v1/frames/{frames[1]['id']}").json() == frames[1]
    assert api.get(f"{job['urls']['frames']}/1").json() == frames[1]


BIG = 10_001
BAD = {
    "unknown model": ({"spec": {**RED, "model": "dalle"}}, "spec.model", "dalle", "starter"),
    "size": ({"spec": {**RED, "width": 65}}, "spec.width", 65, "multiples of 8 from 64 to 128"),
    "no steps": ({"spec": {**RED, "steps": 0}}, "spec.steps", 0, "1 to 100"),
    "steps as text": ({"spec": {**RED, "steps": "20"}}, "spec.steps", "20", "an integer"),
    "100 kB": (
        {"spec": {"prompt": "a" * 100_000}}, "spec.prompt", "a" * 199 + "…", "1 to 4096 characters"
    ),
    "no prompt": ({"spec": {}}, "spec.prompt", None, "required"),
    "NUL": ({"spec": {"prompt": "a\0b"}}, "spec.prompt", "a\0b", "NUL"),
    "seed": ({"spec": {**RED, "seed": 2**63}}, "spec.seed", 2**63, str(MAX_SEED)),
    "count": ({"spec": {**RED, "count": BIG}}, "spec.count", BIG, "10000"),
    "counts together": (
        {"specs": [{**RED, "count": 6000}] * 2}, "specs[1].count", 6000, "10000"
    ),
    "second spec": (
        {"specs": [RED, {**RED, "sampler": "magic"}]}, "specs[1].sampler", "magic", "dpm++2m"
    ),
    "unknown field": ({"spec": {**RED, "stepz": 3}}, "spec.stepz", 3, "negative_prompt"),
    "unknown field of the job": ({"spec": RED, "prio": 3}, "prio", 3, "priority"),
    "priority": ({"spec": RED, "priority": 10}, "priority", 10, "0 to 9, or urgent, standard, bulk"),
    "priority's name": (
        {"spec": RED, "priority": "now"}, "priority", "now", "0 to 9, or urgent, standard, bulk"
    ),
    "guidance": ({"spec": {**RED, "guidance": 31}}, "spec.guidance", 31.0, "0.0 to 30.0"),
    "format": ({"spec": {**RED, "format": "gif"}}, "spec.format", "gif", "'png', 'webp' or 'jpeg'"),
    "both": ({"spec": RED, "specs": [RED]}, "body", None, "either spec or specs"),
    "no specs": ({"specs": []}, "specs", "a list of 0", "1 items"),
    "a list": ([RED], "body", None, "an object"),
    "an endless number": (
        {"spec": {**RED, "width": 10**300}}, "spec.width", "an integer of 997 bits", "multiples of 8"
    ),
}  # fmt: skip


def test_bad_input_is_refused_by_field_and_nothing_is_stored(api: TestClient) -> None:
    for name, (body, field, value, allowed) in BAD.items():
        answer = api.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"})

        assert answer.status_code == 422, name
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert (problem["type"], problem["status"]) == ("urn:farm:invalid", 422)
        [fault] = problem["errors"]
        assert (name, fault["field"], fault["value"]) == (name, field, value)
        assert allowed in fault["allowed"]
        assert field in problem["detail"]
        assert len(answer.content) < 2000
    assert [rows(t) for t in ("jobs", "frames", "idempotency_keys", "outbox", "lanes")] == [0] * 5


def test_malformed_json_is_refused_with_its_position(api: TestClient) -> None:
    surrogate, deep = b'{"spec": {"prompt": "\\ud800"}}', b"[" * 100_000
    for body in (b'{"spec": {"prompt": "a}', b"", b"nonsense", surrogate, b"\xff\xfe", deep):
        answer = api.post("/v1/jobs", content=body)

        [fault] = answer.json()["errors"]
        assert answer.status_code == 422
        assert fault["field"] == "body"
        assert "line 1 column" in fault["allowed"]
    assert rows("jobs") == 0


def test_every_faulty_field_is_named_at_once(api: TestClient) -> None:
    answer = api.post("/v1/jobs", json={"specs": [{**RED, "width": 1, "steps": 0}, {**RED, "model": "x"}]})

    assert [e["field"] for e in answer.json()["errors"]] == [
        "specs[0].width",
        "specs[0].steps",
        "specs[1].model",
    ]


def test_a_body_beyond_the_limit_is_refused(api: TestClient) -> None:
    answer = api.post("/v1/jobs", content=b" " * ((16 << 20) + 1))

    assert (answer.status_code, answer.json()["type"]) == (413, "urn:farm:too-large")

    def endless() -> Iterator[bytes]:  # no Content-Length to judge by
        for _ in range(17):
            yield b" " * (1 << 20)

    assert api.post("/v1/jobs", content=endless()).status_code == 413


# ------------------------------------------------------------------------------------------------ once


def test_the_same_key_and_body_is_the_same_job(api: TestClient) -> None:
    first = api.post("/v1/jobs", json={"spec": RED}, headers={"Idempotency-Key": "order 1"})
    again = api.post("/v1/jobs", json={"spec": RED}, headers={"Idempotency-Key": "order 1"})

    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == again.json()
    assert again.headers["Idempotent-Replayed"] == "true"
    assert [j["id"] for j in api.get("/v1/jobs?idempotency_key=order+1").json()["jobs"]] == [
        first.json()["id"]
    ]
    assert rows("jobs") == 1


def test_the_same_key_with_another_body_is_refused(api: TestClient) -> None:
    api.post("/v1/jobs", json={"spec": RED}, headers={"Idempotency-Key": "order 1"})

    answer = api.post("/v1/jobs", json={"spec": {**RED, "steps": 5}}, headers={"Idempotency-Key": "order 1"})

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "Idempotency-Key"
    assert rows("jobs") == 1


def test_an_idempotency_key_has_limits(api: TestClient) -> None:
    for key in ("", "x" * 256, "tab\tin it", "ümlaut"):
        answer = api.post("/v1/jobs", json={"spec": RED}, headers={b"Idempotency-Key": key.encode("latin-1")})

        assert answer.status_code == 422
        assert answer.json()["errors"][0]["field"] == "Idempotency-Key"
    assert rows("jobs") == 0


def test_twenty_at_once_under_one_key_make_one_job(api: TestClient) -> None:
    together = threading.Barrier(20)

    def post(_: int) -> str:
        together.wait()
        return str(api.post("/v1/jobs", json={"spec": RED}, headers={"Idempotency-Key": "k"}).json()["id"])

    with ThreadPoolExecutor(20) as threads:
        made = set(threads.map(post, range(20)))

    assert len(made) == 1
    assert rows("jobs") == rows("frames") == 1


# ------------------------------------------------------------------------------------------------ who


ID_ROUTES = [
    ("GET", "/v1/jobs/{job}"), ("PATCH", "/v1/jobs/{job}"), ("POST", "/v1/jobs/{job}/cancel"),
    ("POST", "/v1/jobs/{job}/pause"), ("POST", "/v1/jobs/{job}/resume"), ("GET", "/v1/jobs/{job}/frames"),
    ("GET", "/v1/jobs/{job}/frames/0"), ("GET", "/v1/jobs/{job}/frames/0/image"),
    ("GET", "/v1/jobs/{job}/sheet"),
    ("GET", "/v1/jobs/{job}/events"), ("GET", "/v1/frames/{frame}"), ("GET", "/v1/usage?job={job}"),
]  # fmt: skip


def test_anothers_job_answers_like_one_that_does_not_exist(api: TestClient, keys: dict[str, str]) -> None:
    job, unknown = submitted(api)["id"], "job_" + ids.new_id(1).hex
    settled(claimed())

    def ask(method: str, path: str, job: str) -> tuple[int, str]:
        frame = "frm_" + job[4:-1] + "1"
        path = path.format(job=job, frame=frame)
        answer = api.request(method, path, json={"priority": 1}, headers=as_(keys["umbrella"]))
        return answer.status_code, answer.text.replace(job, "").replace(frame, "").split('"request"')[0]

    for method, path in ID_ROUTES:
        assert ask(method, path, job) == ask(method, path, unknown), path
        for nobodys in (job, "job_nonsense", "job_" + "z" * 32):
            assert ask(method, path, nobodys)[0] == 404, path


@pytest.mark.parametrize(
    ("fields", "faults", "field"),
    [(300, 100, "x0"), (20_000, 1, "body"), (500_000, 1, "body")],
)
def test_a_body_of_nothing_but_faults_is_refused_in_a_few(
    api: TestClient, fields: int, faults: int, field: str
) -> None:
    body = {"spec": {"prompt": "a"}, **{f"x{n}": 1 for n in range(fields)}}

    answer = api.post("/v1/jobs", json=body)

    assert answer.status_code == 422
    assert len(answer.json()["errors"]) == faults
    assert answer.json()["errors"][0]["field"] == field


def test_the_reference_page_needs_nothing_from_elsewhere(api: TestClient) -> None:
    page = api.get("/docs", headers={"Authorization": ""}).text

    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(named) == 3
    for url in named:
        assert url.startswith("/docs/files/")
        assert api.get(url).status_code == 200
    assert "SwaggerUIBundle" in api.get(next(u for u in named if u.endswith(".js"))).text
    assert api.get("/docs/files/../core.py").status_code == 404


def test_nobody_gets_in_without_a_valid_key(
    api: TestClient, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_WRONG_KEYS_PER_MIN", "1e6")
    settings.cache_clear()
    schema = api.get("/openapi.json").json()
    for path, operations in schema["paths"].items():
        if path in OPEN or path.startswith(("/health", "/metrics")):
            continue
        concrete = (
            path.replace("{index}", "0").replace("{job}", "job_" + "0" * 32).replace("{app}", "starter")
        )
        for method, operation in operations.items():
            for header in (
                "",
                "Bearer",
                "Bearer farm_x",
                "Basic !",
                "Digest x",
                f"Bearer {keys['acme']}x",
            ):
                answer = api.request(method.upper(), concrete, headers={"Authorization": header})
                if "dialects" in operation["tags"]:  # which say it in their own words
                    assert answer.status_code in (401, 403), (method, path, header)
                    continue
                assert answer.status_code == 401, (method, path, header)
                assert answer.headers["WWW-Authenticate"].startswith("Bearer")
                assert answer.json()["type"] == "urn:farm:unauthorized"


def test_a_key_comes_as_bearer_as_key_or_as_a_password(api: TestClient, keys: dict[str, str]) -> None:
    password = base64.b64encode(f"anybody:{keys['acme']}".encode()).decode()

    for header in (
        f"Bearer {keys['acme']}",
        f"bearer {keys['acme']}",
        f"Key {keys['acme']}",
        f"Basic {password}",
    ):
        answer = api.get("/v1/account", headers={"Authorization": header})
        assert (answer.status_code, answer.json()["name"], answer.json()["role"]) == (200, "acme", "submit")


def test_a_key_may_what_its_role_may(api: TestClient, keys: dict[str, str]) -> None:
    job = submitted(api)["id"]

    assert api.get(f"/v1/jobs/{job}", headers=as_(keys["reader"])).status_code == 200
    assert api.post("/v1/jobs", json={"spec": RED}, headers=as_(keys["reader"])).status_code == 403
    assert (
        api.post(f"/v1/jobs/{job}/cancel", headers=as_(keys["reader"])).json()["type"] == "urn:farm:forbidden"
    )
    for path in ("/v1/workers", "/v1/accounts", "/v1/accounts/acme/keys", "/v1/audit"):
        assert api.get(path).status_code == 403
        assert api.get(path, headers=as_(keys["admin"])).status_code == 200


def test_an_admin_adds_accounts_and_rotates_and_revokes_keys(api: TestClient, keys: dict[str, str]) -> None:
    api.headers.update(as_(keys["admin"]))

    account = api.post("/v1/accounts", json={"name": "hooli", "currency": "EUR"})
    assert (account.status_code, account.json()["weight"]) == (201, 1)
    assert api.post("/v1/accounts", json={"name": "hooli"}).status_code == 409
    faults = api.post("/v1/accounts", json={"name": "A B", "currency": "€", "weight": 0}).json()["errors"]
    assert [f["field"] for f in faults] == ["name", "currency", "weight"]
    key = api.post("/v1/accounts/hooli/keys", json={"role": "read"})
    assert key.status_code == 201
    assert api.post("/v1/accounts/hooli/keys", json={"role": "god"}).status_code == 422
    assert api.get("/v1/account", headers=as_(key.json()["api_key"])).json()["name"] == "hooli"
    # nothing is sold in EUR
    models = api.get("/v1/models", headers=as_(key.json()["api_key"])).json()["models"]
    assert {m["price"] for m in models} == {None}

    rotated = api.post(f"/v1/keys/{key.json()['id']}/rotate").json()
    assert (rotated["id"], rotated["version"]) == (key.json()["id"], 2)
    assert api.get("/v1/account", headers=as_(key.json()["api_key"])).status_code == 401
    assert api.get("/v1/account", headers=as_(rotated["api_key"])).status_code == 200

    assert api.post(f"/v1/keys/{key.json()['id']}/revoke").json()["revoked_at"]
    assert api.get("/v1/account", headers=as_(rotated["api_key"])).status_code == 401
    listed = api.get("/v1/accounts/hooli/keys").json()["keys"]
    assert [(k["version"], k["revoked_at"] is not None, "api_key" in k) for k in listed] == [(2, True, False)]
    assert [a["name"] for a in api.get("/v1/accounts").json()["accounts"]] == ["acme", "hooli", "umbrella"]
    for path in ("/v1/keys/key_x/rotate", f"/v1/keys/key_{'0' * 32}/revoke", "/v1/accounts/x%00/keys"):
        assert api.request("GET" if "acc" in path else "POST", path).status_code == 404


def test_no_key_reaches_the_log(
    api: TestClient, keys: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    submitted(api)
    api.get("/v1/account", headers={"Authorization": f"Bearer {keys['acme']}x"})

    assert keys["acme"][-49:] not in caplog.text


# ------------------------------------------------------------------------------------------------ verbs


def test_a_job_is_paused_resumed_moved_and_cancelled(api: TestClient) -> None:
    job = submitted(api)["id"]

    assert api.post(f"/v1/jobs/{job}/pause").json()["status"] == "paused"
    assert claim(models=("starter",), frames=1) is None
    assert api.post(f"/v1/jobs/{job}/resume").json()["status"] == "queued"
    assert api.patch(f"/v1/jobs/{job}", json={"priority": "bulk"}).json()["priority"] == 1
    assert api.patch(f"/v1/jobs/{job}", json={"priority": 8}).json()["priority"] == 8
    refused = api.patch(f"/v1/jobs/{job}", json={"priority": -1})
    assert "0 to 9, or urgent, standard, bulk" in refused.json()["errors"][0]["allowed"]
    assert api.patch(f"/v1/jobs/{job}", json={}).json()["errors"][0]["field"] == "body"
    for _ in range(2):  # the second time there is nothing to do
        cancelled = api.post(f"/v1/jobs/{job}/cancel")
        assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert cancelled.json()["counts"]["cancelled"] == 1
    assert cancelled.json()["progress"] == 1.0
    for verb in ("pause", "resume"):
        answer = api.post(f"/v1/jobs/{job}/{verb}")
        assert (answer.status_code, answer.json()["status"]) == (409, 409)
    assert api.get(f"/v1/jobs/{job}/frames/0").json()["status"] == "cancelled"
    assert api.get(f"/v1/jobs/{job}/frames/0/image").status_code == 410
    assert api.get(f"/v1/jobs/{job}/frames?status=queued").json()["frames"] == []


def test_events_are_numbered_and_read_after_one(api: TestClient) -> None:
    job = submitted(api)["id"]
    api.post(f"/v1/jobs/{job}/pause")
    api.post(f"/v1/jobs/{job}/cancel")
    with transaction() as db:
        events.relay(db)

    page = api.get(f"/v1/jobs/{job}/events").json()

    assert [(e["number"], e["kind"]) for e in page["events"]] == [
        (1, "job.accepted"), (2, "job.paused"), (3, "job.cancelled"),
    ]  # fmt: skip
    assert page["next"] == 3
    assert [e["number"] for e in api.get(f"/v1/jobs/{job}/events?after=2").json()["events"]] == [3]
    assert api.get(f"/v1/jobs/{job}/events?after=3").json() == {"events": [], "next": 3}


def test_jobs_come_in_pages_newest_first(api: TestClient) -> None:
    made = [submitted(api)["id"] for _ in range(5)]

    seen, before = [], ""
    for _ in range(3):
        page = api.get(f"/v1/jobs?limit=2{before}").json()
        seen += [j["id"] for j in page["jobs"]]
        before = f"&before={page['next']}"

    assert seen == sorted(made, reverse=True)
    assert page["next"] is None
    for bad in ("limit=0", "limit=201", "limit=x", "before=job_x", "before=%00", f"limit={'9' * 5000}"):
        answer = api.get(f"/v1/jobs?{bad}")
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["field"] == bad.partition("=")[0]


def test_frames_come_in_pages(api: TestClient) -> None:
    job = submitted(api, {**RED, "count": 5})["id"]

    first = api.get(f"/v1/jobs/{job}/frames?limit=3").json()
    second = api.get(f"/v1/jobs/{job}/frames?limit=3&first={first['next']}").json()

    assert [f["index"] for f in first["frames"] + second["frames"]] == [0, 1, 2, 3, 4]
    assert second["next"] is None
    assert api.get(f"/v1/jobs/{job}/frames?limit=5").json()["next"] is None
    assert api.get(f"/v1/jobs/{job}/frames?status=done").json() == {"frames": [], "next": None}
    assert api.get(f"/v1/jobs/{job}/frames?first=7").json() == {"frames": [], "next": None}
    assert api.get(f"/v1/jobs/{job}/frames/5").status_code == 404
    for bad in (f"first={2**24}", "first=-1", "limit=1001", "status=odd"):
        assert api.get(f"/v1/jobs/{job}/frames?{bad}").json()["errors"][0]["field"] == bad.partition("=")[0]
    for index in (2**24, 2**200, -1):
        assert api.get(f"/v1/jobs/{job}/frames/{index}").status_code == 422


# ------------------------------------------------------------------------------------------------ images


def test_an_image_comes_as_it_is_stored(api: TestClient) -> None:
    job = submitted(api, {**RED, "count": 2})["id"]
    early = api.get(f"/v1/jobs/{job}/frames/0/image")
    assert (early.status_code, early.json()["type"]) == (409, "urn:farm:conflict")
    stored = settled(claimed())

    answer = api.get(f"/v1/jobs/{job}/frames/1/image")

    assert (answer.status_code, answer.content) == (200, stored[1])
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["etag"] == f'"{hashlib.sha256(stored[1]).hexdigest()}"'
    assert "private" in answer.headers["cache-control"]
    for known in (answer.headers["etag"], f'"x", W/{answer.headers["etag"]}', "*"):
        again = api.get(f"/v1/jobs/{job}/frames/1/image", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
    frame = api.get(f"/v1/jobs/{job}/frames/1").json()
    assert (frame["status"], frame["cost"], frame["progress"]) == ("done", "0.00025", 1.0)
    assert frame["image"] == {
        "url": f"http://testserver/v1/jobs/{job}/frames/1/image",
        "sha256": hashlib.sha256(stored[1]).hexdigest(),
        "bytes": len(stored[1]),
        "width": 64,
        "height": 64,
        "content_type": "image/png",
    }
    done = api.get(f"/v1/jobs/{job}").json()
    assert (done["status"], done["progress"], done["charged"], done["held"]) == (
        "finished",
        1.0,
        "0.0005",
        "0",
    )


def test_a_frame_that_failed_has_no_image_for_ever(api: TestClient) -> None:
    job = submitted(api)["id"]
    for _ in range(3):
        pack = claimed()
        with transaction() as db:
            queue.fail(db, pack.id, "it makes no picture")

    answer = api.get(f"/v1/jobs/{job}/frames/0/image")

    assert (answer.status_code, answer.json()["reason"]) == (410, "it makes no picture")
    frame = api.get(f"/v1/jobs/{job}/frames/0").json()
    assert (frame["status"], frame["attempts"], frame["reason"]) == ("failed", 3, "it makes no picture")


def test_other_bytes_than_were_stored_are_never_shown(api: TestClient, store_url: str) -> None:
    job = submitted(api)["id"]
    settled(claimed())
    [file] = Path(urlsplit(store_url).path).glob("v1/*/*.png")
    file.write_bytes(b"other bytes")

    answer = api.get(f"/v1/jobs/{job}/frames/0/image")

    assert (answer.status_code, answer.json()["type"]) == (503, "urn:farm:damaged")
    file.unlink()
    assert api.get(f"/v1/jobs/{job}/frames/0/image").json()["type"] == "urn:farm:gone"


def test_a_job_has_a_contact_sheet(api: TestClient) -> None:
    job = submitted(api, {**RED, "count": 9})["id"]
    settled(claimed())

    answer = api.get(f"/v1/jobs/{job}/sheet")

    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    with Image.open(io.BytesIO(answer.content)) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 4 * 240


# ------------------------------------------------------------------------------------------------ usage


def test_usage_says_what_was_charged(api: TestClient, keys: dict[str, str]) -> None:
    job = submitted(api, {**RED, "count": 2})["id"]
    settled(claimed())

    usage = api.get("/v1/usage").json()

    assert usage["totals"] == {"USD": "0.0005"}
    assert usage["lines"] == [
        {
            "model": "starter", "method": "mpx_step", "currency": "USD", "rate": "0.0032",
            "frames": 2, "quantity": 2 * 64 * 64 * 20, "amount": "0.0005",
        }
    ]  # fmt: skip
    assert api.get(f"/v1/usage?job={job}&since=2020-01-01").json()["totals"] == {"USD": "0.0005"}
    assert api.get("/v1/usage?until=2020-01-01T00:00:00Z").json()["totals"] == {}
    assert api.get("/v1/usage", headers=as_(keys["umbrella"])).json()["lines"] == []
    for bad in (
        "since=yesterday",
        "until=0001-01-01T00:00:00%2B23:00",
        "until=0001-01-01T00:00:00Z",
        "since=%00",
    ):
        assert api.get(f"/v1/usage?{bad}").json()["errors"][0]["field"] == bad.partition("=")[0]
    with transaction() as db:
        assert ledger.audit(db) == []
    assert api.get("/v1/audit", headers=as_(keys["admin"])).json() == {"violations": [], "unseen": []}


def test_models_say_their_limits_and_price(api: TestClient) -> None:
    models = {m["name"]: m for m in api.get("/v1/models").json()["models"]}

    assert set(models) == set(catalog())
    assert models["starter"]["side"] == {"min": 64, "max": 128, "multiple": 8, "default": 64}
    assert models["starter"]["price"] == {"method": "mpx_step", "rate": "0.0032", "currency": "USD"}


# ------------------------------------------------------------------------------------------------ steps


def test_steps_of_frames_on_a_device_count_as_progress(api: TestClient) -> None:
    job = submitted(api, {**RED, "count": 4})
    settled_later = claimed()
    progress: Progress = api.app.state.progress  # type: ignore[attr-defined]
    message = {
        "pack": settled_later.id,
        "step": 10,
        "of": 20,
        "frames": [[f.job_id.hex, f.index] for f in settled_later.frames],
    }

    for _ in range(300):  # the subscriber may have been a moment late
        with RedisClient.from_url(settings().broker_url.get_secret_value()) as redis:
            redis.publish(tokens.PROGRESS, json.dumps(message))
        if (now := api.get(job["urls"]["self"]).json())["progress"]:
            break

    assert (now["status"], now["progress"], now["counts"]["running"]) == ("running", 0.5, 4)
    assert api.get(f"{job['urls']['frames']}/2").json()["progress"] == 0.5
    progress.take(b"nonsense")
    progress.take(json.dumps({**message, "of": 0}))
    progress.take(json.dumps({**message, "pack": settled_later.id + 1}))  # of a pack that is not theirs
    assert api.get(job["urls"]["self"]).json()["progress"] == 0.0
    settled(settled_later)
    assert api.get(job["urls"]["self"]).json()["progress"] == 1.0


# ------------------------------------------------------------------------------------------------ away


def test_a_dead_database_is_answered_with_503_at_once(
    api: TestClient, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_DATABASE_URL", "postgresql://postgres@127.0.0.1:1/x")
    settings.cache_clear()

    answer = api.post("/v1/jobs", json={"spec": RED})

    assert (answer.status_code, answer.json()["type"]) == (503, "urn:farm:database-away")
    assert answer.headers["Retry-After"] == "5"
    assert answer.elapsed.total_seconds() < 5
    assert "127.0.0.1" not in answer.text
    assert api.get("/health/live").status_code == 200
    ready = api.get("/health/ready")
    assert (ready.status_code, ready.json()["database"]) == (503, "away")
    metrics = api.get("/metrics")
    assert metrics.status_code == 200
    assert "farm_database_up 0.0" in metrics.text


def test_a_database_that_closed_its_connections_is_found_again(api: TestClient, database: str) -> None:
    submitted(api)
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"  # and waits until it is gone
            " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )

    first, second = (api.post("/v1/jobs", json={"spec": RED}).status_code for _ in range(2))

    assert (first in (202, 503), second) == (True, 202)


def test_a_dead_redis_delays_no_job(keys: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_BROKER_URL", "redis://127.0.0.1:1/0")
    settings.cache_clear()
    with TestClient(create_app(), headers=as_(keys["acme"])) as api:
        answer = api.post("/v1/jobs", json={"spec": RED})

        assert answer.status_code == 202
        assert answer.elapsed.total_seconds() < 2
        ready = api.get("/health/ready")
        assert (ready.status_code, ready.json()["redis"]) == (200, "away")


def test_the_api_is_ready_when_its_database_is_migrated(api: TestClient, database: str) -> None:
    assert api.get("/health/ready").json()["database"] == "up"
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("UPDATE alembic_version SET version_num = 'of the next release'")
        assert api.get("/health/ready").status_code == 200
        admin.execute("DROP TABLE alembic_version")
    ready = api.get("/health/ready")
    assert (ready.status_code, ready.json()["database"]) == (503, "not migrated")


def test_what_nobody_thought_of_is_500_and_says_nothing(
    api: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the secret of the house")

    monkeypatch.setattr("farm.jobs.find", broken)

    answer = api.get(f"/v1/jobs/job_{uuid4().hex[:-6]}000000")

    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["request"] == answer.headers["X-Request-Id"]
    assert f"request {answer.json()['request']}" in caplog.text


def test_an_unknown_path_is_a_problem_too(api: TestClient) -> None:
    for path in ("/nowhere", "/v1/jobs/", "/v1/%00", "/v1/jobs/job_%ed%a0%80", "/v1/jobs/%f0%9f%92%a9"):
        answer = api.get(path)

        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
        assert answer.json()["type"] == "urn:farm:not-found"


def test_an_unknown_method_is_a_problem_too(api: TestClient) -> None:
    answer = api.delete("/v1/jobs")

    assert (answer.status_code, answer.json()["type"]) == (405, "urn:farm:method-not-allowed")
    assert "POST" in answer.headers["allow"] or "GET" in answer.headers["allow"]


def test_a_strange_host_header_breaks_nothing(api: TestClient) -> None:
    for host in ("[::1", "a b", "\x7f", ""):
        assert api.post("/v1/jobs", json={"spec": RED}, headers={"Host": host}).status_code < 500


# ------------------------------------------------------------------------------------------------ metrics


def test_metrics_tell_queue_packs_and_workers_without_a_key(api: TestClient) -> None:
    submitted(api, {**RED, "count": 11}, priority=9)
    submitted(api, {**RED, "count": 2}, priority=1)
    paused = submitted(api, {**RED, "count": 5}, priority=1)["id"]
    api.post(f"/v1/jobs/{paused}/pause")
    api.post("/v1/jobs", json={"specs": [{**RED, "count": 3}, {**RED, "model": "sd15"}], "priority": 2})
    settled(claimed())
    claimed(1)
    for _ in range(2):  # the second adds nothing
        sweep.tidy()
    with transaction() as db:
        db.execute(
            text(
                "INSERT INTO workers (id, pool, models, device, state) VALUES"
                " ('w1', 'starter', '{starter}', 'cpu', 'up'),"
                " ('w2', 'starter', '{starter}', 'cpu', 'draining')"
            )
        )
    del api.headers["Authorization"]

    lines = api.get("/metrics").text.splitlines()

    for line in (
        'farm_queue_frames{model="starter",priority="9"} 2.0',
        'farm_queue_frames{model="starter",priority="1"} 2.0',
        'farm_queue_frames{model="starter",priority="2"} 3.0',
        'farm_queue_frames{model="sd15",priority="2"} 1.0',
        "farm_packs_open 1.0",
        'farm_packs{outcome="settled"} 1.0',
        'farm_images_total{model="starter"} 8.0',
        "farm_frames_failed_total 0.0",
        'farm_workers{pool="starter",state="up"} 1.0',
        'farm_workers{pool="starter",state="draining"} 1.0',
        "farm_database_up 1.0",
        'farm_http_requests_total{method="POST",route="/v1/jobs",status="202"} 4.0',
    ):
        assert line in lines
    assert any(
        line.startswith('farm_queue_oldest_wait_seconds{model="starter",priority="1"}') for line in lines
    )
    assert not any("acme" in line for line in lines)


def test_workers_show_the_packs_in_hand(api: TestClient, keys: dict[str, str]) -> None:
    submitted(api, {**RED, "count": 2}, priority=7)
    with transaction() as db:
        db.execute(
            text(
                "INSERT INTO workers (id, pool, models, device, state)"
                " VALUES ('w1', 'starter', '{starter}', 'cpu', 'up')"
            )
        )
    pack = claimed()

    [worker] = api.get("/v1/workers", headers=as_(keys["admin"])).json()["workers"]

    assert (worker["id"], worker["pool"], worker["state"]) == ("w1", "starter", "up")
    assert [(p["id"], p["model"], p["priority"], p["frames"]) for p in worker["packs"]] == [
        (str(pack.id), "starter", 7, 2)
    ]


def test_an_admin_drains_a_worker_and_takes_it_back(api: TestClient, keys: dict[str, str]) -> None:
    with transaction() as db:
        db.execute(
            text(
                "INSERT INTO workers (id, pool, models, device, state)"
                " VALUES ('w1@host', 'starter', '{starter}', 'cpu', 'up'),"
                " ('w2@host', 'starter', '{starter}', 'cpu', 'gone')"
            )
        )

    def asked(worker: str, verb: str, who: str = "admin") -> tuple[int, str | None]:
        answer = api.post(f"/v1/workers/{worker}/{verb}", headers=as_(keys[who]))
        return answer.status_code, answer.json().get("state")

    assert asked("w1@host", "drain", "acme")[0] == 403
    assert asked("w9@host", "drain")[0] == 404
    assert [asked("w1@host", verb) for verb in ("drain", "drain", "undrain")] == [
        (200, "draining"), (200, "draining"), (200, "up"),
    ]  # fmt: skip
    assert asked("w2@host", "drain") == (200, "gone")


# ------------------------------------------------------------------------------------------------ OpenAPI


def test_openapi_describes_every_operation(api: TestClient) -> None:
    schema = api.get("/openapi.json").json()

    defined = schema["components"]["schemas"]
    for name in defined:
        Draft202012Validator.check_schema(defined[name])
    refs = set(_refs(schema))
    assert refs <= {f"#/components/schemas/{name}" for name in defined}
    seen = set()
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert operation["tags"]
            assert operation["description"]
            seen.add(operation["operationId"])
            if path.startswith("/v1/") and path not in OPEN:
                assert {"401", "503"} <= set(operation["responses"])
    assert len(seen) == sum(len(o) for o in schema["paths"].values())
    assert "HTTPValidationError" not in defined
    assert "api_key" in defined["NewKey"]["properties"]
    for example in schema["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"][
        "examples"
    ].values():
        assert api.post("/v1/jobs", json=example["value"]).status_code == 202


def _refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _refs(value)
    elif isinstance(node, list):
        for value in node:
            yield from _refs(value)


def test_as_many_threads_as_connections_serve_requests(api: TestClient) -> None:
    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(lambda _: api.get("/v1/jobs").status_code, range(200)))

    assert set(answers) == {200}
    assert engine().pool.checkedout() == 0  # type: ignore[attr-defined]
