"""`farm up`: the whole farm on one machine, in one folder."""

import fcntl
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM, signal
from types import FrameType
from typing import IO

import httpx

from farm import accounts, pricing
from farm.accounts import Role
from farm.catalog import Model, catalog
from farm.cli.children import Child, Children
from farm.db import engine, transaction
from farm.embedded import Services, default_data, services
from farm.errors import FarmError, Misconfigured, NotFound, Unauthorized
from farm.settings import settings

READY_S = 120  # the longest a start may take on a busy machine
MANY_DEATHS = 3  # of the API before it was ever ready: it never will be
STORE_S = 30.0  # what a drained worker may still need to store what it rendered
DEMO, ADMIN = "demo", "admin"


@dataclass(frozen=True)
class Running:
    """A farm that is up: how to reach it."""

    data: Path
    url: str
    flower_url: str
    flower_password: str
    demo_key: str
    admin_key: str
    pools: tuple[str, ...]

    @property
    def env_file(self) -> Path:
        return self.data / "farm.env"


@contextmanager
def up(
    data: Path,
    *,
    api_port: int,
    flower_port: int,
    workers: int,
    stop: threading.Event,
    say: Callable[[str], None] = print,
) -> Iterator[tuple[Running, Children]]:
    """Start everything and wait until the API is ready; stop it in order when the block ends.

    Raises Misconfigured for a port that is taken, naming it and its option, and for a folder in use.
    """
    data = data.expanduser().resolve()
    data.mkdir(parents=True, exist_ok=True, mode=0o711 if os.geteuid() == 0 else 0o700)
    with _lock(data, say) as hold, ExitStack() as stack:
        _check_port(api_port, "--api-port")
        _check_port(flower_port, "--flower-port")
        found = stack.enter_context(services(data))
        say("Postgres, Redis and the store are there")
        (data / "logs").mkdir(mode=0o700, exist_ok=True)
        _point_settings_at(found, data)
        _migrate()
        demo_key, admin_key = _keys(data / "farm.env")
        running = Running(
            data=data,
            url=f"http://127.0.0.1:{api_port}",
            flower_url=f"http://127.0.0.1:{flower_port}",
            flower_password=settings().flower_password.get_secret_value() or _kept(data / "flower.password"),
            demo_key=demo_key,
            admin_key=admin_key,
            pools=_pools() if workers else (),
        )
        _write_env(running)
        children = Children(
            _children(running, api_port, flower_port, workers), found, logs=data / "logs", hold=hold.fileno()
        )
        try:
            children.mend()
            _await_ready(running, children, stop)
            yield running, children
        finally:
            _stop(children, say)
            engine().dispose()


def run(
    data: Path, *, api_port: int, flower_port: int, workers: int, say: Callable[[str], None] = print
) -> None:
    """Run the farm until SIGINT or SIGTERM."""
    stop = threading.Event()
    for number in (SIGINT, SIGTERM):
        signal(number, lambda *_: stop.set())
    with up(data, api_port=api_port, flower_port=flower_port, workers=workers, stop=stop, say=say) as (
        running,
        children,
    ):
        if not stop.is_set():
            say(_welcome(running))
        while not stop.wait(0.2):
            children.mend()


# ------------------------------------------------------------------------------------------------ one folder


@contextmanager
def _lock(data: Path, say: Callable[[str], None]) -> Iterator[IO[str]]:
    """Be the only `farm up` of this folder, and let the children of one that was killed leave first.

    The second lock is inherited by children: it lasts while one of them lives.
    """
    with (data / "up.lock").open("a+") as ours, (data / "children.lock").open("a+") as theirs:
        try:
            fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            ours.seek(0)
            raise Misconfigured(
                f"the farm of {data} is already up (process {ours.read()}): stop it, or choose another --data"
            ) from e
        ours.truncate(0)
        ours.write(str(os.getpid()))
        ours.flush()
        _await_leftovers(theirs, data, say)
        yield theirs


def _await_leftovers(lock: IO[str], data: Path, say: Callable[[str], None]) -> None:
    """Their lifelines end them: a worker may take its grace, and is killed at the end of it."""
    patience_s = 3 * (settings().grace_s + STORE_S) + 10
    deadline, told = time.monotonic() + patience_s, False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            if time.monotonic() > deadline:
                raise Misconfigured(f"processes of an earlier farm do not end: see {data / 'logs'}") from e
        if not told:
            say("waiting for the processes of the last farm to end")
            told = True
        time.sleep(0.1)


def _kept(path: Path) -> str:
    """A secret made once and kept in a file that only we may read."""
    if not path.exists():
        _write_secret(path, secrets.token_urlsafe(32))
    return path.read_text().strip()


