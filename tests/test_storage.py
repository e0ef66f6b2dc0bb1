"""Both stores keep one contract; the S3 one keeps it behind a proxy that does what stores and networks do."""

import base64
import hashlib
import json
import multiprocessing
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest
from typer.testing import CliRunner

from farm.cli import app
from farm.errors import Invalid, Misconfigured, NotFound, StorageAway
from farm.storage import Store, image_key, open_store
from farm.storage.check import at_start, examine
from farm.storage.local import LocalStore
from farm.storage.s3 import MULTIPART_OVER, PART_BYTES, S3Store, _forged
from tests.hostile import (
    BUCKET,
    INTERNAL,
    SECRET,
    SLOW_DOWN,
    Fault,
    Passing,
    Proxy,
    client_of,
    cut_after_store,
    half_an_answer,
    half_an_answer_that_claims_to_be_whole,
    half_an_upload,
    nothing,
    other_bytes,
    other_bytes_kept,
    refusal,
    s3_server,
    silent,
    trailer_kept,
)

ACCOUNT = UUID("01920000-0000-7000-8000-000000000001")


def an_image(size_bytes: int = 5000) -> tuple[str, bytes]:
    data = os.urandom(size_bytes)
    return image_key(ACCOUNT, hashlib.sha256(data).digest(), "png"), data


# --- the S3 server, and the proxy before it ------------------------------------------------------


@pytest.fixture(scope="session")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """An S3 server for as long as the tests run."""
    with s3_server(tmp_path_factory.mktemp("ministack")) as port:
        yield port


@pytest.fixture(scope="session")
def running_proxy(s3_port: int) -> Iterator[Proxy]:
    with Proxy(s3_port).running() as server:
        yield server


@pytest.fixture
def proxy(running_proxy: Proxy) -> Iterator[Proxy]:
    running_proxy.forget()
    yield running_proxy
    running_proxy.over.set()


@pytest.fixture(scope="session")
def first_behind(running_proxy: Proxy) -> S3Store:
    store = S3Store(BUCKET, endpoint=running_proxy.endpoint, region="us-east-1", read_timeout_s=0.3)
    store.check()
    return store


@pytest.fixture
def behind(first_behind: S3Store, proxy: Proxy) -> S3Store:
    """A store that reaches S3 through the proxy, with little patience and a prefix of its own."""
    store = S3Store(
        BUCKET,
        uuid4().hex,
        endpoint=proxy.endpoint,
        region="us-east-1",
        give_up_after_s=2,
        first_pause_s=0.001,
        longest_pause_s=0.01,
    )
    store._clients = first_behind._clients  # making one takes longer than most of the tests
    return store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "farm images"


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, folder: Path) -> Store:
    if request.param == "local":
        return open_store(folder.as_uri())
    url = f"s3://{BUCKET}%s?endpoint=http://127.0.0.1:{request.getfixturevalue('s3_port')}&region=us-east-1"
    first, store = open_store(url % ""), open_store(url % f"/{uuid4().hex}")
    assert isinstance(first, S3Store)
    assert isinstance(store, S3Store)
    first._client()
    store._clients = first._clients  # making one takes longer than most of the tests
    return store


# --- the contract, of both -----------------------------------------------------------------------


def test_what_was_put_can_be_got(store: Store) -> None:
    key, data = an_image()

    store.put(key, data, content_type="image/png")

    assert store.get(key) == data


@pytest.mark.parametrize("size_bytes", [0, 1, 12_000_000])
def test_an_object_of_any_size_comes_back_whole(store: Store, size_bytes: int) -> None:
    key, data = an_image(size_bytes)

    store.put(key, data, content_type="image/png")

    assert store.get(key) == data


def test_putting_again_changes_nothing(store: Store) -> None:
    key, data = an_image()

    store.put(key, data, content_type="image/png")
    store.put(key, data, content_type="image/png")

    assert store.get(key) == data
    assert [found.key for found in store.list()] == [key]


def test_many_may_put_the_same_key_at_once(store: Store) -> None:
    key, data = an_image(200_000)
    line = threading.Barrier(8)

    def put() -> None:
        line.wait()
        store.put(key, data, content_type="image/png")

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(put) for _ in range(8)]:
            done.result()

    assert store.get(key) == data
    assert [found.key for found in store.list()] == [key]


