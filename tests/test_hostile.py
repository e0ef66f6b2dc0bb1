"""Callers who mean no good: another account's ids, URLs that lead inside, images made to hurt; and kills."""

import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from farm import accounts, catalog, ids, pricing
from farm.accounts import Role
from farm.api.app import create_app
from farm.client import Farm
from farm.db import transaction
from farm.errors import FarmError
from farm.settings import settings
from tests.factories import ask, must_claim, one, settle

RED = {"prompt": "a red circle", "seed": 1}


@pytest.fixture
def keys(database: str) -> dict[str, str]:
    with transaction() as db:
        pricing.sync(db, catalog.catalog())
        acme, umbrella = accounts.create(db, "acme"), accounts.create(db, "umbrella")
        return {
            "acme": accounts.issue_key(db, acme)[1],
            "umbrella": accounts.issue_key(db, umbrella)[1],
            "admin": accounts.issue_key(db, umbrella, role=Role.ADMIN)[1],
        }


@pytest.fixture
def api(keys: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """The API, called with acme's key."""
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {keys['acme']}"
        yield client


def picture(width: int = 64, height: int = 64, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


# ------------------------------------------------------------------------------------------------ another's ids


@dataclass(frozen=True)
class Theirs:
    """One thing of another account, by its id; unknown: such an id that nobody has."""

    id: str
    unknown: str


def unknown(shown: str) -> str:
    """An id like this one that nobody has."""
    if re.fullmatch("[0-9a-f-]{36}", shown):
        return str(uuid.UUID(int=ids.new_id(1).int))
    prefix, middle, rest = shown.rpartition("_") if "_" in shown else ("", "", shown)
    if shown.startswith(("file-", "batch-")):
        prefix, middle, rest = shown.partition("-")
    if re.fullmatch("[0-9a-f]{32}", rest):
        return prefix + middle + ids.new_id(1).hex
    return prefix + middle + "".join("a" if c != "a" else "b" for c in rest)


def made(api: TestClient, key: str) -> dict[str, Theirs]:
    """One of everything that has an id, of the account with this key; by what OpenAPI calls its id."""
    who = {"Authorization": f"Bearer {key}"}

    def post(path: str, **request: Any) -> Any:
        answer = api.post(path, headers={**who, **request.pop("headers", {})}, **request)
        assert answer.is_success, (path, answer.text)
        return answer.json()

    job = post("/v1/jobs", json={"spec": RED})
    settle(must_claim(models=("starter",), frames=1))
    upload = post(
        "/v1/bulk",
        content=b'{"custom_id": "a", "prompt": "a red circle"}\n',
        headers={"Content-Type": "application/x-ndjson"},
    )
    webhook = post("/v1/webhooks", json={"url": "http://127.0.0.1:9/hook"})
    line = {
        "custom_id": "1",
        "method": "POST",
        "url": "/v1/images/generations",
        "body": {"prompt": "a circle"},
    }
    file = post(
        "/v1/files", files={"file": ("a.jsonl", json.dumps(line).encode())}, data={"purpose": "batch"}
    )
    batch = post(
        "/v1/batches",
        json={"input_file_id": file["id"], "endpoint": "/v1/images/generations", "completion_window": "24h"},
    )
    found = {
        "job": job["id"],
        "frame": "frm_" + job["id"][4:-1] + "1",
        "upload": upload["id"],
        "webhook": webhook["id"],
        "input_id": post("/v1/inputs", content=picture(), headers={"Content-Type": "image/png"})["id"],
        "file": file["id"],
        "token": file["id"],
        "batch": batch["id"],
        "prediction": post("/v1/predictions", json={"version": "starter", "input": {"prompt": "a circle"}})[
            "id"
        ],
        "prompt_id": post("/prompt", json={"prompt": WORKFLOW})["prompt_id"],
        "job_id": post("/generate", json={"prompt": "a circle"})["job_id"],
        "request_id": post("/farm/starter", json={"prompt": "a circle"})["request_id"],
    }
    return {name: Theirs(shown, unknown(shown)) for name, shown in found.items()}


WORKFLOW = {
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 7, "steps": 4, "cfg": 7, "sampler_name": "euler", "scheduler": "normal", "denoise": 1,
        "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "starter"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red circle", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "a", "images": ["8", 0]}},
}  # fmt: skip

# what stands in a path beside the id, and is nobody's own
BESIDE = {"index": "0", "delivery": "1", "app": "starter"}
NOBODYS = {
    "model",
    "model_id",
    "engine",
    "owner",
    "name",
    "version",
    "node_class",
    "folder",
    "month",
    "key",
    "worker",
}
BODIES = {
    "PATCH /v1/jobs/{job}": {"priority": 1},
    "PATCH /v1/webhooks/{webhook}": {"disabled": True},
}
QUERIES = {"PATCH /v1/bulk/{upload}": "?offset=0"}
QUIET = {"GET /history/{prompt_id}": 200}  # as ComfyUI answers for what it does not know


