"""`farm up`, for real: in a folder of its own, on free ports, stopped in every way it can be."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from farm.cli.up import read_env
from farm.embedded.process import free_port

WEIGHTS = Path(__file__).parents[1] / "workers" / "starter" / "weights"
WORKERS = 1 if WEIGHTS.is_dir() else 0
PATIENCE_S = 150
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("FARM_")}


@dataclass
class Up:
    """A `farm up` that says it is ready."""

    process: subprocess.Popen[str]
    data: Path
    api_port: int
    flower_port: int
    said: str

    @property
    def env(self) -> dict[str, str]:
        return {**CLEAN, **read_env(self.data / "farm.env")}

    def all(self) -> list[psutil.Process]:
        """It and everything it started."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def find(self, *words: str) -> psutil.Process:
        return next(p for p in self.all() if list(words) == p.cmdline()[-len(words) :])

    def farm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_farm(*arguments, env=self.env)


def run_farm(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "farm.cli", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=PATIENCE_S)


def up(data: Path, *, api_port: int | None = None) -> Up:
    """Start one and read what it says until it is ready; a reader keeps its pipe empty from then on."""
    api_port, flower_port = api_port or free_port(), free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "farm.cli", "up", "--data", str(data), "--workers", str(WORKERS),
         "--api-port", str(api_port), "--flower-port", str(flower_port)],
        env={**CLEAN, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert process.stdout
    said = ""
    while "Ctrl-C stops it" not in said:
        line = process.stdout.readline()
        assert line, f"farm up ended: {said}"
        said += line
    threading.Thread(target=process.stdout.read, daemon=True).start()
    return Up(process, data, api_port, flower_port, said)


def gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are still there after all patience."""
    return psutil.wait_procs(processes, timeout=PATIENCE_S)[1]


@pytest.fixture(scope="module")
def data() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="farm-up-"))
    folder.chmod(0o755)  # as root Postgres runs as nobody
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def farm(data: Path) -> Iterator[Up]:
    running = up(data)
    yield running
    running.process.send_signal(signal.SIGINT)
    running.process.wait(PATIENCE_S)


def test_what_it_says_and_writes_is_all_a_client_needs(farm: Up) -> None:
    env_file = farm.data / "farm.env"

    assert env_file.stat().st_mode & 0o777 == 0o600
    assert f"http://127.0.0.1:{farm.api_port}" in farm.said
    assert str(env_file) in farm.said
    assert httpx.get(f"{farm.env['FARM_URL']}/health/ready").json()["ready"]


def test_flower_asks_for_the_password_it_was_given(farm: Up) -> None:
    url = f"http://127.0.0.1:{farm.flower_port}/workers"
    password = (farm.data / "flower.password").read_text()

    assert password in farm.said
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, auth=("admin", password)).status_code == 200


def test_a_job_goes_in_through_the_command_line(farm: Up) -> None:
    sent = farm.farm("submit", "a red circle on a blue background", "--count", "2", *(["--watch"] * WORKERS))

    assert sent.returncode == 0, sent.stderr
    assert ("2 of 2 done" if WORKERS else "accepted: 2 images") in sent.stdout


def test_an_admin_finds_the_books_right(farm: Up) -> None:
    audited = farm.farm("audit")

    assert (audited.returncode, audited.stdout.strip()) == (0, "the books are right")


def test_no_secret_stands_on_a_command_line(farm: Up) -> None:
    secrets = [*read_env(farm.data / "farm.env").values(), (farm.data / "secret").read_text()]
    secrets = [s for s in secrets if not s.startswith("http")]

    lines = [" ".join(p.cmdline()) for p in farm.all()]

    assert not [line for line in lines for secret in secrets if secret in line]


def test_a_second_one_in_the_same_folder_is_refused(farm: Up) -> None:
    second = run_farm("up", "--data", str(farm.data), env=CLEAN)

    assert second.returncode == 1
    assert f"is already up (process {farm.process.pid})" in second.stderr


def test_a_taken_port_is_named_with_its_option(farm: Up, tmp_path: Path) -> None:
    second = run_farm("up", "--data", str(tmp_path / "other"), "--api-port", str(farm.api_port), env=CLEAN)

    assert second.returncode == 1
    assert f"port {farm.api_port} of 127.0.0.1 is taken: choose another with --api-port" in second.stderr


def test_a_process_that_dies_is_started_again(farm: Up) -> None:
    sweep = farm.find("farm.cli", "sweep")
    sweep.kill()
    psutil.wait_procs([sweep], timeout=PATIENCE_S)

    until = threading.Event()
    for _ in range(PATIENCE_S * 10):
        if any(p.cmdline()[-1:] == ["sweep"] for p in farm.all() if p.is_running()):
            break
        until.wait(0.1)

    assert farm.find("farm.cli", "sweep").pid != sweep.pid


@pytest.mark.parametrize(("server", "how"), [("redis-server", signal.SIGKILL), ("postgres", signal.SIGQUIT)])
def test_so_are_the_servers_and_what_was_accepted_meanwhile_goes_through(
    farm: Up, server: str, how: signal.Signals
) -> None:
    [dead] = [p for p in psutil.Process(farm.process.pid).children() if p.name() == server]
    dead.send_signal(how)
    psutil.wait_procs([dead], timeout=PATIENCE_S)

    tries = (farm.farm("submit", "a red circle", *(["--watch"] * WORKERS)) for _ in range(20))
    sent = next(s for s in tries if s.returncode == 0)

    assert ("1 of 1 done" if WORKERS else "accepted: 1 image") in sent.stdout


def test_after_a_sigkill_nothing_lives_on_and_the_next_start_has_everything(data: Path, farm: Up) -> None:
    accepted = farm.farm("submit", "a green star", "--json")
    everything, key = farm.all(), farm.env["FARM_API_KEY"]
    farm.process.kill()

    again = up(data, api_port=farm.api_port)  # while the old processes may still be there
    left = [p for p in everything if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    jobs = again.farm("jobs", "--json")
    now = again.all()
    again.process.send_signal(signal.SIGINT)

    assert again.process.wait(PATIENCE_S) == 0
    assert left == []
    assert again.env["FARM_API_KEY"] == key
    assert accepted.stdout.split('"')[3] in jobs.stdout
    assert gone(now) == []