def test_getting_what_is_not_there_is_not_found(store: Store) -> None:
    store.put("v1/there/one.png", b"x", content_type="image/png")

    for key in (an_image()[0], "v1", "v1/there", "v1/there/one.png/below"):
        with pytest.raises(NotFound):
            store.get(key)


def test_what_was_deleted_is_gone_and_deleting_it_again_is_fine(store: Store) -> None:
    key, data = an_image()
    store.put(key, data, content_type="image/png")

    store.delete(key)
    store.delete(key)

    with pytest.raises(NotFound):
        store.get(key)
    assert list(store.list()) == []


def test_a_listing_shows_keys_sizes_and_times_in_utc(store: Store) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)  # S3 cuts to whole seconds
    sizes = {}
    for size_bytes in (10, 20, 30):
        key, data = an_image(size_bytes)
        store.put(key, data, content_type="image/png")
        sizes[key] = size_bytes

    listed = list(store.list())

    assert {found.key: found.size_bytes for found in listed} == sizes
    assert all(found.modified.utcoffset() == timedelta(0) for found in listed)
    assert all(before <= found.modified <= before + timedelta(seconds=30) for found in listed)


def test_a_prefix_is_the_start_of_a_key_wherever_it_ends(store: Store) -> None:
    keys = {"v1/aa/1.png", "v1/aa/2.png", "v1/ab/3.png", "v1/b/4.png", "v10/5.png"}
    for key in keys:
        store.put(key, b"x", content_type="image/png")

    for prefix in ("", "v1", "v1/", "v1/a", "v1/aa", "v1/aa/", "v1/aa/1", "v1/aa/1.png", "v1/c", "w"):
        assert {found.key for found in store.list(prefix)} == {k for k in keys if k.startswith(prefix)}


def test_a_listing_longer_than_a_page_is_complete(store: Store) -> None:
    keys = {f"v1/{number:04}.png" for number in range(1005)}  # a page of S3 is 1000
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: store.put(key, b"x", content_type="image/png"), keys))

    assert {found.key for found in store.list("v1/")} == keys


@pytest.mark.parametrize(
    "key",
    [
        "", "/", "/etc/passwd", "..", "../x", "v1/../../x", "v1/..", "v1//x", "v1/", "./x", ".tmp/x", "v1/.x",
        "v1/x y", "v1\\x", "v1/x\n", "v1/x\0", "v1/ü", "v1/%2e%2e", "x" * 600, "v1/" + "x" * 300,
    ],
)  # fmt: skip
def test_a_key_that_leaves_its_place_is_refused(store: Store, key: str) -> None:
    for use in (lambda: store.put(key, b"x", content_type="text/plain"), lambda: store.get(key)):
        with pytest.raises(Invalid):
            use()
    with pytest.raises(Invalid):
        store.delete(key)
    assert list(store.list()) == []


@pytest.mark.parametrize("prefix", ["/", "..", "../", "v1//", ".tmp"])
def test_a_listing_outside_is_refused(store: Store, prefix: str) -> None:
    with pytest.raises(Invalid):
        store.list(prefix)


def test_an_image_that_differs_from_its_hash_is_never_given_out(store: Store) -> None:
    key, _ = an_image()
    if isinstance(store, S3Store):
        store._give_up_after_s = 0

    store.put(key, b"other bytes", content_type="image/png")

    with pytest.raises(StorageAway, match="hash"):
        store.get(key)


def test_a_good_store_passes_its_check_and_keeps_nothing_of_it(store: Store) -> None:
    store.check()

    assert list(store.list()) == []


# --- keys and URLs -------------------------------------------------------------------------------


def test_an_image_key_holds_account_and_hash() -> None:
    digest = hashlib.sha256(b"image").digest()

    key = image_key(ACCOUNT, digest, "png")

    assert key == f"v1/{ACCOUNT.hex}/{digest.hex()}.png"
    assert key == image_key(ACCOUNT, digest.hex(), "png")


