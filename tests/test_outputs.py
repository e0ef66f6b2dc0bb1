"""What comes out of a job: manifests, archives, downloads and copies in buckets."""

import csv
import hashlib
import io
import json
import socket
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import boto3
import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from sqlalchemy import text

from farm import accounts, archive, cli, ids, jobs, outputs, pricing, submissions
from farm.api.app import create_app
from farm.archive import Archive, Tar, Zip, file_name
from farm.catalog import catalog
from farm.client import Farm
from farm.db import engine, transaction
from farm.errors import Away, Damaged, NotFound
from farm.settings import settings
from farm.storage import open_store
from tests.factories import ask, must_claim, one
from tests.hostile import BUCKET, KEYS, s3_server
from tests.test_api import settled

SMALL = {"prompt": "a red circle", "width": 64, "height": 64, "seed": 7}
WHEN = datetime(2026, 5, 4, 3, 2, 2, tzinfo=UTC)


# ------------------------------------------------------------------------------------------------ names


def test_a_file_is_called_as_the_account_calls_its_frame_or_by_its_index() -> None:
    assert file_name(None, 12, "png") == "00000012.png"
    assert file_name("SKU-001.front", 3, "webp") == "SKU-001.front.webp"


@pytest.mark.parametrize(
    "custom_id",
    ["../../etc/passwd", "a/b", "a\\b", ".hidden", "", " ", "con", "NUL.txt", "a:b", "é", "一", "x" * 255,
     "a\nb", "00000007", "a--3"],
)  # fmt: skip
def test_a_name_that_no_file_should_have_is_changed_and_told_apart_by_its_index(custom_id: str) -> None:
    name = file_name(custom_id, 5, "png")

    assert name.endswith("--5.png")
    assert len(name) < 140
    assert not set(name) & set('/\\:*?"<>| \n')
    assert not name.startswith(".")


def test_names_of_a_job_are_unique_whatever_its_frames_are_called() -> None:
    called = ["a/b", "a_b", "a:b", "a_b--0", "a_b--2", "00000006", None, "x" * 200, "x" * 201, "", "."]

    names = [file_name(custom_id, index, "png") for index, custom_id in enumerate(called)]

    assert len(set(names)) == len(names)


# ------------------------------------------------------------------------------------------------ archives


def written(made: Archive, files: dict[str, bytes]) -> bytes:
    parts = [b"".join(made.add(name, data, WHEN)) for name, data in files.items()]
    parts.append(b"".join(made.add_file("last.csv", io.BytesIO(b"x" * 600_000), WHEN)))
    parts.append(b"".join(made.end()))
    made.close()
    return b"".join(parts)


FILES = {"a.png": b"one", "b.png": b"", "deep-name.webp": bytes(range(256)) * 50}


def test_a_zip_is_read_by_others() -> None:
    data = written(Zip(), FILES)

    with zipfile.ZipFile(io.BytesIO(data)) as read:
        assert read.testzip() is None
        assert read.namelist() == [*FILES, "last.csv"]
        assert {n: read.read(n) for n in FILES} == FILES
        assert read.getinfo("a.png").date_time == (2026, 5, 4, 3, 2, 2)
        assert read.getinfo("a.png").compress_type == zipfile.ZIP_STORED


def test_a_tar_is_read_by_others() -> None:
    data = written(Tar(), FILES)

    assert len(data) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as read:
        assert read.getnames() == [*FILES, "last.csv"]
        for name, content in FILES.items():
            file = read.extractfile(name)
            assert file is not None
            assert file.read() == content
        assert read.getmember("a.png").mtime == WHEN.timestamp()


def test_a_zip_of_more_than_65535_files_is_zip64() -> None:
    # given
    made = Zip()
    data = b"".join(b"".join(made.add(f"{n:08}.png", b"x", WHEN)) for n in range(70_000))

    # when
    data += b"".join(made.end())

    # then
    with zipfile.ZipFile(io.BytesIO(data)) as read:
        assert len(read.namelist()) == 70_000
        assert read.read("00069999.png") == b"x"


