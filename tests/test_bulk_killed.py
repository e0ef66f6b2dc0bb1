"""Bulk uploads to an API process of its own: cut, killed, and sent by a client that goes on by itself."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import text

from farm import accounts, cli, pricing, sweep
from farm.api.bulk_files import PART
from farm.catalog import catalog
from farm.client import Farm
from farm.db import transaction
from farm.settings import settings
from farm.spec import PRIORITIES, Priority
from tests.factories import ask, one, violations
from tests.test_client import serving

START_S = 60


@pytest.fixture
def key(database: str) -> str:
    with transaction() as db:
        pricing.sync(db, catalog())
        return accounts.issue_key(db, accounts.create(db, "acme"))[1]


class Api:
    """`farm api` as a process of its own."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        env = {**os.environ, "FARM_API_PORT": str(self.port)}
        self.child = subprocess.Popen([sys.executable, "-m", "farm.cli", "api"], env=env)
        until(self._lives)

    def _lives(self) -> bool:
        assert self.child.poll() is None
        try:
            return httpx.get(f"{self.url}/health/live").is_success
        except httpx.TransportError:
            return False

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.child.send_signal(number)
        self.child.wait(30)


@pytest.fixture
def api(key: str) -> Iterator[Api]:
    started = Api()
    yield started
    started.stop()
    assert violations() == []


def until(reached: Callable[[], object], limit_s: float = START_S) -> None:
    deadline = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < deadline, "not reached"
        time.sleep(0.01)


def lines(first: int, count: int) -> bytes:
    said = (
        {"custom_id": f"sku-{n}", "prompt": f"picture {n}, a red circle on a blue background"}
        for n in range(first, first + count)
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in said)


def written(folder: Path, count: int) -> Path:
    path = folder / "lines.ndjson"
    path.write_bytes(lines(0, count))
    return path


def stored() -> int:
    return int(one("SELECT coalesce(max(stored), 0) FROM bulk_uploads"))


def each_once(count: int) -> None:
    rows = ask(
        "SELECT count(*) AS n, count(DISTINCT custom_id) AS names, max(index) + 1 AS last FROM frame_names"
    )
    assert [tuple(r) for r in rows] == [(count, count, count)]
    assert one("SELECT count(*) FROM frames") == count
    assert one("SELECT count(*) FROM jobs WHERE status = 'active'") == 1