@pytest.mark.parametrize(
    ("digest", "ext"), [(b"short", "png"), ("A" * 64, "png"), ("a" * 64, "../x"), ("a" * 64, "")]
)
def test_an_image_key_is_made_of_nothing_else(digest: bytes | str, ext: str) -> None:
    with pytest.raises(Invalid):
        image_key(ACCOUNT, digest, ext)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/srv/images",
        "https://bucket",
        "gs://bucket",
        "file:images",
        "file://images/x",
        "file:///",
        "file:///srv/a#b",
        "file:///srv/a?b",
        "file:///srv/%00",
        "s3://",
        "s3:///prefix",
        "s3://bu cket",
        "s3://[bucket",
        "s3://bucket:80/x",
        "s3://bucket/../x",
        "s3://bucket?endpoint=ftp://host",
        "s3://bucket?endpoint=host",
        "s3://bucket?endpoint=http://host:port",
        "s3://bucket?region=a&region=b",
        "s3://bucket?retries=3",
        "s3://bucket?endpoint",
    ],
)
def test_a_wrong_url_names_the_setting_and_what_is_allowed(url: str) -> None:
    with pytest.raises(Misconfigured, match=r"FARM_STORAGE_URL.*file:///folder or s3://bucket"):
        open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIA:{SECRET}@bucket/prefix",
        f"s3://bucket?endpoint=https://AKIA:{SECRET}@host",
        f"s3://bucket?secret_key={SECRET}",
        f"s3://bucket?{SECRET}",
        f"s3://AKIA:{SECRET}",
        f"s3:AKIA:{SECRET}@bucket",
        f"AKIA:{SECRET}@bucket",
        f"file://AKIA:{SECRET}@host/x",
    ],
)
def test_credentials_in_the_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(Misconfigured) as refused:
        open_store(url)

    assert SECRET not in str(refused.value)
    assert refused.value.__cause__ is None


def test_the_same_url_opens_the_same_store(folder: Path) -> None:
    assert open_store(folder.as_uri()) is open_store(folder.as_uri())
    assert open_store("s3://bucket") is open_store("s3://bucket")


def test_boto3_is_imported_only_when_s3_is_used() -> None:
    code = "import sys, farm.storage as f; f.open_store('s3://bucket'); print('boto3' in sys.modules)"

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert said.stdout == "False\n"


# --- the folder ----------------------------------------------------------------------------------


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_crash_before_the_rename_leaves_no_visible_object(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(folder)
    key, data = an_image()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        patch.setattr(Path, "unlink", crash)  # nobody cleans up after a SIGKILL
        with pytest.raises(KeyboardInterrupt):
            store.put(key, data, content_type="image/png")

    assert len(files_in(folder)) == 1
    assert list(store.list()) == []
    with pytest.raises(NotFound):
        store.get(key)


def test_a_failed_write_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(folder)
    key, data = an_image()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: full(fd) if stat.S_ISREG(os.fstat(fd).st_mode) else None)
        with pytest.raises(StorageAway, match="No space left"):
            store.put(key, data, content_type="image/png")

    assert files_in(folder) == []


