"""Bulk uploads over HTTP: at once, bit by bit, cut, repeated, and sent twice at the same time."""

import base64
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from farm import accounts, pricing, sweep
from farm.accounts import Role
from farm.api.app import create_app
from farm.catalog import catalog
from farm.db import transaction
from farm.settings import settings
from tests.factories import ask, one, violations
from tests.pages import serving

NDJSON = {"Content-Type": "application/x-ndjson"}
CSV = {"Content-Type": "text/csv"}
NOTHING = (
    "SELECT (SELECT count(*) FROM jobs) + (SELECT count(*) FROM frames) + (SELECT count(*) FROM frame_names)"
)


@pytest.fixture
def keys(database: str) -> dict[str, str]:
    """API keys of two accounts: acme may submit and read, umbrella may submit."""
    with transaction() as db:
        pricing.sync(db, catalog())
        acme, umbrella = accounts.create(db, "acme"), accounts.create(db, "umbrella")
        return {
            "acme": accounts.issue_key(db, acme)[1],
            "reader": accounts.issue_key(db, acme, role=Role.READ)[1],
            "umbrella": accounts.issue_key(db, umbrella)[1],
        }


@pytest.fixture
def api(keys: dict[str, str]) -> Iterator[TestClient]:
    """The API, called with acme's key; the books are right when the test is over."""
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {keys['acme']}"
        yield client
    assert violations() == []