def test_an_api_that_is_killed_while_a_file_comes_leaves_each_line_once(
    api: Api, key: str, tmp_path: Path
) -> None:
    # given a client that sends a file, and goes on by itself
    count, file = 24_000, written(tmp_path, 24_000)
    done: list[Any] = []
    farm = Farm(api.url, key, patience_s=1)
    sender = threading.Thread(target=lambda: done.append(farm.send_file(file, {"name": "big"})))
    sender.start()

    # when the API is killed again and again in the middle
    for least in (1, count // 3):
        until(lambda least=least: stored() >= least)
        api.stop(signal.SIGKILL)
        assert one("SELECT count(*) FROM jobs WHERE status = 'active'") == 0 or stored() == count
        api.start()
    sender.join(120)

    # then
    assert [(d.status, d.good, d.bad) for d in done] == [("accepted", count, 0)]
    each_once(count)


def test_a_file_whose_connection_is_cut_goes_on_under_its_key(key: str) -> None:
    data = lines(0, 20_000)
    with serving() as url:
        head = (
            f"POST /v1/bulk HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nIdempotency-Key: k\r\n"
            f"Content-Type: application/x-ndjson\r\nContent-Length: {len(data)}\r\n\r\n"
        ).encode()
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        for part in (PART * 3 // 2, PART * 2 + 7):
            with socket.create_connection(address) as connection:
                connection.sendall(head + data[:part])
            # the whole lines that came are in, and no more
            until(
                lambda part=part: (
                    one("SELECT max(received) FROM bulk_uploads") == data.rfind(b"\n", 0, part) + 1
                )
            )

        headers = {
            "Authorization": f"Bearer {key}", "Content-Type": "application/x-ndjson", "Idempotency-Key": "k",
        }  # fmt: skip
        answer = httpx.post(f"{url}/v1/bulk", content=data, headers=headers, timeout=60)

    assert (answer.status_code, answer.json()["good"]) == (202, 20_000)
    each_once(20_000)


def test_a_hundred_thousand_lines_take_no_more_memory_than_a_few(api: Api, key: str, tmp_path: Path) -> None:
    process, farm = psutil.Process(api.child.pid), Farm(api.url, key)
    few = tmp_path / "few.ndjson"
    few.write_bytes(b"".join(lines(n, 1).replace(b"sku-", b"few-") for n in range(12_000)))
    farm.send_file(few)
    before = process.memory_info().rss
    peak, stop = [before], threading.Event()

    def look() -> None:
        while not stop.wait(0.05):
            peak[0] = max(peak[0], process.memory_info().rss)

    looking = threading.Thread(target=look)
    looking.start()
    done = farm.send_file(written(tmp_path, 100_000))
    stop.set()
    looking.join()

    assert done.good == 100_000
    assert peak[0] - before < 40 << 20
    assert peak[0] < 300 << 20


def test_the_command_line_sends_a_file_shows_its_proof_and_approves(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as url:
        _used_from_the_command_line(url, key, tmp_path, monkeypatch, capsys)


def _used_from_the_command_line(
    url: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FARM_URL", url)
    monkeypatch.setenv("FARM_API_KEY", key)

    def farm(*arguments: str) -> tuple[int, str, str]:
        settings.cache_clear()
        monkeypatch.setattr("sys.argv", ["farm", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    file = tmp_path / "few.csv"
    file.write_text("custom_id,prompt\na,a red circle\nb,a blue circle\nc,a green circle\n")
    bad = tmp_path / "bad.ndjson"
    bad.write_bytes(lines(0, 2) + b'{"custom_id": "x", "prompt": "a", "steps": 0}\n')
    matrix = tmp_path / "matrix.json"
    matrix.write_text(json.dumps({"prompt": "a (red, blue) circle", "size": ["64x64", "128x64"]}))

    code, out, _ = farm("submit", "--file", str(file), "--proof", "1", "--steps", "4", "--json")
    sent = json.loads(out)
    assert (code, sent["good"], sent["status"]) == (0, 3, "accepted")
    job = json.loads(farm("job", "last", "--json")[1])
    assert (job["id"], job["proof"], job["counts"]["staged"]) == (sent["job"], 1, 2)
    assert job["priority"] == PRIORITIES[Priority.BULK]
    assert json.loads(farm("approve", "last", "--json")[1])["counts"]["staged"] == 0
    frames = json.loads(farm("frames", "last", "--json")[1])
    assert [(f["custom_id"], f["spec"]["steps"]) for f in frames] == [("a", 4), ("b", 4), ("c", 4)]

    code, out, _ = farm("submit", "--file", str(file), "--priority", "0", "--no-reuse", "--json")
    with transaction() as db:  # what counts as nothing in Python is sent all the same
        facts = db.execute(text("SELECT facts FROM bulk_uploads ORDER BY id DESC LIMIT 1")).scalar_one()
    assert (code, facts["priority"], facts["reuse"]) == (0, 0, False)
    farm("cancel", "last")

    code, out, err = farm("submit", "--file", str(bad))
    assert (code, "lines[3].steps" in err, "farm bulk errors blk_" in err) == (1, True, True)
    assert json.loads(farm("bulk", "errors", "last", "--json")[1])[0]["custom_id"] == "x"
    assert [u["status"] for u in json.loads(farm("bulk", "list", "--json")[1])] == [
        "refused",
        "accepted",
        "accepted",
    ]
    assert farm("bulk", "show", "last")[0] == 0

    file.write_text("custom_id,prompt,steppes\na,a red circle,4\n")
    code, _, err = farm("submit", "--file", str(file))  # it is not over, and who sent it is told so
    left = json.loads(farm("bulk", "list", "--json")[1])[0]
    assert (code, left["status"], "columns[2]" in err) == (1, "open", True)
    assert f"--resume {left['id']}" in err.replace("\n", " ")
    assert f"farm bulk discard {left['id']}" in err.replace("\n", " ")

    code, out, _ = farm("submit", "--matrix", str(matrix), "--preview", "--steps", "4")
    assert (code, "4 images: 2 prompts, 2 combinations" in out) == (0, True)
    code, out, _ = farm("submit", "--matrix", str(matrix), "--json")
    assert json.loads(out)["good"] == 4
    assert farm("submit")[0] != 0
    sweep.tidy()
    with transaction() as db:
        assert db.scalar(text("SELECT count(*) FROM jobs")) == 3
