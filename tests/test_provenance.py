"""Provenance: what made an image, in the file and at the API; and the same image once more."""

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from farm import accounts, cli, ids, pricing
from farm.accounts import Role
from farm.answers import Provenance
from farm.api.app import create_app
from farm.catalog import catalog
from farm.cli.frames import _is_same, _verdict
from farm.db import engine, transaction
from farm.settings import settings
from farm.storage import image_key, open_store
from farm.storage.local import LocalStore
from tests.factories import ask, one, violations
from workers.encode import read_metadata, versions
from workers.gpu import limit_threads
from workers.run import Worker

RED = {"prompt": "a red circle on a blue background", "steps": 2, "seed": 11}

Render = Callable[[], None]


@pytest.fixture
def keys(database: str) -> dict[str, str]:
    """The keys of an account, of its admin, and of another account."""
    with transaction() as db:
        pricing.sync(db, catalog())
        acme, other = accounts.create(db, "acme"), accounts.create(db, "other")
        return {
            "acme": accounts.issue_key(db, acme)[1],
            "reader": accounts.issue_key(db, acme, role=Role.READ)[1],
            "admin": accounts.issue_key(db, acme, role=Role.ADMIN)[1],
            "other": accounts.issue_key(db, other)[1],
        }


@pytest.fixture
def api(keys: dict[str, str]) -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {keys['acme']}"
        yield client
    assert violations() == []


@pytest.fixture
def render(keys: dict[str, str]) -> Render:
    """Let a worker with the starter model render what is queued."""
    limit_threads()
    worker = Worker("w", pool="starter", models=catalog().pool("starter"), device="cpu")

    def burst() -> None:
        worker.burst(lambda _report: None)

    return burst


def submitted(api: TestClient, **spec: Any) -> str:
    answer = api.post("/v1/jobs", json={"spec": {**RED, **spec}})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def frame_of(api: TestClient, job: str) -> dict[str, Any]:
    return dict(api.get(f"/v1/jobs/{job}/frames/0").json())


def provenance(api: TestClient, frame: str) -> dict[str, Any]:
    answer = api.get(f"/v1/frames/{frame}/provenance")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def as_(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_frames_provenance_says_what_made_it_and_the_file_says_the_same(
    api: TestClient, render: Render
) -> None:
    # given
    job = submitted(api)
    render()
    frame = frame_of(api, job)

    # when
    told = provenance(api, frame["id"])

    # then
    model = catalog()["starter"]
    assert (told["model"], told["revision"], told["dtype"]) == ("starter", model.revision, model.dtype)
    assert (told["seed"], told["seed_given"], told["reused"], told["loras"]) == (11, True, False, [])
    assert told["versions"] == dict(versions())
    assert set(told["versions"]) == {"farm", "diffusers", "torch"}
    assert told["sha256"] == frame["image"]["sha256"]
    assert told["spec"]["prompt"] == RED["prompt"]
    assert told["rerender"] is None
    inside = read_metadata(api.get(f"/v1/jobs/{job}/frames/0/image").content)
    assert (inside["seed"], inside["sampler"], inside["revision"]) == ("11", "dpm++2m", model.revision)
    assert all(f"{k} {v}" in inside["engine"] for k, v in told["versions"].items())
    assert "prompt" not in inside
    assert not any(job[4:] in v or frame["id"][4:] in v for v in inside.values())
    assert api.get(f"/v1/jobs/{job}/frames/0/provenance").json() == told


def test_the_same_frame_once_more_is_the_same_image_and_is_charged_as_rendered(
    api: TestClient, render: Render
) -> None:
    # given
    job = submitted(api)
    render()
    frame = frame_of(api, job)

    # when
    answer = api.post(f"/v1/frames/{frame['id']}/rerender", headers={"Idempotency-Key": "k"})
    repeated = api.post(f"/v1/frames/{frame['id']}/rerender", headers={"Idempotency-Key": "k"})

    # then
    assert (answer.status_code, repeated.json()["id"]) == (202, answer.json()["id"])
    again = answer.json()["id"]
    assert provenance(api, frame_of(api, again)["id"])["rerender"] is None  # not yet done
    render()
    made = frame_of(api, again)
    assert (made["status"], made["reused"], made["cost"]) == ("done", False, frame["cost"])
    assert provenance(api, made["id"])["rerender"] == {
        "of": frame["id"],
        "same_pixels": True,
        "same_file": True,
        "largest_difference": 0,
        "pixels_differing": 0,
        "versions": [],
    }


def test_a_rerender_by_other_versions_says_which_and_whether_pixels_differ(
    api: TestClient, render: Render
) -> None:
    # given an image of an older torch, whose pixels were others
    job = submitted(api)
    render()
    frame = frame_of(api, job)["id"]
    ask("UPDATE packs SET engine = engine || jsonb_build_object('torch', '1.0')")
    ask(
        "UPDATE images SET sha256 = sha256('old'), pixel_sha256 = sha256('old pixels'),"
        " key = replace(key, encode(sha256, 'hex'), encode(sha256('old'), 'hex'))"
    )

    # when
    again = api.post(f"/v1/frames/{frame}/rerender").json()["id"]
    render()

    # then
    assert provenance(api, frame_of(api, again)["id"])["rerender"] == {
        "of": frame,
        "same_pixels": False,
        "same_file": False,
        "largest_difference": None,  # of the first there is no file
        "pixels_differing": None,
        "versions": [{"name": "torch", "before": "1.0", "now": versions()["torch"]}],
    }


@pytest.fixture
def told_apart(
    api: TestClient, render: Render, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int, int], dict[str, Any]]:
    """Render a frame again whose first image had so many pixels that many levels off; what its provenance says."""

    def repeat(pixels: int, levels: int) -> dict[str, Any]:
        job = submitted(api)
        render()
        frame, picture = frame_of(api, job)["id"], api.get(f"/v1/jobs/{job}/frames/0/image").content
        image = Image.open(BytesIO(picture)).convert("RGB")
        for x in range(pixels):
            red, green, blue = image.getpixel((x, 1))  # type: ignore[misc]
            image.putpixel((x, 1), (red, green, blue + levels if blue < 128 else blue - levels))
        file = BytesIO()
        image.save(file, "PNG")
        digest = hashlib.sha256(file.getvalue())
        (row,) = ask("SELECT id, account_id FROM images")
        key = image_key(row.account_id, digest.digest(), "png")
        open_store(store_url).put(key, file.getvalue(), content_type="image/png")
        ask(
            "UPDATE images SET sha256 = :sha256, pixel_sha256 = sha256('others'), key = :key WHERE id = :id",
            sha256=digest.digest(), key=key, id=row.id,
        )  # fmt: skip
        again = api.post(f"/v1/frames/{frame}/rerender").json()["id"]
        render()
        return provenance(api, frame_of(api, again)["id"])

    return repeat