def test_a_zip_beyond_four_gigabytes_is_zip64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are lowered, as another reader is not asked to: what is written is what 4 GiB would bring."""
    # given
    monkeypatch.setattr(archive, "LIMIT_32", 1000)
    made = Zip()
    parts = [
        *made.add("a.png", b"y" * 900, WHEN),
        *made.add("b.png", b"z" * 1200, WHEN),
        *made.add("c", b"w", WHEN),
    ]

    # when
    data = b"".join([*parts, *made.end()]).replace((1000).to_bytes(4, "little"), b"\xff\xff\xff\xff")

    # then
    with zipfile.ZipFile(io.BytesIO(data)) as read:
        assert {n: len(read.read(n)) for n in read.namelist()} == {"a.png": 900, "b.png": 1200, "c": 1}


# ------------------------------------------------------------------------------------------------ over HTTP


@pytest.fixture
def keys(database: str) -> dict[str, str]:
    with transaction() as db:
        pricing.sync(db, catalog())
        return {name: accounts.issue_key(db, accounts.create(db, name))[1] for name in ("acme", "umbrella")}


@pytest.fixture
def api(keys: dict[str, str]) -> Iterator[TestClient]:
    """The API, called with acme's key."""
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {keys['acme']}"
        yield client


def submitted(keys: dict[str, str], count: int = 4, *, names: dict[int, str] | None = None) -> UUID:
    """A job of acme's; names: what it calls its frames, by index."""
    with transaction() as db:
        caller = accounts.authenticate(db, keys["acme"])
        sent = submissions.Submission(spec={**SMALL, "count": count}, reuse=False)
        job, _ = submissions.submit(db, caller, sent)
    for index, name in (names or {}).items():
        ask(
            "INSERT INTO frame_names (job_id, index, account_id, custom_id) VALUES (:job, :n, :account, :name)",
            job=job, n=index, account=caller.account_id, name=name,
        )  # fmt: skip
    return job


def rendered(frames: int) -> list[bytes]:
    """Render so many frames. Returns their files."""
    return settled(must_claim("w", models=("starter",), frames=frames))


def path(job: UUID, what: str) -> str:
    return f"/v1/jobs/{ids.public('job', job)}/{what}"


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def failed(job: UUID, index: int) -> None:
    ask(
        "UPDATE frames SET status = 'failed', reason = 'it would not', ended_at = now() WHERE id = :id",
        id=ids.frame_id(job, index),
    )


def test_a_manifest_tells_of_every_frame_what_became_of_it(api: TestClient, keys: dict[str, str]) -> None:
    # given two frames done, one failed and one queued
    job = submitted(keys, names={0: "sku/1"})
    images = rendered(2)
    failed(job, 2)

    # when
    answer = api.get(path(job, "manifest"))

    # then
    found = lines(answer)
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert [x["index"] for x in found] == [0, 1, 2, 3]
    assert [x["status"] for x in found] == ["done", "done", "failed", "queued"]
    assert [x["sha256"] for x in found[:2]] == [hashlib.sha256(i).hexdigest() for i in images]
    assert [x["bytes"] for x in found[:2]] == [len(i) for i in images]
    assert [x["custom_id"] for x in found] == ["sku/1", None, None, None]
    assert [x["file"] for x in found] == ["sku_1--0.png", "00000001.png", None, None]
    assert [x["seed"] for x in found] == [7, 8, 9, 10]
    assert {x["model"] for x in found} == {"starter"}
    assert [x["reason"] for x in found] == [None, None, "it would not", None]
    assert found[0]["cost"] == api.get(path(job, "frames/0")).json()["cost"]
    assert (found[0]["currency"], found[3]["cost"], found[3]["url"]) == ("USD", None, None)
    assert api.get(found[1]["url"]).content == images[1]


def test_a_manifest_goes_on_after_an_index_and_reads_page_by_page(
    api: TestClient, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "PAGE", 3)
    job = submitted(keys, 8)

    def indices(query: str) -> list[int]:
        return [x["index"] for x in lines(api.get(path(job, f"manifest{query}")))]

    assert indices("") == list(range(8))
    assert indices("?after=4") == [5, 6, 7]
    assert indices("?after=2&limit=4") == [3, 4, 5, 6]
    assert indices("?after=7") == []


