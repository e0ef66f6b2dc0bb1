"""`farm …` against a real API on a real port."""

import hashlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from PIL import Image
from sqlalchemy import text

from farm import accounts, cli, pricing, queue
from farm.accounts import Role
from farm.api.app import create_app
from farm.catalog import catalog
from farm.client import Farm
from farm.db import transaction
from farm.queue import StoredFrame
from farm.settings import settings
from farm.storage import image_key, open_store


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Command = Callable[..., Ran]


@pytest.fixture
def url(database: str) -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(), log_config=None))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"  # the kernel queues who comes too early
        server.should_exit = True
        thread.join()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`farm` as a shell runs it."""

    def run(*arguments: str) -> Ran:
        settings.cache_clear()
        monkeypatch.setattr("sys.argv", ["farm", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return Ran(int(end.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def farm(url: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`farm` with the keys of an account and of an admin."""
    with transaction() as db:
        pricing.sync(db, catalog())
        acme = accounts.create(db, "acme")
        monkeypatch.setenv("FARM_API_KEY", accounts.issue_key(db, acme)[1])
        monkeypatch.setenv("FARM_ADMIN_KEY", accounts.issue_key(db, acme, role=Role.ADMIN)[1])
    monkeypatch.setenv("FARM_URL", url)
    return command


def render() -> None:
    """Stand in for a worker: one pack, each frame a plain picture."""
    store = open_store(settings().storage_url.get_secret_value())
    limits = {m.name: m.pack for m in catalog().values()}
    with transaction() as db:
        pack = queue.claim_pack(db, models=["starter"], worker="w", limits=limits)
        assert pack is not None
    stored = []
    for frame in pack.frames:
        file = io.BytesIO()
        Image.new("RGB", (frame.spec.width, frame.spec.height), (frame.index * 20, 40, 90)).save(file, "PNG")
        digest = hashlib.sha256(file.getvalue()).digest()
        key = image_key(frame.account_id, digest, "png")
        store.put(key, file.getvalue(), content_type="image/png")
        stored.append(
            StoredFrame(
                frame.id, frame.job_id, pack.id, key, "png", digest, digest,
                len(file.getvalue()), frame.spec.width, frame.spec.height,
            )
        )  # fmt: skip
    with transaction() as db:
        queue.settle(db, stored)
    with transaction() as db:
        queue.finish(db, sorted({s.job_id for s in stored}))


def submitted(farm: Command, *arguments: str) -> str:
    ran = farm("submit", *(arguments or ("a red circle",)), "--json")
    assert ran.code == 0, ran.err
    return str(json.loads(ran.out)["id"])


# ------------------------------------------------------------------------------------------------ jobs


def test_submit_sends_what_its_options_say(farm: Command) -> None:
    job = submitted(
        farm, "a red circle", "a star", "--count", "2", "--size", "72x64", "--steps", "7", "--guidance", "2.5",
        "--sampler", "euler", "--seed", "11", "--priority", "urgent", "--format", "webp", "--negative", "blue",
        "--name", "spring",
    )  # fmt: skip

    shown = json.loads(farm("job", job, "--json").out)
    frames = json.loads(farm("frames", job, "--json").out)
    assert (shown["name"], shown["priority"], shown["frames"]) == ("spring", 9, 4)
    assert [f["seed"] for f in frames] == [11, 12, 11, 12]
    assert frames[3]["spec"] == {
        "model": "starter", "prompt": "a star", "negative_prompt": "blue", "width": 72, "height": 64,
        "steps": 7, "guidance": 2.5, "sampler": "euler", "format": "webp",
    }  # fmt: skip


def test_each_bad_field_is_a_line_and_there_is_no_traceback(farm: Command) -> None:
    ran = farm("submit", "a red circle", "--size", "63x64", "--steps", "0")

    assert ran.code == 1
    assert ran.err.splitlines() == [
        "spec.width: 63 is not allowed; allowed are multiples of 8 from 64 to 128",
        "spec.steps: 0 is not allowed; allowed are 1 to 100",
    ]


def test_a_wrong_option_is_a_usage_error(farm: Command) -> None:
    ran = farm("submit", "a red circle", "--size", "large")

    assert ran.code == 2
    assert "WIDTHxHEIGHT" in ran.err


def test_watching_ends_with_each_image_and_saves_it(farm: Command, tmp_path: Path) -> None:
    job = submitted(farm, "a red circle", "--count", "3")
    render()

    ran = farm("watch", job, "--save", str(tmp_path / "pictures"))

    assert ran.code == 0
    assert "finished: 3 of 3 done; 0.00075 USD" in ran.out
    assert [Image.open(p).size for p in sorted((tmp_path / "pictures").iterdir())] == [(64, 64)] * 3