def as_(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def lines(first: int, count: int, **more: Any) -> bytes:
    said = ({"custom_id": f"sku-{n}", "prompt": f"picture {n}", **more} for n in range(first, first + count))
    return b"".join(json.dumps(line).encode() + b"\n" for line in said)


def created(api: TestClient, **facts: Any) -> str:
    answer = api.post("/v1/bulk", json=facts)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def append(api: TestClient, upload: str, data: bytes, offset: int, *, finish: bool = False) -> httpx.Response:
    url = f"/v1/bulk/{upload}?offset={offset}" + ("&finish=true" if finish else "")
    return api.patch(url, content=data, headers=NDJSON)


def names() -> list[str]:
    return [r.custom_id for r in ask("SELECT custom_id FROM frame_names ORDER BY job_id, index")]


def errors(api: TestClient, upload: str) -> list[dict[str, Any]]:
    answer = api.get(f"/v1/bulk/{upload}/errors")
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


# ------------------------------------------------------------------------------------------------ at once


def test_a_file_sent_at_once_is_a_job_with_its_names(api: TestClient) -> None:
    url = "/v1/bulk?name=spring&priority=urgent&steps=5&width=128"

    answer = api.post(url, content=lines(0, 3).rstrip(b"\n"), headers=NDJSON)

    assert answer.status_code == 202, answer.text
    upload = answer.json()
    assert (upload["status"], upload["good"], upload["bad"], upload["lines"]) == ("accepted", 3, 0, 3)
    job = api.get(upload["urls"]["job"]).json()
    assert (job["status"], job["frames"], job["priority"], job["name"]) == ("queued", 3, 9, "spring")
    frames = api.get(job["urls"]["frames"]).json()["frames"]
    assert [
        (f["custom_id"], f["spec"]["prompt"], f["spec"]["steps"], f["spec"]["width"]) for f in frames
    ] == [(f"sku-{n}", f"picture {n}", 5, 128) for n in range(3)]
    assert answer.headers["Location"] == upload["urls"]["self"]
    assert api.get(answer.headers["Location"]).json()["job"] == job["id"]
    assert [r.kind for r in ask("SELECT kind FROM outbox")] == ["job.accepted"]


def test_one_bad_line_refuses_the_file_and_nothing_of_it_stays(api: TestClient) -> None:
    bad = (
        lines(0, 2)
        + b'{"custom_id": "x", "prompt": "a", "width": 65}\n{"prompt": "a"}\nnonsense\n'
        + lines(2, 2)
    )

    answer = api.post("/v1/bulk", content=bad, headers=NDJSON)

    assert answer.status_code == 422
    problem = answer.json()
    assert problem["type"] == "urn:farm:lines-refused"
    assert [e["field"] for e in problem["errors"]] == [
        "lines[3].width",
        "lines[4].custom_id",
        "lines[5].line",
    ]
    listed = errors(api, problem["upload"])
    assert [(e["line"], e["custom_id"], e["field"], e["value"]) for e in listed] == [
        (3, "x", "width", 65), (4, None, "custom_id", None), (5, None, "line", None),
    ]  # fmt: skip
    assert listed[0]["allowed"] == "allowed are multiples of 8 from 64 to 128"
    sweep.tidy()
    assert one(NOTHING) == 0
    assert one("SELECT coalesce(sum(held), 0) + coalesce(sum(open_frames), 0) FROM tallies") == 0


def test_the_good_lines_are_taken_where_that_is_asked_for(api: TestClient) -> None:
    data = lines(0, 2) + b'{"custom_id": "sku-1", "prompt": "again"}\n' + lines(2, 1) + b"[]\n"

    answer = api.post("/v1/bulk?mode=accept_good", content=data, headers=NDJSON)

    upload = answer.json()
    assert (answer.status_code, upload["good"], upload["bad"]) == (202, 3, 2)
    assert names() == ["sku-0", "sku-1", "sku-2"]
    assert [(e["line"], e["field"]) for e in errors(api, upload["id"])] == [(3, "custom_id"), (5, "line")]


def test_a_name_that_comes_again_in_a_later_part_is_an_error_of_that_line(api: TestClient) -> None:
    upload = created(api, mode="accept_good")
    first = append(api, upload, lines(0, 3), 0).json()["received"]

    answer = append(api, upload, lines(2, 3), first, finish=True)

    assert (answer.status_code, answer.json()["good"], answer.json()["bad"]) == (202, 5, 1)
    assert names() == [f"sku-{n}" for n in range(5)]
    assert [(e["line"], e["value"]) for e in errors(api, upload)] == [(4, "sku-2")]


# ------------------------------------------------------------------------------------------------ bit by bit


def test_an_upload_goes_on_from_its_offset_wherever_it_was_cut(api: TestClient) -> None:
    data, upload = lines(0, 50), created(api)
    offset = 0
    for cut in (17, 1000, 1001, 1999, len(data)):
        answer = append(api, upload, data[offset:cut], offset)
        assert answer.status_code == 200, answer.text
        offset = answer.json()["received"]
        assert offset == data.rfind(b"\n", 0, cut) + 1
        assert api.get("/v1/jobs").json()["jobs"] == []

    answer = api.post(f"/v1/bulk/{upload}/finish")

    assert answer.status_code == 202
    assert names() == [f"sku-{n}" for n in range(50)]
    again = api.post(f"/v1/bulk/{upload}/finish")
    assert (again.status_code, again.json()["job"]) == (202, answer.json()["job"])
    assert append(api, upload, b"", len(data)).status_code == 409


def test_who_sends_from_another_offset_is_told_where_the_upload_is(api: TestClient) -> None:
    data, upload = lines(0, 5), created(api)
    append(api, upload, data, 0)

    for offset in (0, 7, len(data) + 1):
        answer = append(api, upload, data, offset)
        assert (answer.status_code, answer.json()["offset"]) == (409, len(data))

    assert api.get(f"/v1/bulk/{upload}").json()["good"] == 5


def test_the_same_part_sent_twice_at_once_is_there_once(api: TestClient) -> None:
    data, upload = lines(0, 4000), created(api)

    with ThreadPoolExecutor(4) as senders:
        answers = list(senders.map(lambda _: append(api, upload, data, 0), range(4)))

    assert sorted(a.status_code for a in answers) == [200, 409, 409, 409]
    assert {a.json()["offset"] for a in answers if a.status_code == 409} <= {len(data), 0}
    api.post(f"/v1/bulk/{upload}/finish")
    assert names() == [f"sku-{n}" for n in range(4000)]


# ------------------------------------------------------------------------------------------------ under a key


def test_a_file_sent_again_under_its_key_is_the_same_job(api: TestClient) -> None:
    once = {**NDJSON, "Idempotency-Key": "order 1"}
    first = api.post("/v1/bulk", content=lines(0, 9), headers=once)
    again = api.post("/v1/bulk", content=lines(0, 9), headers=once)

    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["job"] == again.json()["job"]
    assert again.headers["Idempotent-Replayed"] == "true"
    for other in (lines(0, 8), lines(0, 10), lines(1, 9)):
        answer = api.post("/v1/bulk", content=other, headers=once)
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "Idempotency-Key")
    assert api.post("/v1/bulk?name=x", content=lines(0, 9), headers=once).status_code == 422
    assert api.post("/v1/jobs", json={"spec": {"prompt": "a"}}, headers=once).status_code == 422
    assert api.get(f"/v1/bulk/{first.json()['id']}").json()["status"] == "accepted"
    assert one("SELECT count(*) FROM frames") == 9


