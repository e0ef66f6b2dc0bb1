"""Input images: sent, named in specs, kept while jobs need them, refused where they could do harm."""

import base64
import hashlib
import io
import json
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from sqlalchemy.exc import IntegrityError

from farm import accounts, fetch, ids, inputs, intake, picture, pricing, queue
from farm.api.app import create_app
from farm.catalog import Method, catalog
from farm.db import transaction
from farm.errors import Gone, Invalid, NotFound
from farm.settings import settings
from farm.spec import Asked, quantity
from farm.storage import open_store
from farm.submissions import Submission
from tests.factories import ask, must_claim, one, settle
from tests.pages import serving

RED = {"prompt": "a red circle"}


@pytest.fixture
def keys(database: str) -> dict[str, str]:
    with transaction() as db:
        pricing.sync(db, catalog())
        return {name: accounts.issue_key(db, accounts.create(db, name))[1] for name in ("acme", "umbrella")}


@pytest.fixture
def api(keys: dict[str, str]) -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {keys['acme']}"
        yield client


def file(colour: str = "red", size: tuple[int, int] = (64, 64), form: str = "PNG", **more: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, form, **more)
    return out.getvalue()


def sent(api: TestClient, data: bytes | None = None, kind: str = "image/png") -> dict[str, Any]:
    answer = api.post("/v1/inputs", content=data or file(), headers={"Content-Type": kind})
    assert answer.status_code in (200, 201), answer.text
    return dict(answer.json())


def job(api: TestClient, **spec: Any) -> dict[str, Any]:
    answer = api.post("/v1/jobs", json={"spec": {**RED, **spec}})
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def refused(api: TestClient, status: int = 422, **spec: Any) -> dict[str, Any]:
    before = one("SELECT count(*) FROM jobs")
    answer = api.post("/v1/jobs", json={"spec": {**RED, **spec}})
    assert answer.status_code == status, answer.text
    assert one("SELECT count(*) FROM jobs") == before
    return dict(answer.json())


def spec_of(api: TestClient, made: dict[str, Any]) -> dict[str, Any]:
    return dict(api.get(made["urls"]["frames"]).json()["frames"][0]["spec"])


def in_store() -> list[str]:
    return [s.key for s in open_store(settings().storage_url.get_secret_value()).list("inputs/")]


# ------------------------------------------------------------------------------------------------ upload


def test_an_image_is_kept_once_and_shown_to_its_account_alone(api: TestClient, keys: dict[str, str]) -> None:
    data = file(size=(96, 64))

    first = api.post("/v1/inputs", content=data, headers={"Content-Type": "image/png"})
    again = api.post("/v1/inputs", files={"file": ("a.png", data, "image/png")})

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == {**again.json(), "used_at": first.json()["used_at"]}
    assert first.json()["sha256"] == hashlib.sha256(data).hexdigest()
    shown = (first.json()["width"], first.json()["height"], first.json()["bytes"], first.json()["jobs"])
    assert shown == (96, 64, len(data), 0)
    assert len(in_store()) == 1
    assert [i["id"] for i in api.get("/v1/inputs").json()["inputs"]] == [first.json()["id"]]
    path = f"/v1/inputs/{first.json()['id']}"
    assert api.get(path).status_code == 200
    other = {"Authorization": f"Bearer {keys['umbrella']}"}
    assert api.get(path, headers=other).status_code == 404
    assert api.delete(path, headers=other).status_code == 404
    assert api.get("/v1/inputs", headers=other).json()["inputs"] == []


def test_the_same_image_sent_twice_at_once_is_one_input(api: TestClient) -> None:
    data = file("teal")

    with ThreadPoolExecutor(4) as threads:
        found = {i["id"] for i in threads.map(lambda _: sent(api, data), range(4))}

    assert len(found) == 1
    assert one("SELECT count(*) FROM inputs WHERE stored_at IS NOT NULL") == 1