def _write_secret(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with open(new, "x", opener=lambda file, flags: os.open(file, flags, 0o600)) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _point_settings_at(found: Services, data: Path) -> None:
    """Let this process and its children read where everything is."""
    os.environ["FARM_DATABASE_URL"] = found.database_url
    os.environ["FARM_BROKER_URL"] = found.broker_url
    os.environ["FARM_STORAGE_URL"] = found.storage_url
    if not settings().secret.get_secret_value():
        os.environ["FARM_SECRET"] = _kept(data / "secret")
    settings.cache_clear()


def _migrate() -> None:
    from migrations import upgrade

    upgrade(settings().database_url.get_secret_value())
    with transaction() as db:
        pricing.sync(db, catalog())


def _keys(env_file: Path) -> tuple[str, str]:
    """Keys of the accounts `demo` and `admin`: those of the last time while they work, else new ones."""
    before = read_env(env_file)
    return (
        _key(DEMO, Role.SUBMIT, before.get("FARM_API_KEY", "")),
        _key(ADMIN, Role.ADMIN, before.get("FARM_ADMIN_KEY", "")),
    )


def _key(account: str, role: Role, before: str) -> str:
    with transaction() as db:
        try:
            accounts.authenticate(db, before)
            return before
        except Unauthorized:
            pass
        try:
            owner = accounts.find(db, account)
        except NotFound:
            owner = accounts.create(db, account)
        return accounts.issue_key(db, owner, role=role)[1]


def read_env(path: Path) -> dict[str, str]:
    """The NAME=value lines of a file; nothing if it is not there."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def _write_env(running: Running) -> None:
    _write_secret(
        running.env_file,
        f"# How clients reach this farm. `farm` reads it; for others: set -a; . {running.env_file}; set +a\n"
        f"FARM_URL={running.url}\nFARM_API_KEY={running.demo_key}\nFARM_ADMIN_KEY={running.admin_key}\n",
    )


# ------------------------------------------------------------------------------------------------ processes


def _children(running: Running, api_port: int, flower_port: int, workers: int) -> list[Child]:
    """Who runs. Each gets the secrets it needs; all of them by environment, none on a command line."""
    ports = {"FARM_API_HOST": "127.0.0.1", "FARM_API_PORT": str(api_port),
             "FARM_FLOWER_HOST": "127.0.0.1", "FARM_FLOWER_PORT": str(flower_port)}  # fmt: skip
    no_secret = {"FARM_SECRET": "", "FARM_API_KEY": "", "FARM_ADMIN_KEY": ""}
    patience_s = settings().grace_s + STORE_S
    gpus = _gpus()
    return [
        *(
            Child(
                f"worker-{pool}",
                "workers",
                ["--pool", pool, *_devices(pool, k, gpus, workers)],
                no_secret,
                stage=0,
                patience_s=patience_s,
            )
            for k, pool in enumerate(running.pools)
        ),
        Child("api", "farm.cli", ["api"], ports),
        Child("sweep", "farm.cli", ["sweep"], no_secret),
        Child("intake", "farm.cli", ["intake"], {}),
        Child("deliver", "farm.cli", ["deliver"], {"FARM_API_KEY": "", "FARM_ADMIN_KEY": ""}),
        Child(
            "flower",
            "farm.cli",
            ["flower"],
            {**ports, **no_secret, "FARM_DATABASE_URL": "", "FARM_FLOWER_PASSWORD": running.flower_password},
        ),
    ]


def _pools() -> tuple[str, ...]:
    """Pools whose every model is on this machine: the starter's is part of the farm."""
    pools = sorted(catalog().pools(), key=lambda p: (p != "starter", p))
    return tuple(p for p in pools if all(_is_here(m) for m in catalog().pool(p)))


def _is_here(model: Model) -> bool:
    kind, _, place = model.source.partition(":")
    if kind == "builtin":
        return True
    if kind == "dir":
        return Path(place).expanduser().is_dir()
    folder = settings().models_dir
    return folder is not None and (folder / model.name).is_dir()


def _gpus() -> list[int]:
    """The GPUs of this machine, without importing torch."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    listed = subprocess.run([program, "-L"], check=False, capture_output=True, text=True, timeout=20)
    return list(range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines())))


def _devices(pool: str, number: int, gpus: list[int], workers: int) -> list[str]:
    """The starter stays on the CPU; the other pools share the GPUs out among them."""
    if pool == "starter" or not gpus:
        return ["--cpus", str(workers)]
    return ["--gpus", str(gpus[(number - 1) % len(gpus)])]


def _check_port(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as e:
            raise Misconfigured(f"port {port} of 127.0.0.1 is taken: choose another with {option}") from e


def _await_ready(running: Running, children: Children, stop: threading.Event) -> None:
    deadline = time.monotonic() + READY_S
    while not stop.wait(0.1):
        children.mend()
        try:
            if httpx.get(f"{running.url}/health/ready", timeout=5).is_success:
                return
        except httpx.TransportError:
            pass
        if children.deaths("api") >= MANY_DEATHS or time.monotonic() > deadline:
            tail = children.log_of("api").read_text(errors="replace").splitlines()[-3:]
            raise FarmError(f"the API does not start; {children.log_of('api')} ends with: {' | '.join(tail)}")


def _stop(children: Children, say: Callable[[str], None]) -> None:
    def hurry(_number: int, _frame: FrameType | None) -> None:
        children.hurry()

    say("stopping; once more Ctrl-C makes workers give back what they have in hand")
    before = {number: signal(number, hurry) for number in (SIGINT, SIGTERM)}
    try:
        children.stop()
    finally:
        for number, handler in before.items():
            signal(number, handler)


def _how_to_load(running: Running) -> str:
    """`farm` reads the file in the usual folder by itself."""
    if running.data == default_data().resolve():
        return ""
    return f"         load them: set -a; . {running.env_file}; set +a"


def _welcome(running: Running) -> str:
    return f"""
The farm is ready.

  API      {running.url}         docs: {running.url}/docs
  Flower   {running.flower_url}         user {settings().flower_user}, password {running.flower_password}
  Keys     {running.env_file}{_how_to_load(running)}
  Pools    {", ".join(running.pools) or "none"}
  Logs     {running.data / "logs"}

  farm submit "a red circle on a blue background" --count 4 --watch --save pictures

Ctrl-C stops it."""