@pytest.mark.parametrize("how", [{"params": {"format": "csv"}}, {"headers": {"Accept": "text/csv"}}])
def test_a_manifest_comes_as_csv_if_asked_for(
    api: TestClient, keys: dict[str, str], how: dict[str, Any]
) -> None:
    job = submitted(keys, names={0: 'say "hi",\nthere'})
    rendered(4)

    answer = api.get(path(job, "manifest"), **how)

    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [r["index"] for r in rows] == ["0", "1", "2", "3"]
    assert rows[0]["custom_id"] == 'say "hi",\nthere'
    plain = lines(api.get(path(job, "manifest")))
    assert [r["sha256"] for r in rows] == [x["sha256"] for x in plain]
    how["params"] = {**how.get("params", {}), "after": 2}
    assert len(api.get(path(job, "manifest"), **how).text.splitlines()) == 1  # without its head


def test_signed_urls_of_a_manifest_need_no_key(api: TestClient, keys: dict[str, str]) -> None:
    job = submitted(keys)
    images = rendered(1)

    url = lines(api.get(path(job, "manifest?signed=true&limit=1")))[0]["url"]

    assert api.get(url, headers={"Authorization": ""}).content == images[0]


def test_frames_of_a_cancelled_job_and_deleted_images_are_shown_as_such(
    api: TestClient, keys: dict[str, str]
) -> None:
    job = submitted(keys, 2)
    rendered(1)
    api.post(path(job, "cancel"))

    assert [x["status"] for x in lines(api.get(path(job, "manifest")))] == ["done", "cancelled"]
    ask("UPDATE images SET deleted_at = now()")
    gone = lines(api.get(path(job, "manifest")))[0]
    assert (gone["status"], gone["url"], gone["sha256"], gone["file"]) == ("done", None, None, None)
    assert gone["cost"] is not None


@pytest.mark.parametrize("what", ["manifest", "archive"])
def test_another_accounts_job_is_not_there(api: TestClient, keys: dict[str, str], what: str) -> None:
    job = submitted(keys)
    theirs = {"Authorization": f"Bearer {keys['umbrella']}"}

    assert api.get(path(job, what), headers=theirs).status_code == 404
    assert api.get(path(UUID(int=job.int + (1 << 80)), what)).status_code == 404


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("manifest?after=-1", "after"),
        ("manifest?after=99999999999999999999", "after"),
        ("manifest?limit=0", "limit"),
        ("manifest?format=xml", "format"),
        ("manifest?signed=maybe", "signed"),
        ("archive?format=rar", "format"),
        ("archive?after=x", "after"),
    ],
)
def test_what_is_not_allowed_is_named(api: TestClient, keys: dict[str, str], query: str, field: str) -> None:
    answer = api.get(path(submitted(keys), query))

    assert answer.status_code == 422
    assert [e["field"] for e in answer.json()["errors"]] == [field]