def test_file_and_folders_are_synced_before_put_returns(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(folder)
    key, data = an_image()
    target = folder / key
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def sync(fd: int) -> None:
        fsync(fd)
        steps.append(os.readlink(f"/proc/self/fd/{fd}"))

    def rename(source: Path, to: Path) -> None:
        replace(source, to)
        steps.append("rename")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    store.put(key, data, content_type="image/png")

    assert {str(path) for path in (folder.parent, folder, folder / "v1")} < set(steps)
    assert steps[-3].startswith(f"{folder}/.tmp/")
    assert steps[-2:] == ["rename", str(target.parent)]


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_files_are_0640_whatever_the_umask(folder: Path, umask: int) -> None:
    store = LocalStore(folder)
    key, data = an_image()

    before = os.umask(umask)
    try:
        store.put(key, data, content_type="image/png")
    finally:
        os.umask(before)

    assert stat.S_IMODE((folder / key).stat().st_mode) == 0o640
    assert stat.S_IMODE((folder / key).parent.stat().st_mode) == 0o750


@pytest.mark.parametrize("clear", [lambda store: list(store.list()), lambda store: store.check()])
def test_what_a_dead_process_left_is_removed_after_an_hour(
    folder: Path, clear: Callable[[Store], object]
) -> None:
    store = LocalStore(folder)
    store.check()
    old, young = folder / ".tmp" / "old", folder / ".tmp" / "young"
    old.touch()
    young.touch()
    os.utime(old, (0, datetime.now(UTC).timestamp() - 3700))

    clear(store)

    assert not old.exists()
    assert young.exists()


def test_putting_again_makes_the_file_young(folder: Path) -> None:
    store = LocalStore(folder)
    key, data = an_image()
    store.put(key, data, content_type="image/png")
    os.utime(folder / key, (0, 0))

    store.put(key, data, content_type="image/png")

    assert next(store.list()).modified > datetime.now(UTC) - timedelta(minutes=1)


def test_a_folder_removed_meanwhile_is_made_again(folder: Path) -> None:
    store = LocalStore(folder)
    key, data = an_image()
    store.put(key, data, content_type="image/png")
    folder.rename(folder.with_name("elsewhere"))

    store.put(key, data, content_type="image/png")

    assert store.get(key) == data


def test_what_a_link_points_to_is_not_listed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").touch()
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secrets")

    assert list(LocalStore(folder).list()) == []


def test_a_file_where_the_folder_should_be_is_a_wrong_setting(folder: Path) -> None:
    folder.touch()

    with pytest.raises(Misconfigured, match="FARM_STORAGE_URL"):
        LocalStore(folder).check()


def test_a_store_that_loses_bytes_fails_its_check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(folder)
    monkeypatch.setattr(LocalStore, "get", lambda *_: b"")

    with pytest.raises(Misconfigured, match="other bytes"):
        store.check()

    assert files_in(folder) == []


# --- S3 behind the proxy -------------------------------------------------------------------------


def test_a_store_that_says_slow_down_is_asked_again(behind: S3Store, proxy: Proxy) -> None:
    key, data = an_image()
    proxy.will(SLOW_DOWN, SLOW_DOWN)

    behind.put(key, data, content_type="image/png")

    assert proxy.methods == ["PUT"] * 3
    assert behind.get(key) == data


@pytest.mark.parametrize(
    "fault", [INTERNAL, refusal(429, "TooManyRequests"), refusal(502, ""), refusal(400, "RequestTimeout")]
)
def test_every_call_outlasts_a_passing_refusal(behind: S3Store, proxy: Proxy, fault: Fault) -> None:
    key, data = an_image()

    proxy.will(fault)
    behind.put(key, data, content_type="image/png")
    proxy.will(fault)
    assert behind.get(key) == data
    proxy.will(fault)
    assert [found.key for found in behind.list()] == [key]
    proxy.will(fault)
    behind.delete(key)

    assert proxy.methods == ["PUT", "PUT", "GET", "GET", "GET", "GET", "GET", "GET", "DELETE"]


def test_a_connection_cut_after_the_store_wrote_is_no_error(behind: S3Store, proxy: Proxy) -> None:
    key, data = an_image()
    proxy.will(cut_after_store)

    behind.put(key, data, content_type="image/png")

    assert [status for _, status, _ in proxy.seen] == [200, 200]
    assert behind.get(key) == data
    assert len(list(behind.list())) == 1


def test_a_store_that_does_not_answer_once_is_asked_again(behind: S3Store, proxy: Proxy) -> None:
    key, data = an_image()
    proxy.will(silent)

    behind.put(key, data, content_type="image/png")

    assert behind.get(key) == data


def test_a_store_that_never_answers_is_away(behind: S3Store, proxy: Proxy) -> None:
    behind._give_up_after_s = 0.5
    proxy.will(*[silent] * 20)

    with pytest.raises(StorageAway, match="ReadTimeoutError"):
        behind.get(an_image()[0])

    assert len(proxy.seen) == 2  # 0.3 s each, none begun after 0.5 s


def test_a_store_that_keeps_refusing_is_away(behind: S3Store, proxy: Proxy) -> None:
    behind._give_up_after_s = 0.3
    proxy.will(*[SLOW_DOWN] * 1000)
    key, data = an_image()

    with pytest.raises(StorageAway, match="503 SlowDown"):
        behind.put(key, data, content_type="image/png")

    assert len(proxy.seen) > 1


def test_a_store_where_nobody_listens_is_away() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        store = S3Store(BUCKET, endpoint=endpoint, region="x", give_up_after_s=0.05, first_pause_s=0.001)

        with pytest.raises(StorageAway):
            store.check()


@pytest.mark.parametrize("fault", [half_an_answer, half_an_answer_that_claims_to_be_whole, other_bytes])
def test_a_damaged_answer_is_fetched_again(behind: S3Store, proxy: Proxy, fault: Fault) -> None:
    key, data = an_image()
    behind.put(key, data, content_type="image/png")
    proxy.will(fault, fault)

    assert behind.get(key) == data

    assert proxy.methods == ["PUT", "GET", "GET", "GET"]


@pytest.mark.parametrize("fault", [half_an_answer, half_an_answer_that_claims_to_be_whole, other_bytes])
def test_a_damaged_answer_is_never_given_out(behind: S3Store, proxy: Proxy, fault: Fault) -> None:
    behind._give_up_after_s = 0.1
    key, data = an_image()
    behind.put(key, data, content_type="image/png")
    proxy.will(*[fault] * 1000)

    with pytest.raises(StorageAway):
        behind.get(key)


def test_half_a_listing_is_fetched_again(behind: S3Store, proxy: Proxy) -> None:
    key, data = an_image()
    behind.put(key, data, content_type="image/png")
    proxy.will(half_an_answer, half_an_answer_that_claims_to_be_whole)

    assert [found.key for found in behind.list()] == [key]


def test_the_store_refuses_half_an_upload_and_gets_it_again(behind: S3Store, proxy: Proxy) -> None:
    key, data = an_image()
    proxy.will(half_an_upload)

    behind.put(key, data, content_type="image/png")

    assert [status for _, status, _ in proxy.seen] == [400, 200]
    assert behind.get(key) == data


@pytest.mark.parametrize(
    "fault",
    [
        refusal(403, "AccessDenied"),
        refusal(403, "InvalidAccessKeyId"),
        refusal(404, "NoSuchBucket"),
        refusal(501, "NotImplemented"),
        refusal(400, "InvalidArgument"),
    ],
)
def test_a_final_refusal_names_bucket_and_setting_at_once(
    behind: S3Store, proxy: Proxy, fault: Fault
) -> None:
    proxy.will(fault)

    with pytest.raises(Misconfigured, match=r"FARM_STORAGE_URL.*images") as refused:
        behind.put(*an_image(), content_type="image/png")

    assert proxy.methods == ["PUT"]
    assert SECRET not in str(refused.value)


def test_a_bucket_that_is_not_there_fails_the_check(proxy: Proxy) -> None:
    store = S3Store("no-such-bucket", endpoint=proxy.endpoint, region="us-east-1")

    with pytest.raises(Misconfigured, match=r"no such bucket.*no-such-bucket"):
        store.check()


def test_missing_credentials_fail_the_check(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, os.devnull)

    with pytest.raises(Misconfigured, match="AWS_ACCESS_KEY_ID"):
        S3Store(BUCKET, endpoint=proxy.endpoint, region="us-east-1").check()


def test_a_store_that_gives_other_bytes_fails_its_check(behind: S3Store, proxy: Proxy) -> None:
    def ok(request: Passing, body: bytes) -> None:
        request.answer(*request.ask(body))

    proxy.will(ok, ok, other_bytes)  # PUT, list, GET

    with pytest.raises(Misconfigured, match="other bytes"):
        behind.check()

    assert list(behind.list("check/")) == []


def test_deleting_where_a_store_answers_404_is_fine(behind: S3Store, proxy: Proxy) -> None:
    proxy.will(refusal(404, "NoSuchKey"))

    behind.delete(an_image()[0])


def test_a_body_travels_as_it_is_with_its_md5(behind: S3Store, proxy: Proxy) -> None:
    headers: dict[str, str] = {}

    def note(request: Passing, body: bytes) -> None:
        headers.update({name.lower(): value for name, value in request.headers.items()})
        request.answer(*request.ask(body))

    proxy.will(note)
    behind.put("v1/x.png", b"image", content_type="image/png")

    assert headers["content-type"] == "image/png"
    assert headers["content-md5"] == base64.b64encode(hashlib.md5(b"image").digest()).decode()
    assert headers["content-length"] == "5"  # no trailer around it
    assert not [name for name in headers if name.startswith(("x-amz-checksum", "x-amz-trailer", "if-"))]


def test_a_forked_child_uses_connections_of_its_own(behind: S3Store, proxy: Proxy) -> None:
    behind.put("v1/x.png", b"image", content_type="image/png")

    child = multiprocessing.get_context("fork").Process(target=behind.get, args=("v1/x.png",))
    child.start()
    child.join(10)
    behind.get("v1/x.png")

    assert child.exitcode == 0
    ours, childs, ours_again = (port for _, _, port in proxy.seen)
    assert ours == ours_again != childs


# --- uploads in parts ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def first_patient(running_proxy: Proxy) -> S3Store:
    return S3Store(BUCKET, endpoint=running_proxy.endpoint, region="us-east-1")


@pytest.fixture
def patient(first_patient: S3Store, proxy: Proxy) -> S3Store:
    """A store patient the proxy that waits for megabytes."""
    store = S3Store(
        BUCKET,
        uuid4().hex,
        endpoint=proxy.endpoint,
        region="us-east-1",
        first_pause_s=0.001,
        longest_pause_s=0.01,
    )
    first_patient._client()
    store._clients = first_patient._clients
    return store


def big_image() -> tuple[str, bytes]:
    return an_image(MULTIPART_OVER + 1)


PARTS = -(-(MULTIPART_OVER + 1) // PART_BYTES)


def uploads_of(store: S3Store, port: int) -> list[str]:
    """Keys of uploads that were begun and neither completed nor aborted."""
    found = client_of(port).list_multipart_uploads(Bucket=BUCKET, Prefix=store._prefix).get("Uploads", [])
    return [upload["Key"] for upload in found]


def test_a_large_object_travels_in_parts_and_comes_back_whole(
    patient: S3Store, proxy: Proxy, s3_port: int
) -> None:
    key, data = big_image()

    patient.put(key, data, content_type="image/png")

    assert proxy.methods == ["POST", *["PUT"] * PARTS, "POST"]
    assert patient.get(key) == data
    assert uploads_of(patient, s3_port) == []


def test_an_object_of_the_limit_travels_in_one(patient: S3Store, proxy: Proxy) -> None:
    key, data = an_image(MULTIPART_OVER)

    patient.put(key, data, content_type="image/png")

    assert proxy.methods == ["PUT"]


def test_a_part_that_was_lost_or_damaged_is_sent_again_alone(patient: S3Store, proxy: Proxy) -> None:
    key, data = big_image()
    proxy.will(nothing, SLOW_DOWN, half_an_upload, other_bytes_kept)

    patient.put(key, data, content_type="image/png")

    assert proxy.methods == ["POST", *["PUT"] * (PARTS + 3), "POST"]
    assert patient.get(key) == data


def test_an_upload_in_parts_that_is_refused_leaves_nothing(
    patient: S3Store, proxy: Proxy, s3_port: int
) -> None:
    proxy.will(nothing, nothing, refusal(403, "AccessDenied"))

    with pytest.raises(Misconfigured):
        patient.put(*big_image(), content_type="image/png")

    assert proxy.methods == ["POST", "PUT", "PUT", "DELETE"]
    assert uploads_of(patient, s3_port) == []
    assert list(patient.list()) == []


def test_a_completion_whose_answer_was_lost_is_no_error(patient: S3Store, proxy: Proxy, s3_port: int) -> None:
    key, data = big_image()
    proxy.will(*[nothing] * (PARTS + 1), cut_after_store, refusal(404, "NoSuchUpload"))

    patient.put(key, data, content_type="image/png")

    assert patient.get(key) == data
    assert uploads_of(patient, s3_port) == []


def test_uploads_that_broke_off_an_hour_ago_are_cleared_and_no_others(
    patient: S3Store, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(s3_port)
    for key in (f"{patient._prefix}v1/x.png", f"{patient._prefix}others"):
        client.create_multipart_upload(Bucket=BUCKET, Key=key)

    assert patient.clear_leftovers() == 0
    monkeypatch.setattr("farm.storage.s3.LEFTOVER_AGE", timedelta(seconds=-5))

    assert patient.clear_leftovers() == 1
    assert uploads_of(patient, s3_port) == [f"{patient._prefix}others"]


# --- versions ------------------------------------------------------------------------------------


def versions_of(port: int, bucket: str) -> list[dict]:
    found = client_of(port).list_object_versions(Bucket=bucket)
    return [*found.get("Versions", []), *found.get("DeleteMarkers", [])]


def test_where_versions_are_kept_a_delete_takes_each_of_them_and_no_others(
    proxy: Proxy, s3_port: int
) -> None:
    # given a bucket like B2's: an object stored twice, hidden, and stored again
    bucket, client = f"versions-{uuid4().hex[:8]}", client_of(s3_port)
    client.create_bucket(Bucket=bucket)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    store = S3Store(bucket, endpoint=proxy.endpoint, region="us-east-1", first_pause_s=0.001)
    (key, data), (other, others) = an_image(), an_image()
    store.put(key, data, content_type="image/png")
    store.put(key, data, content_type="image/png")
    client.delete_object(Bucket=bucket, Key=key)
    store.put(key, data, content_type="image/png")
    store.put(other, others, content_type="image/png")
    assert len(versions_of(s3_port, bucket)) == 5

    # when
    store.delete(key)
    store.delete(key)
    store.delete(an_image()[0])

    # then not even a marker is left
    assert [v["Key"] for v in versions_of(s3_port, bucket)] == [other]
    assert store.get(other) == others


def test_a_store_that_does_not_list_versions_deletes_what_is_there(behind: S3Store, proxy: Proxy) -> None:
    key, data = an_image()
    behind.put(key, data, content_type="image/png")
    proxy.will(refusal(501, "NotImplemented"))

    behind.delete(key)

    with pytest.raises(NotFound):
        behind.get(key)


# --- encryption, storage class, B2 ---------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [5000, MULTIPART_OVER + 1])
def test_encryption_and_storage_class_are_asked_for_with_each_upload(s3_port: int, size_bytes: int) -> None:
    prefix = uuid4().hex
    store = open_store(
        f"s3://{BUCKET}/{prefix}?endpoint=http://127.0.0.1:{s3_port}&region=us-east-1"
        "&sse=aws:kms&kms_key=alias/images&storage_class=STANDARD_IA"
    )
    key, data = an_image(size_bytes)

    store.put(key, data, content_type="image/png")

    head = client_of(s3_port).head_object(Bucket=BUCKET, Key=f"{prefix}/{key}")
    assert head["ServerSideEncryption"] == "aws:kms"
    assert head["SSEKMSKeyId"].endswith("alias/images")
    assert head["StorageClass"] == "STANDARD_IA"
    assert head["ContentType"] == "image/png"
    assert store.get(key) == data


B2 = "endpoint=https://s3.us-west-004.backblazeb2.com"


@pytest.mark.parametrize(
    "query",
    [
        "sse=AES128",
        "sse=",
        "kms_key=abc",
        "sse=AES256&kms_key=abc",
        "sse=aws:kms&kms_key=a%20b",
        "storage_class=GLACIER",
        "storage_class=DEEP_ARCHIVE",
        "storage_class=cheap",
        "sse=AES256&sse=AES256",
        f"{B2}&sse=aws:kms",
        f"{B2}&storage_class=STANDARD_IA",
    ],
)
def test_a_wrong_encryption_or_storage_class_is_refused_with_what_is_allowed(query: str) -> None:
    with pytest.raises(Misconfigured, match="FARM_STORAGE_URL"):
        open_store(f"s3://bucket?{query}")


def test_b2_signs_with_the_region_of_its_endpoint() -> None:
    store = open_store(f"s3://bucket?{B2}&sse=AES256")

    assert isinstance(store, S3Store)
    assert store._region == "us-west-004"


def test_a_store_that_refuses_what_b2_refuses_holds_images(behind: S3Store, proxy: Proxy) -> None:
    proxy.weather = {"like B2": 1.0}
    key, data = an_image()

    behind.put(key, data, content_type="image/png")
    found = {f.what: f for f in examine(behind)}

    assert behind.get(key) == data
    assert found["conditional write"].state == "no"
    assert "501 NotImplemented" in found["conditional write"].detail
    assert {f.state for what, f in found.items() if what not in ("conditional write", "encryption")} == {"ok"}


# --- links ---------------------------------------------------------------------------------------


def test_a_signed_url_needs_no_key_and_no_other_signature_will_do(behind: S3Store) -> None:
    key, data = an_image()
    behind.put(key, data, content_type="image/png")

    url = behind.url(key, expires_s=600, content_type="image/webp", filename="job-1.webp")

    assert url
    answer = httpx.get(url)
    assert answer.content == data
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["content-disposition"] == 'inline; filename="job-1.webp"'
    assert "X-Amz-Expires=600" in url
    assert httpx.get(_forged(url)).status_code == 403
    assert SECRET not in url


def test_a_folder_leaves_signing_to_the_api(folder: Path) -> None:
    assert LocalStore(folder).url("v1/x", expires_s=1, content_type="image/png", filename="x") is None


# --- the self-test -------------------------------------------------------------------------------


def test_an_examination_says_what_the_store_can_do_and_leaves_nothing(store: Store) -> None:
    found = {f.what: f.state for f in examine(store)}

    assert found["write, list, read back, delete"] == "ok"
    assert found["signed URLs"] == "ok"
    assert found["delete"] == "ok"
    if isinstance(store, S3Store):
        assert found["conditional write"] == "ok"
        assert found["multipart upload"] == "ok"
        assert found["versions"] == "ok"
    assert list(store.list()) == []


@pytest.mark.parametrize("fault", [SLOW_DOWN, half_an_answer], ids=["503", "cut"])
def test_a_signed_url_that_is_not_answered_at_first_is_fetched_again(
    behind: S3Store, proxy: Proxy, fault: Fault
) -> None:
    refused: list[str] = []

    def once_each(request: Passing, body: bytes) -> None:
        signed = "X-Amz-Signature=" in request.path and request.path not in refused
        if signed:
            refused.append(request.path)
        (fault if signed else nothing)(request, body)

    proxy.will(*[once_each] * 200)

    found = {f.what: f.state for f in examine(behind)}

    assert found["signed URLs"] == "ok"
    assert len(refused) == 2  # the signed one, and the forged one


@pytest.mark.parametrize("puts_before", [0, 1])
def test_a_store_that_keeps_the_checksum_with_the_bytes_is_refused(
    behind: S3Store, proxy: Proxy, puts_before: int
) -> None:
    def sometimes(request: Passing, body: bytes) -> None:
        puts = proxy.methods.count("PUT")
        (trailer_kept if request.command == "PUT" and puts >= puts_before else nothing)(request, body)

    proxy.will(*[sometimes] * 200)

    with pytest.raises(Misconfigured, match="other bytes"):
        list(examine(behind))

    proxy.faults.clear()
    assert list(behind.list()) == []


def test_a_store_that_is_away_keeps_no_process_from_starting_and_one_that_lies_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    at_start(folder.as_uri(), tell=told.append)
    url = folder.with_name("lies").as_uri()
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "get", lambda *_: b"")
        with pytest.raises(Misconfigured):
            at_start(url, tell=told.append)

    def away(*_: object, **__: object) -> None:
        raise StorageAway

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", away)
        at_start(url, tell=told.append)

    assert told == ["up", "wrong", "away"]


def test_the_command_shows_a_table_or_json_and_fails_for_a_store_that_cannot_be_used(
    store: Store, folder: Path, s3_port: int
) -> None:
    url = f"s3://{BUCKET}?endpoint=http://127.0.0.1:{s3_port}&region=us-east-1"
    if isinstance(store, LocalStore):
        url = folder.as_uri()

    shown = CliRunner().invoke(app, ["storage", "check", url])
    as_json = CliRunner().invoke(app, ["storage", "check", url, "--json"])
    failed = CliRunner().invoke(app, ["storage", "check", url.replace(BUCKET, "no-such"), "--json"])

    assert (shown.exit_code, as_json.exit_code) == (0, 0)
    assert "write, list, read back, delete" in shown.stdout
    assert {row["state"] for row in json.loads(as_json.stdout)} <= {"ok", "unneeded", "unknown"}
    if isinstance(store, S3Store):
        assert failed.exit_code == 1
        assert "no such bucket" in json.loads(failed.stdout)[-1]["detail"]