def test_a_phones_photo_counts_as_it_is_shown(api: TestClient) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter

    turned = sent(api, file(size=(80, 48), form="JPEG", exif=exif), "image/jpeg")

    assert (turned["width"], turned["height"]) == (48, 80)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *, body: bytes = b"") -> bytes:
    """A PNG that claims a size; its body is what it is."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(body or bytes((width + 7) // 8 + 1) * height, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def animated() -> bytes:
    out = io.BytesIO()
    first, second = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    first.save(out, "WEBP", save_all=True, append_images=[second])
    return out.getvalue()


def deep() -> bytes:
    out = io.BytesIO()
    Image.new("I;16", (8, 8)).save(out, "PNG")
    return out.getvalue()


HOSTILE: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "nothing": (lambda: b"", "image/png", "empty"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", "SVG"),
    "text": (lambda: b"hello", "image/png", "no image"),
    "gif": (lambda: file(form="GIF"), "image/gif", "allowed are PNG, JPEG and WebP"),
    "tiff": (lambda: file(form="TIFF"), "image/png", "allowed are PNG, JPEG and WebP"),
    "mislabelled": (lambda: file(form="JPEG"), "image/png", "image/jpeg"),
    "cut": (lambda: file(form="JPEG", size=(640, 640))[:-400], "image/jpeg", "damaged or cut"),
    "cut png": (lambda: file(size=(64, 64))[:-30], "image/png", "damaged or cut"),
    "51 megapixels": (lambda: png_of(7200, 7200), "image/png", "50 megapixels"),
    "bomb": (lambda: png_of(60_000, 60_000, body=bytes(9000)), "image/png", "50 megapixels"),
    "animated": (animated, "image/webp", "animated"),
    "16 bits": (deep, "image/png", "8 bits"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_could_do_harm_is_refused_and_nothing_is_stored(name: str, database: str) -> None:
    make, kind, why = HOSTILE[name]

    with pytest.raises(Invalid) as refusal:
        inputs.look_at(make(), kind, field="file")

    (fault,) = refusal.value.faults
    assert fault.field == "file"
    assert why in fault.allowed
    assert in_store() == []


def test_a_file_that_is_too_large_is_not_even_read(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_INPUT_BYTES", "1000")
    settings.cache_clear()

    big = api.post("/v1/inputs", content=b"x" * 200_000, headers={"Content-Type": "image/png"})
    larger = api.post("/v1/inputs", content=b"x" * 2000, headers={"Content-Type": "image/png"})

    assert (big.status_code, larger.status_code) == (413, 422)
    assert "1000 bytes" in larger.json()["errors"][0]["allowed"]


def test_what_the_decoder_may_take_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """49 megapixels are looked at; a child with less memory says so instead of dying."""
    assert picture.inspect(png_of(7000, 7000)).width == 7000

    program = "import sys,resource;sys.argv[0]='x';exec(open(%r).read().replace('1 << 30','64 << 20'))"
    real = picture.subprocess.run

    def small(command: list[str], **options: Any) -> Any:
        return real([command[0], "-I", "-c", program % command[-1]], **options)

    monkeypatch.setattr(picture.subprocess, "run", small)
    with pytest.raises(ValueError, match=r"memory|limits"):
        picture.inspect(file(size=(6000, 6000), form="JPEG"))


def test_a_form_without_a_file_says_so(api: TestClient) -> None:
    answer = api.post("/v1/inputs", files={"picture": ("a.png", file(), "image/png")})
    broken = api.post("/v1/inputs", content=b"x", headers={"Content-Type": "multipart/form-data"})

    assert answer.status_code == broken.status_code == 422
    assert answer.json()["errors"][0]["field"] == "file"


# ------------------------------------------------------------------------------------------------ in specs


def test_a_spec_names_an_input_in_four_ways_and_means_the_same(api: TestClient) -> None:
    data = file("olive")
    up = sent(api, data)
    names = [up["id"], f"sha256:{up['sha256']}", "data:image/png;base64," + base64.b64encode(data).decode()]

    specs = [spec_of(api, job(api, image=name, seed=1)) for name in names]

    assert specs[0] == specs[1] == specs[2]
    assert specs[0]["image"] == f"sha256:{up['sha256']}"
    assert specs[0]["strength"] == 0.8
    prints = ask("SELECT DISTINCT fingerprint FROM frames")
    assert len(prints) == 1


def test_what_is_not_asked_for_is_not_in_the_spec(api: TestClient) -> None:
    assert set(spec_of(api, job(api))) == {
        "model", "prompt", "negative_prompt", "width", "height", "steps", "guidance", "sampler", "format"
    }  # fmt: skip


def test_an_open_job_keeps_its_inputs_and_a_finished_one_does_not(api: TestClient) -> None:
    up = sent(api)
    made = job(api, image=up["id"], seed=1)
    ask("UPDATE inputs SET used_at = used_at - interval '40 days'")
    with transaction() as db:
        assert inputs.expire(db) == 0
    assert api.get(f"/v1/inputs/{up['id']}").json()["jobs"] == 1
    assert api.delete(f"/v1/inputs/{up['id']}").status_code == 409
    with pytest.raises(IntegrityError, match="open job"):  # whatever the code does
        ask("UPDATE inputs SET deleted_at = now()")

    settle(must_claim("w", models=("starter",), frames=8))
    assert api.get(made["urls"]["self"]).json()["status"] == "finished"
    with transaction() as db:
        assert inputs.expire(db) == 1
    assert inputs.purge() == 1

    assert in_store() == []
    assert api.get(f"/v1/inputs/{up['id']}").status_code == 410
    refused(api, 410, image=up["id"])
    assert api.post(f"/v1/frames/{_frame(api, made)}/rerender").status_code == 410
    assert sent(api)["id"] != up["id"]  # the same image again is another input
    assert api.post(f"/v1/frames/{_frame(api, made)}/rerender").status_code == 202


def _frame(api: TestClient, made: dict[str, Any]) -> str:
    return str(api.get(made["urls"]["frames"]).json()["frames"][0]["id"])


def test_an_input_is_not_removed_while_a_job_is_being_submitted_with_it(
    api: TestClient, keys: dict[str, str]
) -> None:
    up = sent(api)
    ask("UPDATE inputs SET used_at = used_at - interval '40 days'")
    with transaction() as db:
        caller = accounts.authenticate(db, keys["acme"])
    with transaction() as submitting:
        inputs.known(submitting, caller.account_id, [up["id"]])

        with transaction() as db:
            assert inputs.expire(db) == 0

    with transaction() as db:
        assert inputs.expire(db) == 1
    with transaction() as db, pytest.raises(Gone):
        inputs.known(db, caller.account_id, [up["id"]])


def test_a_file_that_never_arrived_is_no_input(keys: dict[str, str]) -> None:
    with transaction() as db:
        caller = accounts.authenticate(db, keys["acme"])
    ask(
        "INSERT INTO inputs (id, account_id, sha256, format, bytes, width, height) VALUES"
        " (:id, :account, sha256('x'), 'png', 1, 8, 8)",
        id=ids.new_id(1 << 40), account=caller.account_id,
    )  # fmt: skip
    with transaction() as db, pytest.raises(NotFound):
        inputs.known(db, caller.account_id, ["sha256:" + hashlib.sha256(b"x").hexdigest()])

    ask("UPDATE inputs SET used_at = used_at - interval '2 hours'")
    with transaction() as db:
        assert inputs.expire(db) == 1


def test_another_accounts_input_is_not_found(api: TestClient, keys: dict[str, str]) -> None:
    up = sent(api)
    api.headers["Authorization"] = f"Bearer {keys['umbrella']}"

    refused(api, 404, image=up["id"])
    refused(api, 404, image=f"sha256:{up['sha256']}")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "strength without an image": ({"strength": 0.5}, "spec.strength"),
    "mask without an image": ({"mask": "IMAGE"}, "spec.mask"),
    "no step left": ({"image": "IMAGE", "strength": 0.04}, "spec.strength"),
    "strength of 0": ({"image": "IMAGE", "strength": 0}, "spec.strength"),
    "strength of 2": ({"image": "IMAGE", "strength": 2}, "spec.strength"),
    "mask of another size": ({"image": "IMAGE", "mask": "SMALL"}, "spec.mask"),
    "no such net": ({"control": [{"net": "canny", "image": "IMAGE"}]}, "spec.control[0].net"),
    "control image of another size": ({"control": [{"net": "x", "image": "SMALL"}]}, "spec.control[0].image"),
    "starts after its end": (
        {"control": [{"net": "x", "image": "IMAGE", "start": 0.5, "end": 0.5}]}, "spec.control[0].end"
    ),
    "no such LoRA": ({"loras": [{"name": "inks"}]}, "spec.loras[0].name"),
    "a scale of 9": ({"loras": [{"name": "inks", "scale": 9}]}, "spec.loras[0].scale"),
    "too large a second pass": ({"upscale": {"factor": 3}}, "spec.upscale.factor"),
    "a factor of 1": ({"upscale": {"factor": 1}}, "spec.upscale.factor"),
    "hires off the grid": ({"hires": {"width": 100, "height": 96}}, "spec.hires.width"),
    "hires without a step": (
        {"hires": {"width": 96, "height": 96, "steps": 3, "strength": 0.3}}, "spec.hires.strength"
    ),
    "hires and upscale": ({"hires": {"width": 96, "height": 96}, "upscale": {}}, "spec.upscale"),
    "more layers than there are": ({"clip_skip": 4}, "spec.clip_skip"),
    "quality of a png": ({"quality": 90}, "spec.quality"),
    "quality of 101": ({"format": "jpeg", "quality": 101}, "spec.quality"),
    "nearly reproducible": ({"reproducible": "nearly"}, "spec.reproducible"),
    "a file": ({"image": "file:///etc/passwd"}, "spec.image"),
    "a path": ({"image": "/etc/passwd"}, "spec.image"),
    "broken base64": ({"image": "data:image/png;base64,!!!"}, "spec.image"),
    "svg inside": ({"image": "data:image/svg+xml,<svg/>"}, "spec.image"),
    "of a model that takes none": ({"model": "sdxl-turbo", "guidance": 0.0, "clip_skip": 1}, "spec.width"),
}  # fmt: skip


def test_every_fault_names_its_field_and_stores_no_job(api: TestClient) -> None:
    named = {"IMAGE": sent(api)["id"], "SMALL": sent(api, file(size=(32, 32)))["id"]}
    BAD.pop("of a model that takes none", None)

    for name, (spec, field) in BAD.items():
        written = json.loads(
            json.dumps(spec)
            .replace('"IMAGE"', f'"{named["IMAGE"]}"')
            .replace('"SMALL"', f'"{named["SMALL"]}"')
        )
        fields = [e["field"] for e in refused(api, **written)["errors"]]
        assert field in fields, (name, fields)


@pytest.mark.parametrize("steps", [1, 7, 20, 30, 93])
def test_the_strength_that_is_said_to_be_enough_is(api: TestClient, steps: int) -> None:
    [fault] = refused(api, steps=steps, hires={"width": 96, "height": 96, "strength": 0.001})["errors"]
    enough = float(fault["allowed"].split()[2])

    given = {**RED, "steps": steps, "hires": {"width": 96, "height": 96, "strength": enough}}

    assert api.post("/v1/jobs", json={"spec": given}).status_code == 202


def test_a_model_that_takes_no_inputs_says_so(api: TestClient) -> None:
    up = sent(api)

    said = refused(api, model="flux1-dev", image=up["id"], clip_skip=1, prompt_weights=True)

    assert {e["field"] for e in said["errors"]} == {"spec.clip_skip", "spec.prompt_weights"}
    assert all("flux1-dev takes no" in e["allowed"] for e in said["errors"])


def test_provenance_names_what_a_frame_was_started_from(api: TestClient) -> None:
    up = sent(api)
    made = job(api, image=up["id"])

    origin = api.get(f"/v1/frames/{_frame(api, made)}/provenance").json()

    assert (origin["inputs"], origin["loras"]) == ([f"sha256:{up['sha256']}"], [])


# ------------------------------------------------------------------------------------------------ what it costs


def test_a_job_costs_the_pixels_and_steps_that_run(api: TestClient) -> None:
    """docs/inputs.md says these figures: the starter costs 0.0032 a megapixel and step."""
    up = sent(api)
    rate, mpx = 0.0032, 1 << 20
    worked = {
        64 * 64 * 20: {},
        64 * 64 * 16: {"image": up["id"]},
        64 * 64 * 5: {"image": up["id"], "strength": 0.25},
        64 * 64 * 20 + 128 * 128 * 10: {"upscale": {"factor": 2}},
        64 * 64 * 20 + 96 * 128 * 3: {"hires": {"width": 96, "height": 128, "steps": 12, "strength": 0.25}},
        64 * 64 * 10 + 128 * 128 * 4: {
            "image": up["id"], "strength": 0.5, "upscale": {"steps": 8, "strength": 0.5}
        },
    }  # fmt: skip

    for units, spec in worked.items():
        made = job(api, seed=1, **spec)
        assert float(made["quoted"]) == pytest.approx(units * rate / mpx)
        quote = api.post("/v1/quotes", json={"spec": {**RED, "seed": 1, **spec}}).json()
        assert quote["lines"][0]["quantity"] == units
    claimed = [f for _ in worked if (p := must_claim("w", models=("starter",), frames=8)) for f in p.frames]
    assert sorted(quantity(f.spec, Method.MPX_STEP) for f in claimed) == sorted(worked)
    assert all(f.work == 2 * quantity(f.spec, Method.MPX_STEP) for f in claimed)


# ------------------------------------------------------------------------------------------------ by URL


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch, database: str) -> None:
    monkeypatch.setenv("FARM_ALLOWED_PRIVATE_HOSTS", "127.0.0.1, pictures.example")
    monkeypatch.setenv("FARM_FETCH_S", "2")
    settings.cache_clear()


def test_an_image_is_fetched_from_a_host_that_is_allowed(trusting: None, api: TestClient) -> None:
    data = file("navy")
    pages = {"/a.png": data, "/there": (302, {"Location": "/a.png"}, b"")}
    with serving(pages) as url:
        made = job(api, image=f"{url}/there")

    assert spec_of(api, made)["image"] == f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_nothing_is_fetched_again_for_a_job_that_was_accepted(trusting: None, api: TestClient) -> None:
    headers = {"Idempotency-Key": "k"}
    with serving({"/a.png": file()}) as url:
        body = {"spec": {**RED, "image": f"{url}/a.png"}}
        first = api.post("/v1/jobs", json=body, headers=headers)

    again = api.post("/v1/jobs", json=body, headers=headers)  # the server has gone

    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]


def slow(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    threading.Event().wait(4)


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "image/png")
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(bytes(1 << 20))
    except OSError:
        handler.close_connection = True


PAGES: dict[str, tuple[Any, str]] = {
    "/404": ((404, {}, b""), "answers 404"),
    "/inside": ((302, {"Location": "http://169.254.169.254/latest/meta-data"}, b""), "https"),
    "/inside-https": ((302, {"Location": "https://[::ffff:10.0.0.1]/"}, b""), "public Internet"),
    "/decimal": ((307, {"Location": "https://2130706433:1/"}, b""), "public Internet"),
    "/file": ((302, {"Location": "file:///etc/passwd"}, b""), "https"),
    "/round": ((302, {"Location": "/round"}, b""), "more than 3 times"),
    "/squeezed": ((200, {"Content-Encoding": "gzip"}, zlib.compress(bytes(10_000))), "compressed"),
    "/html": ((200, {"Content-Type": "text/html"}, b"<html>"), "no image"),
    "/lied": ((200, {"Content-Type": "image/jpeg"}, file()), "it is image/png"),
    "/endless": (endless, "too large"),
    "/slow": (slow, "did not arrive within 2 s"),
}


def test_what_a_server_may_answer_is_bounded(trusting: None, api: TestClient) -> None:
    with serving({path: page for path, (page, _) in PAGES.items()}) as url:
        for path, (_, why) in PAGES.items():
            (error,) = refused(api, image=url + path)["errors"]
            assert error["field"] == "spec.image"
            assert why in error["allowed"], (path, error)
    assert one("SELECT count(*) FROM inputs") == 0


INSIDE = (
    "https://127.0.0.1/", "https://localhost/", "https://10.0.0.1/", "https://192.168.1.1/", "https://172.16.0.1/",
    "https://169.254.169.254/latest/meta-data/", "https://[::1]/", "https://[::]/", "https://0.0.0.0/",
    "https://0/", "https://2130706433/", "https://0x7f000001/", "https://0177.0.0.1/", "https://127.1/",
    "https://[::ffff:127.0.0.1]/", "https://[::ffff:a9fe:a9fe]/", "https://[64:ff9b::a00:1]/",
    "https://[2002:7f00:1::]/", "https://[fe80::1]/", "https://[fd00:ec2::254]/", "https://100.100.100.200/",
    "https://168.63.129.16/", "https://224.0.0.1/", "https://255.255.255.255/", "https://198.18.0.1/",
    "https://192.0.0.192/",
)  # fmt: skip


def test_no_address_inside_is_asked_however_it_is_written(database: str) -> None:
    import asyncio

    async def all_of_them() -> list[str]:
        said = []
        for url in INSIDE:
            with pytest.raises(fetch.NotFetched) as refusal:
                await fetch.fetch(url, max_bytes=1000, within_s=5)
            said.append(str(refusal.value))
        return said

    for url, why in zip(INSIDE, asyncio.run(all_of_them()), strict=True):
        assert why in ("its host is not on the public Internet", "its host is unknown", "it is no URL"), (
            url,
            why,
        )


@pytest.mark.parametrize(
    "url", ["http://example.com/", "ftp://example.com/", "https://a:b@example.com/", "https:///x"]
)
def test_only_plain_https_is_fetched(url: str, database: str) -> None:
    import asyncio

    with pytest.raises(fetch.NotFetched, match=r"https|user name|no host|no URL"):
        asyncio.run(fetch.fetch(url, max_bytes=1000, within_s=5))


def test_a_name_that_answers_differently_the_second_time_gains_nothing(
    trusting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection goes to the address that was checked; the name is looked up once."""
    import asyncio

    looked_up: list[str] = []
    with serving({"/a.png": file()}) as url:
        port = int(url.rpartition(":")[2])

        async def run() -> tuple[bytes, str]:
            loop = asyncio.get_running_loop()
            real = loop.getaddrinfo

            async def once(host: Any, port: Any, **options: Any) -> Any:
                if host == "pictures.example":
                    looked_up.append(host)
                    host = "127.0.0.1" if len(looked_up) == 1 else "192.0.2.1"
                return await real(host, port, **options)

            monkeypatch.setattr(loop, "getaddrinfo", once)
            return await fetch.fetch(f"http://pictures.example:{port}/a.png", max_bytes=10_000, within_s=5)

        body, kind = asyncio.run(run())

    assert (body, kind) == (file(), "image/png")
    assert looked_up == ["pictures.example"]


