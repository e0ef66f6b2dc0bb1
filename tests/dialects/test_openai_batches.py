"""OpenAI's files and batches through its own client, unmodified; and Replicate's files on the same path."""

import base64
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from openai.types import Batch
from PIL import Image
from sqlalchemy import text

from farm import accounts, files, pricing, sweep
from farm.api.app import create_app
from farm.catalog import catalog
from farm.db import transaction
from farm.settings import settings
from farm.storage import open_store
from tests.dialects.conftest import PATIENCE_S, RED, RunningFarm, pixels
from tests.factories import ask, one

pytestmark = pytest.mark.xdist_group("dialects")

ENDPOINT = "/v1/images/generations"


@pytest.fixture(scope="module")
def client(farm: RunningFarm) -> OpenAI:
    return OpenAI(base_url=f"{farm.url}/v1", api_key=farm.api_key, max_retries=0)


def line(name: str, **body: Any) -> dict[str, Any]:
    asked = {"prompt": RED, "num_inference_steps": 4, **body}
    return {"custom_id": name, "method": "POST", "url": ENDPOINT, "body": asked}


def jsonl(*lines: Any) -> bytes:
    return b"\n".join(json.dumps(one).encode() for one in lines)


def sent(client: OpenAI, *lines: Any) -> str:
    return client.files.create(file=("requests.jsonl", jsonl(*lines)), purpose="batch").id


def started(client: OpenAI, file: str) -> Batch:
    return client.batches.create(input_file_id=file, endpoint=ENDPOINT, completion_window="24h")


def ended(client: OpenAI, batch: str) -> Batch:
    deadline = time.monotonic() + PATIENCE_S
    while (found := client.batches.retrieve(batch)).status in ("in_progress", "cancelling"):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


def lines_of(client: OpenAI, file: str | None) -> dict[str, Any]:
    assert file
    content = client.files.content(file).text
    return {said["custom_id"]: said for said in map(json.loads, content.splitlines())}


# ------------------------------------------------------------------------------------------------ files


def test_a_file_is_kept_listed_read_and_deleted(farm: RunningFarm, client: OpenAI) -> None:
    data = jsonl(line("a"))
    file = client.files.create(file=("my requests.jsonl", data), purpose="batch")

    assert (file.object, file.bytes, file.filename) == ("file", len(data), "my requests.jsonl")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == data
    assert file.id in [f.id for f in client.files.list(purpose="batch")]
    stranger = OpenAI(base_url=f"{farm.url}/v1", api_key=farm.stranger_key, max_retries=0)
    for look in (stranger.files.retrieve, stranger.files.content, stranger.files.delete):
        with pytest.raises(openai.NotFoundError):
            look(file.id)
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError, match="was deleted"):
        client.files.retrieve(file.id)
    with pytest.raises(openai.AuthenticationError) as unknown:
        OpenAI(base_url=f"{farm.url}/v1", api_key="x", max_retries=0).files.retrieve(file.id)
    assert unknown.value.type == "authentication_error"


def test_a_file_needs_a_purpose_there_is(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="allowed are batch") as refused:
        client.files.create(file=b"{}", purpose="nonsense")  # type: ignore[arg-type]

    assert refused.value.param == "purpose"


def test_replicates_file_is_an_input_by_its_url(farm: RunningFarm) -> None:
    start = farm.native(RED, seed=1, steps=4)[0]
    made = farm.api.post(
        "/v1/files", files={"content": ("start.png", start, "image/png")}, data={"metadata": '{"a": 1}'}
    )
    file = made.json()

    assert made.status_code == 201
    assert (file["size"], file["metadata"], file["name"]) == (len(start), {"a": 1}, "start.png")
    assert farm.api.get(file["urls"]["get"]).json() == file
    native = farm.native(RED, image=file["urls"]["get"], seed=2, steps=4)
    inline = f"data:image/png;base64,{base64.b64encode(start).decode()}"
    assert native == farm.native(RED, image=inline, seed=2, steps=4)
    stranger = farm.client(farm.stranger_key).post(
        "/v1/jobs", json={"spec": {"prompt": RED, "image": file["urls"]["get"]}}
    )
    assert stranger.status_code == 422


# ------------------------------------------------------------------------------------------------ batches