def test_a_file_that_was_cut_goes_on_under_its_key(api: TestClient) -> None:
    once, data = {"Idempotency-Key": "order 2"}, lines(0, 20)
    upload = api.post("/v1/bulk", json={}, headers=once).json()["id"]
    append(api, upload, data[:700], 0)
    append(api, upload, data[api.get(f"/v1/bulk/{upload}").json()["received"] : 1000], 682)

    answer = api.post("/v1/bulk", content=data, headers={**NDJSON, **once})

    assert (answer.status_code, answer.json()["id"]) == (202, upload)
    assert names() == [f"sku-{n}" for n in range(20)]


def test_another_file_under_the_key_of_one_that_was_cut_leaves_that_alone(api: TestClient) -> None:
    once, data = {"Idempotency-Key": "order 4"}, lines(0, 20)
    upload = api.post("/v1/bulk", json={}, headers=once).json()["id"]
    append(api, upload, data[:700], 0)

    for other in (lines(5, 20), data[:200]):
        answer = api.post("/v1/bulk", content=other, headers={**NDJSON, **once})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "Idempotency-Key")

    assert api.post("/v1/bulk", content=data, headers={**NDJSON, **once}).json()["good"] == 20


def test_a_key_that_a_job_took_meanwhile_is_said_when_the_upload_ends(api: TestClient) -> None:
    once = {"Idempotency-Key": "order 5"}
    upload = api.post("/v1/bulk", json={}, headers=once).json()["id"]
    append(api, upload, lines(0, 2), 0)
    assert api.post("/v1/jobs", json={"spec": {"prompt": "a"}}, headers=once).status_code == 202

    assert api.post(f"/v1/bulk/{upload}/finish").status_code == 422
    assert (
        api.post("/v1/bulk", content=lines(0, 2), headers={**NDJSON, "Idempotency-Key": "new"}).status_code
        == 202
    )


def test_a_refused_file_comes_again_corrected_under_its_key(api: TestClient) -> None:
    once = {**NDJSON, "Idempotency-Key": "order 3"}
    assert api.post("/v1/bulk", content=b'{"custom_id": "a"}\n', headers=once).status_code == 422

    assert api.post("/v1/bulk", content=lines(0, 2), headers=once).status_code == 202


# ------------------------------------------------------------------------------------------------ whose