def test_a_name_with_one_address_inside_is_refused(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    async def run() -> None:
        async def both(*_: Any, **__: Any) -> Any:
            return [(2, 1, 6, "", ("93.184.216.34", 443)), (2, 1, 6, "", ("10.0.0.1", 443))]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", both)
        await fetch.fetch("https://pictures.example/", max_bytes=10, within_s=5)

    with pytest.raises(fetch.NotFetched, match="public Internet"):
        asyncio.run(run())


def test_a_submission_over_celery_brings_its_image(keys: dict[str, str]) -> None:
    data = file("plum")
    body = {"spec": {**RED, "image": "data:image/png;base64," + base64.b64encode(data).decode()}}

    intake.accept(body, {intake.API_KEY: keys["acme"], intake.IDEMPOTENCY_KEY: "k"})

    (frame,) = must_claim("w", models=("starter",), frames=8).frames
    assert frame.spec.image == f"sha256:{hashlib.sha256(data).hexdigest()}"
    with transaction() as db:
        (key,) = inputs.files(db, frame.account_id, frame.spec.inputs).values()
    assert open_store(settings().storage_url.get_secret_value()).get(key) == data
    with transaction() as db:
        queue.reclaim(db)


def test_the_submissions_own_fields_are_kept_when_its_images_are_taken_in(api: TestClient) -> None:
    up = sent(api)
    two = Submission(specs=[Asked(prompt="a", image=up["id"]), Asked(prompt="b", image="data:image/png,x")])

    fields = {field for field, _ in [(f"{p}.{a}", r) for p, s in two.asked() for a, r in _refs(s)]}

    assert fields == {"specs[0].image", "specs[1].image"}


def _refs(asked: Asked) -> list[tuple[str, str]]:
    from farm.features import refs_of

    return list(refs_of(asked))