def test_an_archive_holds_the_images_there_are_and_a_manifest(
    api: TestClient, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    monkeypatch.setattr(outputs, "PAGE", 2)
    job = submitted(keys, 14, names={0: "first", 1: "a/b"})
    images = rendered(12)

    # when
    zipped, tarred = api.get(path(job, "archive")), api.get(path(job, "archive?format=tar"))

    # then
    assert zipped.headers["content-type"] == "application/zip"
    assert zipped.headers["content-disposition"].endswith('.zip"')
    names = ["first.png", "a_b--1.png", *(f"{n:08}.png" for n in range(2, 12))]
    with zipfile.ZipFile(io.BytesIO(zipped.content)) as read:
        assert read.testzip() is None
        assert read.namelist() == [*names, "manifest.csv"]
        assert [read.read(n) for n in names] == images
        rows = list(csv.DictReader(io.StringIO(read.read("manifest.csv").decode())))
    assert [r["file"] for r in rows] == [*names, "", ""]
    assert [r["status"] for r in rows] == ["done"] * 12 + ["queued"] * 2
    with tarfile.open(fileobj=io.BytesIO(tarred.content)) as tar:
        assert tar.getnames() == [*names, "manifest.csv"]


def test_an_image_that_is_gone_or_damaged_is_left_out_of_an_archive_and_the_others_come(
    api: TestClient, keys: dict[str, str]
) -> None:
    # given
    job = submitted(keys, 3)
    rendered(3)
    stored = [
        r.key
        for r in ask("SELECT i.key FROM frames AS f JOIN images AS i ON i.id = f.image_id ORDER BY f.id")
    ]
    store = open_store(settings().storage_url.get_secret_value())
    store.delete(stored[0])
    folder = Path(settings().storage_url.get_secret_value().removeprefix("file://"))
    (folder / stored[1]).write_bytes(b"other bytes")

    # when
    answer = api.get(path(job, "archive"))

    # then
    with zipfile.ZipFile(io.BytesIO(answer.content)) as read:
        assert read.namelist() == ["00000002.png", "manifest.csv"]
        rows = list(csv.DictReader(io.StringIO(read.read("manifest.csv").decode())))
    assert [r["reason"] for r in rows] == ["the stored file is gone", "the stored file is damaged", ""]


def test_who_reads_a_manifest_slowly_holds_no_connection(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    monkeypatch.setattr(outputs, "PAGE", 2)
    job = submitted(keys, 6)
    pages = outputs.pages(job)

    # when
    first = next(pages)

    # then
    assert len(first) == 2
    assert engine().pool.checkedout() == 0  # type: ignore[attr-defined]
    assert [len(p) for p in pages] == [2, 2]


def test_reading_a_page_of_a_large_job_is_by_keys_alone(keys: dict[str, str]) -> None:
    # given
    job = submitted(keys, 2000)
    for table in ("frames", "images", "job_keys", "frame_names", "usage"):
        ask(f"ANALYZE {table}")
    query = text(
        "SELECT coalesce(sum(seq_tup_read), 0), coalesce(sum(idx_tup_fetch), 0) FROM pg_stat_xact_user_tables"
    )

    # when
    with transaction() as db:
        before = db.execute(query).one()
        assert len(outputs.page(db, job, after=1000, limit=100)) == 100
        after = db.execute(query).one()

    # then
    assert after[0] == before[0]
    assert after[1] - before[1] < 100 * 3


# ------------------------------------------------------------------------------------------------ CLI and client


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Command = Callable[..., Ran]


@pytest.fixture
def url(keys: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The API on a real port; FARM_* say where, and as acme."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(), log_config=None))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        found = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv("FARM_URL", found)
        monkeypatch.setenv("FARM_API_KEY", keys["acme"])
        settings.cache_clear()
        yield found
        server.should_exit = True
        thread.join()


@pytest.fixture
def command(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`farm` as a shell runs it."""

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr("sys.argv", ["farm", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return Ran(int(end.value.code or 0), said.out, said.err)

    return run


def test_download_saves_what_is_done_goes_on_later_and_repairs_what_is_damaged(
    command: Command, keys: dict[str, str], tmp_path: Path
) -> None:
    # given
    job = submitted(keys, 5, names={0: "first"})
    shown, to = ids.public("job", job), tmp_path / "out"
    images = rendered(3)

    # when
    assert command("download", shown, "--to", str(to)).code == 0

    # then
    assert [(to / n).read_bytes() for n in ("first.png", "00000001.png", "00000002.png")] == images
    assert len(list(csv.DictReader((to / "manifest.csv").open()))) == 5

    # when one was damaged, one lost, and the others are done
    (to / "first.png").write_bytes(bytes(len(images[0])))
    (to / "00000002.png").unlink()
    images += rendered(2)
    ran = command("download", shown, "--to", str(to), "--json")

    # then
    assert json.loads(ran.out) | {"bytes": 0} == {
        "job": shown, "to": str(to), "copied": 4, "already_there": 1, "bytes": 0, "failed": 0,
    }  # fmt: skip
    assert sorted(p.name for p in to.iterdir()) == sorted(
        ["first.png", *(f"{n:08}.png" for n in range(1, 5)), "manifest.csv"]
    )
    assert (to / "first.png").read_bytes() == images[0]


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_download_makes_an_archive_and_checks_it(
    command: Command, keys: dict[str, str], tmp_path: Path, form: str
) -> None:
    job, file = submitted(keys, 3, names={1: "two\nlines"}), tmp_path / f"all.{form}"
    images = rendered(3)

    ran = command("download", ids.public("job", job), f"--{form}", str(file), "--json")

    assert (ran.code, json.loads(ran.out)["copied"]) == (0, 3)
    assert json.loads(ran.out)["bytes"] == sum(map(len, images))
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".new"] == []
    assert file.exists()


def test_an_archive_that_breaks_off_leaves_no_file(
    command: Command, keys: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Iterator[bytes]:
        yield b"PK"
        raise Away("it broke off")

    job, file = submitted(keys), tmp_path / "all.zip"
    monkeypatch.setattr(Farm, "archive", broken)

    ran = command("download", ids.public("job", job), "--zip", str(file))

    assert (ran.code, "it broke off" in ran.err) == (1, True)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("all")]


def test_a_stored_image_that_is_gone_is_named_and_the_others_are_saved(
    command: Command, keys: dict[str, str], tmp_path: Path
) -> None:
    job = submitted(keys, 3)
    rendered(3)
    open_store(settings().storage_url.get_secret_value()).delete(
        one("SELECT key FROM images ORDER BY id LIMIT 1")
    )

    ran = command("download", ids.public("job", job), "--to", str(tmp_path / "out"))

    assert ran.code == 1
    assert "1 images are missing" in ran.err
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_sync_copies_what_is_missing_and_with_watch_until_the_job_has_ended(
    command: Command, keys: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    from farm.cli import copying

    monkeypatch.setattr(copying, "FIRST_LOOK_S", 0.05)
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    job = submitted(keys, 6)
    shown, images = ids.public("job", job), rendered(2)
    ran = command("sync", shown, bucket.as_uri(), "--json")
    assert (json.loads(ran.out)["copied"], json.loads(ran.out)["to"]) == (2, f"{bucket.as_uri()}/{shown}")

    # when the rest is done while it watches
    looked = Farm.job
    turns = iter([lambda: images.extend(rendered(3)), lambda: images.extend(rendered(1))])

    def look(self: Farm, job: str) -> Any:
        now = looked(self, job)
        next(turns, lambda: None)()
        return now

    monkeypatch.setattr(Farm, "job", look)
    ran = command("sync", shown, bucket.as_uri(), "--watch", "--json")

    # then
    assert {k: json.loads(ran.out)[k] for k in ("copied", "already_there")} == {
        "copied": 4,
        "already_there": 2,
    }
    assert [(bucket / shown / f"{n:08}.png").read_bytes() for n in range(6)] == images
    assert len((bucket / shown / "manifest.csv").read_text().splitlines()) == 7


def test_sync_copies_to_a_bucket_with_the_credentials_of_this_environment(
    command: Command, keys: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    job = submitted(keys, 3, names={0: "first"})
    shown, images = ids.public("job", job), rendered(2)

    with s3_server(tmp_path) as port:
        to = f"s3://{BUCKET}/theirs/catalogue?endpoint=http://127.0.0.1:{port}&region=us-east-1"

        # when
        ran = command("sync", shown, to, "--json")
        assert ran.code == 0, ran.err
        images += rendered(1)
        again = command("sync", shown, to, "--json")

        # then
        found = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1")
        names = [o["Key"] for o in found.list_objects_v2(Bucket=BUCKET)["Contents"]]
        prefix = f"theirs/catalogue/{shown}"
        assert sorted(names) == sorted(
            f"{prefix}/{n}" for n in ("first.png", "00000001.png", "00000002.png", "manifest.csv")
        )
        stored = found.get_object(Bucket=BUCKET, Key=f"{prefix}/first.png")
        assert (stored["Body"].read(), stored["ContentType"]) == (images[0], "image/png")
    assert [json.loads(r.out)["copied"] for r in (ran, again)] == [2, 1]
    assert json.loads(again.out)["to"] == f"s3://{BUCKET}/theirs/catalogue/{shown}"


@pytest.mark.parametrize("to", ["ftp://x/y", "s3://ab", "s3://key:secret@bucket/x", "bucket"])
def test_a_bucket_that_is_none_is_refused_without_its_query(
    command: Command, keys: dict[str, str], to: str
) -> None:
    job = submitted(keys)

    ran = command("sync", ids.public("job", job), f"{to}?endpoint=http://x&token=hidden")

    assert ran.code == 1
    assert "Allowed: file:///folder or s3://bucket" in " ".join(ran.err.split())
    assert "hidden" not in ran.err
    assert ":secret@" not in ran.err
    assert "FARM_STORAGE_URL" not in ran.err


def test_the_client_reads_a_manifest_on_where_it_broke(
    url: str, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real server that cuts each answer after some lines."""
    # given
    job = submitted(keys, 7)
    whole = httpx.Response.iter_lines
    asked: list[str] = []

    def cut(self: httpx.Response) -> Iterator[str]:
        asked.append(str(self.url))
        for n, line in enumerate(whole(self)):
            if n == 3:
                raise httpx.ReadError("cut")
            yield line

    monkeypatch.setattr(httpx.Response, "iter_lines", cut)

    # when
    with Farm() as farm:
        found = [line.index for line in farm.manifest(ids.public("job", job))]

        # then
        assert found == list(range(7))
        assert [("after=2" in a, "after=5" in a) for a in asked] == [
            (False, False),
            (True, False),
            (False, True),
        ]
        with pytest.raises(NotFound):
            list(farm.manifest("job_" + "0" * 32))


def test_the_client_refuses_an_image_with_another_hash(
    command: Command, keys: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submitted(keys, 1)
    rendered(1)
    monkeypatch.setattr(Farm, "image", lambda *_: b"other bytes")

    ran = command("download", ids.public("job", job), "--to", str(tmp_path / "out"))

    assert ran.code == 1
    assert "another hash" in ran.err
    assert issubclass(Damaged, Away)  # a client that goes on would try again


def test_manifest_prints_lines_or_writes_a_file(
    command: Command, keys: dict[str, str], tmp_path: Path
) -> None:
    job = submitted(keys, 2)
    shown, file = ids.public("job", job), tmp_path / "m.csv"

    ran = command("manifest", shown, "--json")
    assert [json.loads(line)["index"] for line in ran.out.splitlines()] == [0, 1]
    assert command("manifest", shown, "--format", "csv", "-o", str(file)).code == 0
    assert [r["index"] for r in csv.DictReader(file.open())] == ["0", "1"]


# ------------------------------------------------------------------------------------------------ timing over HTTP


def test_a_job_tells_its_timing_and_takes_changes_of_it(api: TestClient, keys: dict[str, str]) -> None:
    # given
    first = ids.public("job", submitted(keys))
    sent = {"spec": SMALL, "after": [first], "start_after": "2999-01-01T00:00:00+02:00", "max_parallel": 3,
            "deadline": "2999-01-02T00:00:00Z", "on_late": "demote"}  # fmt: skip

    # when
    made = api.post("/v1/jobs", json=sent).json()

    # then
    assert (made["status"], made["after"], made["max_parallel"]) == ("waiting", [first], 3)
    assert made["start_after"] == "2998-12-31T22:00:00Z"
    assert (made["deadline"], made["on_late"], made["late_at"]) == ("2999-01-02T00:00:00Z", "demote", None)
    assert (made["rate"], made["eta"]) == (None, None)
    assert api.get(made["urls"]["manifest"]).status_code == 200

    changed = api.patch(
        f"/v1/jobs/{made['id']}", json={"start_after": None, "deadline": None, "priority": "bulk"}
    )
    assert changed.status_code == 200
    shown = changed.json()
    assert (shown["start_after"], shown["deadline"], shown["on_late"], shown["priority"]) == (
        None,
        None,
        None,
        1,
    )
    assert shown["max_parallel"] == 3


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"max_parallel": 0}, "max_parallel"),
        ({"max_parallel": 2**40}, "max_parallel"),
        ({"max_parallel": "3"}, "max_parallel"),
        ({"deadline": "yesterday"}, "deadline"),
        ({"deadline": 1893456000}, "deadline"),
        ({"deadline": "2020-01-01T00:00:00Z"}, "deadline"),
        ({"deadline": "0001-01-01T00:00:00+23:59"}, "deadline"),
        ({"start_after": "\0"}, "start_after"),
        ({"on_late": "explode"}, "on_late"),
        ({"on_late": "fail"}, "on_late"),
        ({"after": ["job_x"] * 101}, "after"),
    ],
)
def test_timing_that_is_not_allowed_is_named(
    api: TestClient, keys: dict[str, str], body: dict[str, Any], field: str
) -> None:
    answer = api.post("/v1/jobs", json={"spec": SMALL, **body})
    assert answer.status_code == 422, answer.text
    assert [e["field"] for e in answer.json()["errors"]] == [field]
    if field != "after":
        job = submitted(keys)
        answer = api.patch(f"/v1/jobs/{ids.public('job', job)}", json=body)
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)