@pytest.mark.parametrize(
    ("pixels", "levels", "said", "same"),
    [(3, 1, "the same picture as", True), (2, 2, "OTHER PIXELS than", False)],
)
def test_a_rerender_says_how_far_its_pixels_are_from_the_first(
    told_apart: Callable[[int, int], dict[str, Any]], pixels: int, levels: int, said: str, same: bool
) -> None:
    told = told_apart(pixels, levels)

    again = told["rerender"]
    assert (again["same_pixels"], again["same_file"]) == (False, False)
    assert (again["pixels_differing"], again["largest_difference"]) == (pixels, levels)
    found = Provenance.model_validate(told)
    assert _verdict(found).startswith(f"{said} {again['of']}")
    assert found.rerender is not None
    assert _is_same(found.rerender) is same


def test_images_are_compared_without_a_connection_and_only_if_their_pixels_differ(
    told_apart: Callable[[int, int], dict[str, Any]], api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    held: list[int] = []
    get = LocalStore.get

    def watched(store: LocalStore, key: str) -> bytes:
        held.append(engine().pool.checkedout())  # type: ignore[attr-defined]
        return get(store, key)

    # when
    told = told_apart(1, 1)
    monkeypatch.setattr(LocalStore, "get", watched)
    assert provenance(api, told["frame"]) == told
    assert provenance(api, told["rerender"]["of"])["rerender"] is None

    # then
    assert held == [0, 0]


def test_a_reused_image_tells_what_made_it_and_is_marked(api: TestClient, render: Render) -> None:
    # given
    first = submitted(api)
    render()

    # when
    second = api.post("/v1/jobs", json={"spec": RED}).json()

    # then
    assert (second["status"], second["charged"]) == ("finished", "0")
    frame = frame_of(api, second["id"])
    assert (frame["status"], frame["reused"], frame["cost"]) == ("done", True, "0")
    told = provenance(api, frame["id"])
    assert (told["reused"], told["versions"]) == (True, dict(versions()))
    assert told["sha256"] == frame_of(api, first)["image"]["sha256"]
    assert api.post("/v1/jobs", json={"spec": RED, "reuse": False}).json()["status"] == "queued"


def test_the_prompt_is_in_the_file_where_the_account_wants_it(
    api: TestClient, render: Render, keys: dict[str, str]
) -> None:
    # given
    changed = api.patch(
        "/v1/accounts/acme", json={"prompt_in_images": True}, headers=as_(keys["admin"])
    ).json()
    assert (changed["prompt_in_images"], changed["retention_days"]) == (True, None)

    # when
    job = submitted(api, format="webp")
    render()

    # then
    inside = read_metadata(api.get(f"/v1/jobs/{job}/frames/0/image").content)
    assert inside["prompt"] == RED["prompt"]


def test_what_is_not_there_or_somebody_elses_is_not_found(
    api: TestClient, render: Render, keys: dict[str, str]
) -> None:
    # given
    job = submitted(api)
    frame = frame_of(api, job)["id"]

    # then
    for method, path in (
        ("GET", f"/v1/frames/{frame}/provenance"),
        ("GET", f"/v1/jobs/{job}/frames/0/provenance"),
        ("POST", f"/v1/frames/{frame}/rerender"),
    ):
        assert api.request(method, path, headers=as_(keys["other"])).status_code == 404
        assert api.request(method, path.replace(job, ids.public("job", ids.new_id(0))).replace(
            frame, ids.public("frm", ids.new_id(0)))).status_code == 404  # fmt: skip
    assert api.post(f"/v1/frames/{frame}/rerender", headers=as_(keys["reader"])).status_code == 403


def test_a_frame_without_an_image_or_of_a_model_that_changed_is_not_rendered_again(
    api: TestClient, render: Render
) -> None:
    # given
    job = submitted(api)
    frame = frame_of(api, job)["id"]

    # then
    told = provenance(api, frame)
    assert (told["status"], told["revision"], told["versions"], told["sha256"]) == ("queued", None, {}, None)
    early = api.post(f"/v1/frames/{frame}/rerender")
    assert (early.status_code, "no image to compare with" in early.json()["detail"]) == (409, True)
    render()
    ask("UPDATE frames SET fingerprint = sha256('another revision')")
    late = api.post(f"/v1/frames/{frame}/rerender")
    assert (late.status_code, "does not serve starter any more as it was" in late.json()["detail"]) == (
        409,
        True,
    )
    assert one("SELECT count(*) FROM jobs") == 1


# ------------------------------------------------------------------------------------------------ farm …


@pytest.fixture
def url(keys: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A farm that listens, which `farm` talks to as acme."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(), log_config=None))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        there = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv("FARM_URL", there)
        monkeypatch.setenv("FARM_API_KEY", keys["acme"])
        yield there
        server.should_exit = True
        thread.join()


def farm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    """`farm` as a shell runs it: its exit code, and what it printed."""
    settings.cache_clear()
    monkeypatch.setattr("sys.argv", ["farm", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), capsys.readouterr().out


def test_farm_rerender_says_that_it_is_the_same_and_farm_provenance_what_made_it(
    url: str, render: Render, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    assert farm(capsys, monkeypatch, "submit", "a red circle", "--steps", "2", "--seed", "4")[0] == 0
    render()
    name = one("SELECT id FROM jobs")
    over = threading.Event()

    def rendering() -> None:
        while not over.wait(0.05):
            render()

    worker = threading.Thread(target=rendering)
    worker.start()

    # when
    try:
        code, said = farm(capsys, monkeypatch, "rerender", "last/0")
    finally:
        over.set()
        worker.join()

    # then
    frame = ids.public("frm", ids.frame_id(name, 0))
    assert (code, f"the same pixels as {frame}, the same file" in said) == (0, True)
    code, told = farm(capsys, monkeypatch, "provenance", frame, "--json")
    assert (code, json.loads(told)["versions"]) == (0, dict(versions()))
    again = farm(capsys, monkeypatch, "provenance", "last/0")[1]
    assert "the same pixels" in again
    assert farm(capsys, monkeypatch, "submit", "a red circle", "--steps", "2", "--seed", "4")[0] == 0
    frames = json.loads(farm(capsys, monkeypatch, "frames", "last", "--json")[1])
    assert [(f["status"], f["reused"]) for f in frames] == [("done", True)]
    farm(capsys, monkeypatch, "submit", "a red circle", "--steps", "2", "--seed", "4", "--no-reuse")
    frames = json.loads(farm(capsys, monkeypatch, "frames", "last", "--json")[1])
    assert [f["status"] for f in frames] == ["queued"]
    assert farm(capsys, monkeypatch, "rerender", "last/x")[0] == 2