def test_another_accounts_upload_is_not_there(api: TestClient, keys: dict[str, str]) -> None:
    upload = created(api)
    append(api, upload, lines(0, 2), 0)

    for method, path in (
        ("GET", ""), ("DELETE", ""), ("GET", "/errors"), ("POST", "/finish"), ("PATCH", "?offset=0"),
    ):  # fmt: skip
        answer = api.request(method, f"/v1/bulk/{upload}{path}", headers=as_(keys["umbrella"]))
        assert (method, path, answer.status_code) == (method, path, 404)
    assert api.get("/v1/bulk", headers=as_(keys["umbrella"])).json()["uploads"] == []
    assert api.post("/v1/bulk", json={}, headers=as_(keys["reader"])).status_code == 403
    job = upload.replace("blk_", "job_")
    for path in (f"/v1/jobs/{job}", f"/v1/jobs/{job}/frames", f"/v1/frames/frm_{job[4:-1]}1"):
        assert api.get(path).status_code == 404  # not even its own, until it is accepted
    assert api.post(f"/v1/jobs/{job}/cancel").status_code == 404


def test_a_discarded_upload_leaves_nothing(api: TestClient) -> None:
    upload = created(api)
    append(api, upload, lines(0, 30), 0)

    assert api.delete(f"/v1/bulk/{upload}").status_code == 204
    sweep.tidy()

    assert one(NOTHING) == 0
    assert api.get(f"/v1/bulk/{upload}").json()["status"] == "discarded"
    assert api.post(f"/v1/bulk/{upload}/finish").status_code == 409


def test_an_upload_nobody_goes_on_with_is_discarded(api: TestClient) -> None:
    upload = created(api)
    append(api, upload, lines(0, 3), 0)
    ask("UPDATE bulk_uploads SET touched_at = now() - make_interval(secs => :s)", s=settings().bulk_s + 60)

    sweep.tidy()
    sweep.tidy()

    assert api.get(f"/v1/bulk/{upload}").json()["status"] == "discarded"
    assert one(NOTHING) == 0


# ------------------------------------------------------------------------------------------------ bad requests


@pytest.mark.parametrize(
    ("url", "field"),
    [
        ("/v1/bulk?stepz=3", "stepz"),
        ("/v1/bulk?proof=none", "proof"),
        ("/v1/bulk?mode=maybe", "mode"),
        ("/v1/bulk?width=wide", "spec.width"),
        ("/v1/bulk?priority=now", "priority"),
        ("/v1/bulk?matrix=1", "matrix"),
    ],
)
def test_a_query_that_says_nothing_we_know_is_refused_by_name(api: TestClient, url: str, field: str) -> None:
    answer = api.post(url, content=lines(0, 1), headers=NDJSON)

    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)
    assert one(NOTHING) == 0