@pytest.mark.parametrize("after", ["job_" + "0" * 32, "job_x", "\ud800", ""])
def test_a_job_cannot_come_after_one_that_is_not_there(
    api: TestClient, keys: dict[str, str], after: str
) -> None:
    answer = api.post("/v1/jobs", content=json.dumps({"spec": SMALL, "after": [after]}))

    assert answer.status_code in (404, 422)


def test_an_empty_change_is_refused(api: TestClient, keys: dict[str, str]) -> None:
    answer = api.patch(f"/v1/jobs/{ids.public('job', submitted(keys))}", json={})

    assert answer.status_code == 422
    assert "max_parallel" in answer.text


def test_a_running_job_tells_how_fast_it_is_and_when_it_is_done(
    api: TestClient, keys: dict[str, str]
) -> None:
    from farm import sweep

    job = submitted(keys, 4)
    rendered(2)
    sweep.do(next(c for c in sweep.CHORES if c.name == "relay"))
    # long against what a busy machine takes
    ask("UPDATE events SET at = clock_timestamp() - interval '40 s'")

    shown = api.get(f"/v1/jobs/{ids.public('job', job)}").json()

    assert shown["rate"] == pytest.approx(0.05, rel=0.2)
    left = datetime.fromisoformat(shown["eta"]) - datetime.now(UTC)
    assert 30 <= left.total_seconds() <= 50
    assert shown["on_time"] is None


