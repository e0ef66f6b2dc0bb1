"""Postgres, Redis and storage in one folder, for one machine."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from farm.errors import Misconfigured
from farm.settings import settings


class Server(Protocol):
    """A server process in the data folder."""

    @property
    def url(self) -> str: ...

    @property
    def runs(self) -> bool: ...

    def start(self) -> None: ...


@dataclass(frozen=True)
class Services:
    """Where the database, the broker and the image store are. servers: those of them that run here, by name."""

    database_url: str
    broker_url: str
    storage_url: str
    servers: Mapping[str, Server] = field(default_factory=dict, compare=False)

    def mend(self) -> list[str]:
        """Start again what died. Returns its names.

        Raises DatabaseAway or BrokerAway if it does not start, Misconfigured if somebody took its port meanwhile:
        what runs would look for it there.
        """
        dead = [name for name, server in self.servers.items() if not server.runs]
        for name in dead:
            server = self.servers[name]
            before = server.url
            server.start()
            if server.url != before:
                raise Misconfigured(f"the port of {name} was taken while it was down: start the farm again")
        return dead


def default_data() -> Path:
    """Where `farm up` keeps its data: as root a folder that the servers' own user can reach."""
    if os.geteuid() == 0:
        return Path("/var/lib/farm")
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "farm"


@contextmanager
def services(data: Path) -> Iterator[Services]:
    """Run in a folder what no FARM_*_URL names; at the end stop in order what was started.

    Raises Misconfigured if another process does so in this folder.
    """
    named = settings()
    database_url, broker_url, storage_url = (
        url.get_secret_value() for url in (named.database_url, named.broker_url, named.storage_url)
    )
    servers: dict[str, Server] = {}
    with ExitStack() as stack:
        if not (database_url and broker_url and storage_url):
            data = _open(data, stack)
        if not database_url:
            from farm.embedded.postgres import Postgres  # needs the extra `embedded`

            postgres = Postgres(data)
            stack.callback(postgres.stop)
            postgres.start()
            database_url = postgres.create_database("farm")
            servers["Postgres"] = postgres
        if not broker_url:
            from farm.embedded.redis import Redis

            redis = Redis(data)
            stack.callback(redis.stop)
            redis.start()
            broker_url = redis.url
            servers["Redis"] = redis
        yield Services(database_url, broker_url, storage_url or (data / "images").as_uri(), servers)


def _open(data: Path, stack: ExitStack) -> Path:
    """Make the folder and lock it until the stack unwinds; a SIGKILL of ours frees it as well."""
    from farm.embedded.process import open_folder

    try:
        data = open_folder(data)
        lock = stack.enter_context((data / "farm.lock").open("a+"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError as e:
        problem = f"{e.filename} belongs to another user: run as that one, or choose another folder"
        raise Misconfigured(problem, folder=str(data)) from e
    except BlockingIOError as e:
        pid = (data / "farm.lock").read_text()
        problem = f"process {pid} already runs the services of {data}: stop it, or choose another folder"
        raise Misconfigured(problem, pid=pid, folder=str(data)) from e
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return data