def test_lines_name_images_by_url_and_each_is_fetched_once(
    api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_ALLOWED_PRIVATE_HOSTS", "127.0.0.1")
    settings.cache_clear()
    photo = BytesIO()
    Image.new("RGB", (64, 64), "navy").save(photo, "PNG")
    data = photo.getvalue()
    in_line = "data:image/png;base64," + base64.b64encode(data).decode()
    with serving({"/a.png": data, "/none.png": (404, {}, b"")}) as url:
        said = [
            *({"custom_id": f"same {n}", "prompt": "a", "image": f"{url}/a.png"} for n in range(3)),
            {"custom_id": "gone", "prompt": "a", "image": f"{url}/none.png"},
            {"custom_id": "inside", "prompt": "a", "image": "https://10.0.0.1/a.png"},
            {"custom_id": "in line", "prompt": "a", "image": in_line},
            {"custom_id": "two", "prompt": "a", "image": f"{url}/a.png", "mask": f"{url}/none.png"},
            {"custom_id": "plain", "prompt": "a"},
        ]
        body = b"".join(json.dumps(line).encode() + b"\n" for line in said)
        upload = created(api, mode="accept_good")
        cut = body.index(b'{"custom_id": "same 2"')
        append(api, upload, body[:cut], 0)
        ended = append(api, upload, body[cut:], cut, finish=True)

    assert (ended.status_code, ended.json()["good"], ended.json()["bad"]) == (202, 5, 3)
    assert names() == ["same 0", "same 1", "same 2", "in line", "plain"]
    wrong = [(e["line"], e["custom_id"], e["field"]) for e in errors(api, upload)]
    assert wrong == [(4, "gone", "image"), (5, "inside", "image"), (7, "two", "mask")]
    digest = hashlib.sha256(data).hexdigest()
    assert one("SELECT string_agg(DISTINCT spec ->> 'image', ' ') FROM frames") == f"sha256:{digest}"
    assert one("SELECT count(*) FROM inputs") == 1


def test_another_content_type_is_refused(api: TestClient) -> None:
    answer = api.post("/v1/bulk", content=b"x", headers={"Content-Type": "application/pdf"})

    assert answer.json()["errors"][0]["field"] == "Content-Type"


def test_a_file_without_a_good_line_is_refused(api: TestClient) -> None:
    for data in (b"", b"\n\n", b"[]\n"):
        answer = api.post("/v1/bulk?mode=accept_good", content=data, headers=NDJSON)
        assert answer.status_code == 422


def test_a_line_without_an_end_is_refused(api: TestClient) -> None:
    answer = api.post("/v1/bulk", content=b"x" * (3 << 20), headers=NDJSON)

    assert (answer.status_code, answer.json()["type"]) == (413, "urn:farm:too-large")


# ------------------------------------------------------------------------------------------------ matrices


def test_a_matrix_is_shown_first_and_then_a_job(api: TestClient) -> None:
    matrix = {
        "prompt": ["a (red, blue) circle", "a square"],
        "size": ["64x64", "128x64"],
        "seed": [1, 2],
        "steps": 4,
    }

    preview = api.post("/v1/bulk/preview?limit=3", json={"matrix": matrix}).json()
    answer = api.post("/v1/bulk", json={"matrix": matrix, "name": "grid"}, headers={"Idempotency-Key": "m"})

    assert (preview["count"], preview["prompts"], preview["combinations"], preview["seeds"]) == (12, 3, 2, 2)
    assert [(s["spec"]["prompt"], s["spec"]["width"], s["seed"]) for s in preview["specs"]] == [
        ("a red circle", 64, 1), ("a red circle", 64, 2), ("a red circle", 128, 1),
    ]  # fmt: skip
    assert answer.status_code == 202, answer.text
    job = api.get(answer.json()["urls"]["job"]).json()
    assert (job["frames"], job["quoted"], job["name"]) == (12, preview["quoted"], "grid")
    frames = api.get(job["urls"]["frames"]).json()["frames"]
    assert [f["spec"] | {"seed": f["seed"]} for f in frames[:3]] == [
        s["spec"] | {"seed": s["seed"]} for s in preview["specs"]
    ]
    again = api.post("/v1/bulk", json={"matrix": matrix, "name": "grid"}, headers={"Idempotency-Key": "m"})
    assert again.json()["job"] == job["id"]


def test_a_bad_matrix_is_refused_by_axis(api: TestClient) -> None:
    for matrix, field in (
        ({"prompt": []}, "matrix.prompt"),
        ({"prompt": ["a", 3]}, "matrix.prompt[1]"),
        ({"prompt": "a", "size": ["64"]}, "matrix.size[0]"),
        ({"prompt": "a", "size": "64x64", "width": 64}, "matrix.size"),
        ({"prompt": "a", "stepz": 3}, "matrix.stepz"),
        ({"prompt": "a", "steps": [4, 0]}, "matrix.steps"),
        ({"prompt": "a", "model": ["starter", "x"]}, "matrix.model"),
        ({"prompt": "a", "seed": [-1]}, "matrix.seed[0]"),
        ({"prompt": "a", "count": 10**9}, "matrix.count"),
        ({"prompt": "a" + "(1,2,3,4,5,6,7,8,9,0)" * 9}, "matrix.prompt"),
    ):
        for url in ("/v1/bulk/preview", "/v1/bulk"):
            answer = api.post(url, json={"matrix": matrix})
            assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field), answer.text
    assert one(NOTHING) == 0