@pytest.mark.parametrize(("deadline_s", "on_time"), [(1, False), (3600, True)])
def test_a_job_tells_whether_it_is_done_before_its_deadline_at_this_rate(
    api: TestClient, keys: dict[str, str], command: Command, deadline_s: int, on_time: bool
) -> None:
    from farm import sweep

    # given a job of which nothing was done
    job = submitted(keys, 4)
    name = ids.public("job", job)
    ask(
        f"UPDATE jobs SET deadline = now() + interval '{deadline_s} s', on_late = 'demote' WHERE id = :job",
        job=job,
    )
    assert api.get(f"/v1/jobs/{name}").json()["on_time"] is None

    # when half of it is done, in four seconds
    rendered(2)
    sweep.do(next(c for c in sweep.CHORES if c.name == "relay"))
    ask("UPDATE events SET at = at - interval '4 s'")

    # then
    shown = api.get(f"/v1/jobs/{name}").json()
    assert shown["eta"] is not None
    assert shown["on_time"] is on_time
    said = command("job", name).out
    assert ("late at this rate" in said) is not on_time


def test_the_command_line_says_when_a_job_runs(command: Command, keys: dict[str, str]) -> None:
    # when
    ran = command("submit", "a red circle", "--start-after", "+2h", "--deadline", "+1d", "--on-late", "demote",
                  "--max-parallel", "2", "--after", ids.public("job", submitted(keys)), "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    made = json.loads(ran.out)

    # then
    assert (made["status"], made["max_parallel"], made["on_late"]) == ("waiting", 2, "demote")
    ran = command("change", made["id"], "--start-after", "none", "--max-parallel", "none", "--json")
    assert ran.code == 0, ran.err
    assert (json.loads(ran.out)["start_after"], json.loads(ran.out)["max_parallel"]) == (None, None)
    assert "deadline" in command("job", made["id"]).out
    assert command("change", made["id"]).code != 0
    assert command("change", made["id"], "--deadline", "soon").code != 0
    assert jobs.JobStatus.LATE == "late"