def test_anothers_ids_answer_like_such_as_do_not_exist_on_every_route(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_ALLOWED_PRIVATE_HOSTS", "127.0.0.1")
    settings.cache_clear()
    with TestClient(create_app(), raise_server_exceptions=False) as api:
        theirs = made(api, keys["umbrella"])
        before = state()
        tried = set()
        for operation, path, names in with_ids(api.get("/openapi.json").json()):
            unmet = names - theirs.keys() - BESIDE.keys() - NOBODYS
            assert not unmet, f"{operation}: say what {unmet} are: add one of another account to made()"
            if not names & theirs.keys():
                continue
            tried.add(operation)
            answers = []
            for which in ("id", "unknown"):
                values = BESIDE | dict.fromkeys(NOBODYS, "starter")
                values |= {n: getattr(t, which) for n, t in theirs.items()}
                answer = api.request(
                    operation.split()[0],
                    path.format(**values) + QUERIES.get(operation, ""),
                    json=BODIES.get(operation),
                    headers={"Authorization": f"Bearer {keys['acme']}"},
                )
                answers.append((answer.status_code, told(answer, theirs)))
            assert answers[0] == answers[1], operation
            assert answers[0][0] == QUIET.get(operation, 404), (operation, answers[0])
    assert state() == before
    assert len(tried) > 40


def with_ids(schema: dict[str, Any]) -> Iterator[tuple[str, str, set[str]]]:
    """Operations whose path holds names, and the names."""
    for path, operations in schema["paths"].items():
        names = set(re.findall(r"{(\w+)}", path))
        for method in operations:
            if names:
                yield f"{method.upper()} {path}", path, names


def told(answer: httpx.Response, theirs: dict[str, Theirs]) -> str:
    """What an answer says, but for the ids in it and the request's own."""
    text = answer.text
    for thing in theirs.values():
        for shown in (thing.id, thing.unknown):
            text = text.replace(shown, "ID").replace(shown.partition("_")[2] or shown, "ID")
    return re.sub(r"\w*ID|\b\w*[0-9a-f]{12,}\w*", "", text)


def state() -> list[Any]:
    """What must not change when somebody else asks."""
    return [
        ask("SELECT id, status, priority FROM jobs ORDER BY id"),
        ask("SELECT id, deleted_at FROM inputs ORDER BY id"),
        ask("SELECT id, deleted_at FROM images ORDER BY id"),
        ask("SELECT count(*) FROM webhooks"),
    ]


def test_lists_and_queries_show_nothing_of_another_account(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_ALLOWED_PRIVATE_HOSTS", "127.0.0.1")
    settings.cache_clear()
    with TestClient(create_app(), raise_server_exceptions=False) as api:
        theirs = made(api, keys["umbrella"])
        looked = 0
        for path, operations in api.get("/openapi.json").json()["paths"].items():
            if "get" not in operations or "{" in path or not path.startswith(("/v1", "/history", "/queue")):
                continue
            answer = api.get(path, headers={"Authorization": f"Bearer {keys['acme']}"})
            looked += answer.status_code == 200
            for thing in theirs.values():
                assert thing.id not in answer.text, path
        for query in (f"/v1/usage?job={theirs['job'].id}", "/v1/usage/hourly?account=umbrella",
                      "/v1/statements?account=umbrella", "/v1/budget?account=umbrella"):  # fmt: skip
            assert api.get(query, headers={"Authorization": f"Bearer {keys['acme']}"}).status_code == 404
    assert looked > 12


# ------------------------------------------------------------------------------------------------ hostile URLs

INSIDE = (
    "https://127.0.0.1/", "https://localhost/", "https://10.0.0.1/", "https://192.168.1.1/", "https://172.16.0.1/",
    "https://169.254.169.254/latest/meta-data/", "https://[::1]/", "https://[::]/", "https://0.0.0.0/",
    "https://2130706433/", "https://0x7f000001/", "https://0177.0.0.1/", "https://127.1/",
    "https://[::ffff:127.0.0.1]/", "https://[::ffff:a9fe:a9fe]/", "https://[64:ff9b::a00:1]/",
    "https://[fd00:ec2::254]/", "https://[fe80::1]/", "https://100.100.100.200/", "https://168.63.129.16/",
    "https://user:secret@127.0.0.1/", "https://127.0.0.1:22/", "https://127.0.0.1:5432/", "http://127.0.0.1/",
    "file:///etc/passwd", "gopher://127.0.0.1:6379/_FLUSHALL", "ftp://127.0.0.1/", "https://",
    "https://127.0.0.1\\@example.com/", "//127.0.0.1/",
)  # fmt: skip


@pytest.mark.parametrize("url", INSIDE)
def test_no_url_leads_inside_neither_as_an_image_nor_as_a_webhook(api: TestClient, url: str) -> None:
    image = api.post("/v1/jobs", json={"spec": {**RED, "image": url}})
    webhook = api.post("/v1/webhooks", json={"url": url})
    callback = api.post("/v1/jobs", json={"spec": RED, "webhook": {"url": url}})

    for answer, field in ((image, "spec.image"), (webhook, "url"), (callback, "webhook.url")):
        assert answer.status_code == 422, (field, answer.text)
        assert [e["field"] for e in answer.json()["errors"]] == [field]
    assert one("SELECT count(*) FROM jobs") == 0
    assert one("SELECT count(*) FROM webhooks") == 0


# ------------------------------------------------------------------------------------------------ hostile images


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A small PNG that unpacks to width × height × 3 bytes."""
    squeezed, packer = [], zlib.compressobj(9)
    row = bytes(1 + 3 * width)
    squeezed += [packer.compress(row) for _ in range(height)]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = b"".join([*squeezed, packer.flush()])
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'


@contextmanager
def serving(folder: Path, *, port: int = 0) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The API as a process of its own, as `farm api` runs it."""
    port = port or free_port()
    code = "from farm.cli import main; main()"
    with (folder / "api.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "api"],
            env={**os.environ, "FARM_API_PORT": str(port)},
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not answers(url):
            assert process.poll() is None, (folder / "api.log").read_text()[-2000:]
            assert time.monotonic() < deadline
        yield process, url
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def answers(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health/live", timeout=1).status_code == 200
    return False


def test_images_that_could_hurt_are_refused_and_cost_no_memory(keys: dict[str, str], tmp_path: Path) -> None:
    whole = picture(512, 512)
    bad = {
        "100 megapixels": (bomb(10_000, 10_000), "image/png"),
        "very long rows": (bomb(60_000, 900), "image/png"),
        "cut": (whole[: len(whole) // 2], "image/png"),
        "only a head": (whole[:40], "image/png"),
        "called a JPEG": (whole, "image/jpeg"),
        "an SVG": (SVG, "image/svg+xml"),
        "an SVG called a PNG": (SVG, "image/png"),
        "a GIF": (b"GIF89a" + bytes(100), "image/gif"),
        "noise": (os.urandom(4096), "image/png"),
        "nothing": (b"", "image/png"),
    }
    with serving(tmp_path) as (process, url), httpx.Client(base_url=url, timeout=30) as client:
        client.headers["Authorization"] = f"Bearer {keys['acme']}"
        client.post("/v1/inputs", content=picture(), headers={"Content-Type": "image/png"}).raise_for_status()
        before = peak = psutil.Process(process.pid).memory_info().rss

        def send(name: str) -> None:
            nonlocal peak
            data, kind = bad[name]
            answer = client.post("/v1/inputs", content=data, headers={"Content-Type": kind})
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
            assert answer.status_code == 422, (name, answer.text)
            assert answer.json()["errors"][0]["field"] == "file"

        with ThreadPoolExecutor(4) as threads:  # four bombs at once too
            list(threads.map(send, [*bad, *(["100 megapixels"] * 8)]))
        assert client.get("/health/live").status_code == 200
    assert peak - before < 200 << 20
    assert one("SELECT count(*) FROM inputs") == 1


# ------------------------------------------------------------------------------------------------ killed


@pytest.mark.parametrize(("count", "kills"), [(200, 1), pytest.param(10_000, 4, marks=pytest.mark.slow)])
def test_an_api_killed_while_it_takes_jobs_takes_each_exactly_once(
    keys: dict[str, str], tmp_path: Path, count: int, kills: int
) -> None:
    port = free_port()
    farm = Farm(f"http://127.0.0.1:{port}", keys["acme"], patience_s=240, timeout_s=10)

    def submit(number: int) -> str:
        return farm.submit({**RED, "seed": number}, name=str(number), idempotency_key=f"order {number}").id

    with farm, ThreadPoolExecutor(16) as threads:
        sent = []
        for part in range(1, kills + 2):
            with serving(tmp_path, port=port) as (process, _):
                sent = sent or [threads.submit(submit, number) for number in range(count)]
                while one("SELECT count(*) FROM jobs") < part * count // (kills + 1):
                    time.sleep(0.02)
                if part <= kills:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                else:
                    found = [future.result() for future in sent]

    assert len(set(found)) == count
    assert one("SELECT count(*) FROM jobs") == one("SELECT count(DISTINCT name) FROM jobs") == count
    assert one("SELECT count(*) FROM frames") == one("SELECT count(*) FROM idempotency_keys") == count


def test_the_error_of_a_farm_that_stays_away_says_so(keys: dict[str, str]) -> None:
    with (
        Farm(f"http://127.0.0.1:{free_port()}", keys["acme"], patience_s=0.5) as farm,
        pytest.raises(FarmError),
    ):
        farm.submit(RED)