def test_a_batch_renders_its_lines_and_names_what_was_not(farm: RunningFarm, client: OpenAI) -> None:
    file = sent(
        client,
        line("two", n=2, seed=11),
        line("inline", seed=21, response_format="b64_json"),
        line("large", size="1024x1024"),
        line("unknown", model="nothing"),
        line("helped", prompt="a red circle", prompt_enhancement=True, seed=3),
    )
    batch = started(client, file)
    batch = ended(client, batch.id)

    assert batch.status == "completed"
    assert batch.request_counts
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (5, 3, 2)
    made = lines_of(client, batch.output_file_id)
    assert list(made) == ["two", "inline", "helped"]
    two = made["two"]["response"]["body"]["data"]
    native = farm.native(RED, seed=11, count=2, steps=4)
    assert [httpx.get(image["url"]).content for image in two] == native
    inline = base64.b64decode(made["inline"]["response"]["body"]["data"][0]["b64_json"])
    assert pixels(inline) == pixels(farm.native(RED, seed=21, steps=4)[0])
    helped = made["helped"]["response"]["body"]["data"][0]
    assert helped["revised_prompt"] == "a red circle on a white background"
    wrong = lines_of(client, batch.error_file_id)
    assert wrong["large"]["response"]["status_code"] == 400
    assert wrong["large"]["response"]["body"]["error"]["param"] == "size"
    assert wrong["unknown"]["response"]["body"]["error"]["code"] == "model_not_found"
    assert batch.id in [b.id for b in client.batches.list(limit=5)]
    output = client.files.retrieve(str(batch.output_file_id))
    assert output.purpose == "batch_output"


