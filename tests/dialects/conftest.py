"""One running farm for the tests of all dialects: `farm up` with the starter model, as a newcomer has it."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from farm.cli.up import read_env
from farm.embedded.process import free_port

PATIENCE_S = 150
WEIGHTS = Path(__file__).parents[2] / "workers" / "starter" / "weights"
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("FARM_")}
SETTINGS = {
    "FARM_SYNC_WAIT_S": "120",
    "FARM_ALLOWED_PRIVATE_HOSTS": "127.0.0.1",  # where receivers of webhooks are
    "PYTHONUNBUFFERED": "1",
}
RED = "a red circle on a blue background"


def pixels(data: bytes) -> tuple[tuple[int, int], bytes]:
    """An image's size and pixels, whatever its file says beside them: the hash of a mask, say."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return image.size, image.tobytes()


@dataclass
class RunningFarm:
    """A `farm up` that is ready: where it is, and keys of two accounts."""

    url: str
    account: str
    api_key: str
    admin_key: str
    data: Path

    @cached_property
    def api(self) -> httpx.Client:
        """The native API, as the account."""
        return self.client(self.api_key)

    @cached_property
    def stranger_key(self) -> str:
        """A key of another account."""
        admin = self.client(self.admin_key)
        made = admin.post("/v1/accounts", json={"name": "stranger"})
        assert made.status_code in (201, 409), made.text
        key = admin.post("/v1/accounts/stranger/keys", json={"role": "submit"})
        assert key.status_code == 201, key.text
        return str(key.json()["api_key"])

    def client(self, key: str) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE_S, trust_env=False
        )

    def native(self, prompt: str = RED, **spec: Any) -> list[bytes]:
        """The images the native API makes of a spec, one after the other."""
        sent = self.api.post("/v1/jobs", json={"spec": {"prompt": prompt, **spec}})
        assert sent.status_code == 202, sent.text
        job = self.ended(sent.json()["id"])
        assert job["counts"]["done"] == job["frames"], job
        url = f"/v1/jobs/{job['id']}/frames"
        return [self.api.get(f"{url}/{k}/image").content for k in range(job["frames"])]

    def ended(self, job: str) -> dict[str, Any]:
        """A job once it has ended."""
        until = threading.Event()
        for _ in range(PATIENCE_S * 10):
            found: dict[str, Any] = self.api.get(f"/v1/jobs/{job}").json()
            if found["ended_at"]:
                return found
            until.wait(0.1)
        raise AssertionError(f"{job} does not end: {found}")

    def jobs(self) -> list[dict[str, Any]]:
        """The account's newest jobs."""
        return list(self.api.get("/v1/jobs", params={"limit": 200}).json()["jobs"])


def start(data: Path) -> tuple[subprocess.Popen[str], int]:
    """Start one and read what it says until it is ready; a reader keeps its pipe empty from then on."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "farm.cli", "up", "--data", str(data), "--workers", "1",
         "--api-port", str(port), "--flower-port", str(free_port())],
        env={**CLEAN, **SETTINGS},
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
    return process, port


@pytest.fixture(scope="session")
def farm() -> Iterator[RunningFarm]:
    if not WEIGHTS.is_dir():
        pytest.skip("the starter model's weights are not here")
    data = Path(tempfile.mkdtemp(prefix="farm-dialects-"))
    data.chmod(0o755)  # as root Postgres runs as nobody
    process, port = start(data)
    env = read_env(data / "farm.env")
    try:
        yield RunningFarm(
            f"http://127.0.0.1:{port}", "demo", env["FARM_API_KEY"], env["FARM_ADMIN_KEY"], data
        )
    finally:
        all_of_it = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE_S)
        for left in psutil.wait_procs(all_of_it, timeout=10)[1]:
            left.kill()
        shutil.rmtree(data, ignore_errors=True)