def test_ctrl_c_leaves_the_job_running_and_says_how_to_return(
    farm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submitted(farm)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("farm.client.time.sleep", interrupt)
    ran = farm("watch", job)

    assert ran.code == 130
    assert f"watch it again: farm watch {job}" in ran.err
    assert json.loads(farm("job", job, "--json").out)["status"] == "queued"


def test_the_verbs_do_what_they_say(farm: Command) -> None:
    job = submitted(farm)

    def status() -> str:
        return str(json.loads(farm("job", job, "--json").out)["status"])

    assert farm("pause", job).code == 0
    assert status() == "paused"
    assert farm("resume", job).code == 0
    assert status() == "queued"
    assert farm("priority", job, "bulk").code == 0
    assert json.loads(farm("job", job, "--json").out)["priority"] == 1
    assert farm("cancel", job).code == 0
    assert status() == "cancelled"
    assert farm("pause", job).err.strip() == "error: this job is cancelled"


def test_a_job_answers_to_last_and_to_the_start_of_its_id(farm: Command) -> None:
    submitted(farm)
    job = submitted(farm)

    assert json.loads(farm("job", "last", "--json").out)["id"] == job
    assert json.loads(farm("job", job[:28], "--json").out)["id"] == job
    assert "2 jobs start with job_0" in farm("job", "job_0").err
    assert farm("job", "job_f").code == 1


def test_images_and_the_sheet_are_saved(farm: Command, tmp_path: Path) -> None:
    job = submitted(farm, "a red circle", "--count", "2")
    render()

    assert farm("images", job, "--to", str(tmp_path / "images")).code == 0
    assert farm("sheet", job, "-o", str(tmp_path / "sheet.png")).code == 0

    assert len(list((tmp_path / "images").glob("*.png"))) == 2
    assert Image.open(tmp_path / "sheet.png").width > 64


def test_usage_adds_up_to_the_last_digit(farm: Command) -> None:
    submitted(farm, "a red circle", "--count", "3")
    render()

    assert "total 0.00075 USD" in farm("usage").out
    assert json.loads(farm("usage", "--since", "2099-01-01", "--json").out)["lines"] == []


# ------------------------------------------------------------------------------------------------ admins


@pytest.mark.parametrize("listing", ["jobs", "models", "workers", "audit", "accounts list", "keys list acme"])
def test_every_listing_has_json(farm: Command, listing: str) -> None:
    ran = farm(*listing.split(), "--json")

    assert ran.code == 0
    assert isinstance(json.loads(ran.out), list)


@pytest.mark.parametrize("where", [(), ("--offline",)])
def test_an_account_gets_keys_that_work_rotate_and_end(
    farm: Command, url: str, monkeypatch: pytest.MonkeyPatch, where: tuple[str, ...]
) -> None:
    assert farm("accounts", "add", "umbrella", *where).code == 0
    first = json.loads(farm("keys", "add", "umbrella", "--role", "read", "--json", *where).out)
    second = farm("keys", "rotate", first["id"], *where).out.strip()

    assert Farm(url, second).me().name == "umbrella"
    assert "umbrella" in farm("accounts", "list", *where).out
    assert farm("keys", "revoke", first["id"], *where).code == 0
    monkeypatch.setenv("FARM_API_KEY", second)
    refused, deadline = farm("jobs"), time.monotonic() + 5
    while where and refused.code == 0 and time.monotonic() < deadline:  # an API knows a key for some seconds
        refused = farm("jobs")
    assert refused.code == 1
    assert "set FARM_API_KEY" in refused.err
    assert json.loads(farm("keys", "list", "umbrella", "--json", *where).out)[0]["revoked_at"]


def test_audit_exits_with_1_and_the_rows_when_the_books_are_wrong(farm: Command) -> None:
    submitted(farm)
    with transaction() as db:
        db.execute(text("UPDATE jobs SET held = held / 2"))

    ran = farm("audit", "--offline", "--json")

    assert ran.code == 1
    assert json.loads(ran.out)[0]["violation"]


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_a_farm_that_does_not_answer_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("farm.cli.session.PATIENCE_S", 0.1)

    ran = command("jobs")

    assert ran.code == 1
    assert ran.err.startswith("error: http://127.0.0.1:9 does not answer")
    assert len(ran.err.splitlines()) == 1


def test_a_setting_that_cannot_be_read_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("FARM_LEASE_S", "long")

    ran = command("jobs")

    assert (ran.code, ran.err.partition(":")[0]) == (1, "FARM_LEASE_S")


def test_a_style_and_help_go_with_the_prompt(farm: Command) -> None:
    job = submitted(farm, "a red circle", "--style", "pixel-art", "--enhance")

    (frame,) = json.loads(farm("frames", job, "--json").out)
    assert frame["spec"]["original_prompt"] == "a red circle"
    assert frame["revised_prompt"].startswith("a red circle, pixel art")
    refused = farm("submit", "a red circle", "--style", "baroque")
    assert refused.code == 1
    assert "origami" in refused.err