def test_a_batch_is_its_accounts_alone(farm: RunningFarm, client: OpenAI) -> None:
    batch = ended(client, started(client, sent(client, line("a", seed=1))).id)
    stranger = OpenAI(base_url=f"{farm.url}/v1", api_key=farm.stranger_key, max_retries=0)

    for look in (stranger.batches.retrieve, stranger.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            look(batch.id)
    with pytest.raises(openai.NotFoundError):
        stranger.files.content(str(batch.output_file_id))
    with pytest.raises(openai.NotFoundError):
        started(stranger, batch.input_file_id)
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_a_file_that_is_none_of_requests_fails_as_a_whole(farm: RunningFarm, client: OpenAI) -> None:
    before = len(farm.jobs())
    good = line("a")
    batch = started(
        client,
        sent(
            client, good, good, {**line("b"), "url": "/v1/chat/completions"}, {**line("c"), "extra": 1}, [1]
        ),
    )

    assert batch.status == "failed"
    assert batch.errors
    assert [e.line for e in batch.errors.data or []] == [2, 3, 4, 5]
    assert "earlier line" in str((batch.errors.data or [])[0].message)
    assert len(farm.jobs()) == before


@pytest.mark.parametrize(
    ("more", "param"),
    [({"endpoint": "/v1/embeddings"}, "endpoint"), ({"completion_window": "1y"}, "completion_window")],
)
def test_what_is_not_served_is_refused(client: OpenAI, more: dict[str, Any], param: str) -> None:
    asked = {"endpoint": ENDPOINT, "completion_window": "24h", **more}
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.create(input_file_id=sent(client, line("a")), **asked)

    assert refused.value.param == param


# ------------------------------------------------------------------------------------------------ in time


@pytest.fixture
def unmanned(database: str) -> Iterator[TestClient]:
    """An API whose models nobody renders."""
    with transaction() as db:
        pricing.sync(db, catalog())
        key = accounts.issue_key(db, accounts.create(db, "acme"))[1]
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        yield client


def batch_of(api: TestClient, *lines: Any, headers: dict[str, str] | None = None) -> dict[str, Any]:
    file = api.post("/v1/files", files={"file": ("a.jsonl", jsonl(*lines))}, data={"purpose": "batch"}).json()
    body = {"input_file_id": file["id"], "endpoint": ENDPOINT, "completion_window": "24h"}
    answer = api.post("/v1/batches", json=body, headers=headers or {})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_what_is_cancelled_is_not_rendered(unmanned: TestClient) -> None:
    batch = batch_of(unmanned, line("a"), line("b"))

    cancelled = unmanned.post(f"/v1/batches/{batch['id']}/cancel").json()
    sweep.tidy()
    after = unmanned.get(f"/v1/batches/{batch['id']}").json()

    assert cancelled["status"] == after["status"] == "cancelled"
    assert after["request_counts"] == {"total": 2, "completed": 0, "failed": 2}
    assert after["output_file_id"] is None
    errors = unmanned.get(f"/v1/files/{after['error_file_id']}/content").text.splitlines()
    assert [json.loads(e)["response"]["status_code"] for e in errors] == [500, 500]


def test_what_is_not_done_in_time_expires(unmanned: TestClient) -> None:
    batch = batch_of(unmanned, line("a"))
    ask("UPDATE jobs SET deadline = clock_timestamp() - interval '1 s'")

    for _ in range(3):
        sweep.tidy()

    after = unmanned.get(f"/v1/batches/{batch['id']}").json()
    assert after["status"] == "expired"
    assert after["request_counts"]["failed"] == 1


def test_a_batch_is_bulk_in_as_few_jobs_as_its_frames_allow(
    unmanned: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_MAX_COUNT", "5")
    settings.cache_clear()

    batch_of(unmanned, *(line(f"n{k}", n=2) for k in range(5)))

    rows = ask("SELECT frames, priority, deadline IS NOT NULL AS timed FROM jobs ORDER BY id")
    assert [tuple(r) for r in rows] == [(4, 1, True), (4, 1, True), (2, 1, True)]


def test_a_batch_under_an_idempotency_key_is_made_once(unmanned: TestClient) -> None:
    file = unmanned.post(
        "/v1/files", files={"file": ("a.jsonl", jsonl(line("a")))}, data={"purpose": "batch"}
    ).json()
    body = {"input_file_id": file["id"], "endpoint": ENDPOINT, "completion_window": "24h"}
    headers = {"Idempotency-Key": "one"}

    first, second = (unmanned.post("/v1/batches", json=body, headers=headers) for _ in range(2))

    assert first.json()["id"] == second.json()["id"]
    assert second.headers["Idempotent-Replayed"] == "true"
    assert one("SELECT count(*) FROM batches") == one("SELECT count(*) FROM jobs") == 1


def test_a_file_under_an_idempotency_key_is_kept_once(unmanned: TestClient) -> None:
    def send(data: bytes) -> httpx.Response:
        return unmanned.post(
            "/v1/files",
            files={"file": ("a.jsonl", data)},
            data={"purpose": "batch"},
            headers={"Idempotency-Key": "one"},
        )  # type: ignore[return-value]

    first, second, other = send(b"{}"), send(b"{}"), send(b"[]")

    assert first.json() == second.json()
    assert other.status_code == 400
    assert len(unmanned.get("/v1/files").json()["data"]) == 1


def test_an_account_keeps_so_many_bytes_of_files(
    unmanned: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_MAX_FILES_BYTES", "10")
    settings.cache_clear()

    answer = unmanned.post("/v1/files", files={"file": ("a", b"x" * 11)}, data={"purpose": "batch"})

    assert answer.status_code == 413
    assert "may take 10" in answer.json()["error"]["message"]


def test_old_and_deleted_files_leave_the_store(unmanned: TestClient) -> None:
    kept, deleted, old = (
        unmanned.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "batch"}).json()["id"]
        for _ in range(3)
    )
    unmanned.delete(f"/v1/files/{deleted}")
    with transaction() as db:
        db.execute(
            text("UPDATE files SET created_at = now() - interval '31 days' WHERE id = :id"),
            {"id": files.parse(old)},
        )

    sweep.tidy()

    store = open_store(settings().storage_url.get_secret_value())
    left = [s.key.rsplit("/", 1)[1] for s in store.list("files/")]
    assert left == [files.parse(kept).hex]
    assert [f["id"] for f in unmanned.get("/v1/files").json()["data"]] == [kept]


def test_lines_may_start_from_inputs_of_the_account(unmanned: TestClient) -> None:
    out = io.BytesIO()

    Image.new("RGB", (64, 64), "red").save(out, "PNG")
    made = unmanned.post("/v1/inputs", content=out.getvalue(), headers={"Content-Type": "image/png"}).json()

    batch = batch_of(
        unmanned,
        line("a", image=made["id"]),
        line("b", image="https://127.0.0.1/x.png"),
        line("c", image="inp_" + "0" * 32),
    )

    assert batch["request_counts"] == {"total": 3, "completed": 0, "failed": 2}
    spec = one("SELECT spec->>'image' FROM frames")
    assert spec == f"sha256:{made['sha256']}"
