"""A farm to be tormented: its database, its images, the processes at work there, and what befalls it."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP
from uuid import UUID

import psutil
import psycopg
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from farm import accounts, db, entries, ids, jobs, pricing, submissions
from farm.accounts import Caller, Role
from farm.catalog import BUILTIN, catalog, read
from farm.db import transaction
from farm.errors import Conflict
from farm.settings import settings
from tests.chaos import checks
from tests.chaos.faults import Plan
from tests.chaos.tally import Tally
from tests.hostile import BUCKET, KEYS, Proxy, client_of

ROOT = Path(__file__).parent.parent.parent
OPEN = "SELECT DISTINCT worker FROM packs WHERE closed_at IS NULL"
BUSY = "SELECT DISTINCT worker FROM packs WHERE closed_at IS NULL AND lease_until > clock_timestamp()"


class Crew:
    """Processes that are kept alive by a zygote of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.zygote", str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # it ends by killing its group
        )

    def wait(self) -> None:
        """Wait until it can fork."""
        assert self._zygote.stdout.readline() == b"ready\n"

    def keep(self, name: str, role: str, env: dict[str, str], plan: Plan) -> None:
        self._order({"keep": name, "role": role, "env": env, "plan": asdict(plan)})

    def drop(self, house: str) -> None:
        """Kill what works in a house, and keep it no more."""
        self._order({"drop": f"{house}-"})

    def _order(self, order: dict) -> None:
        self._zygote.stdin.write(json.dumps(order).encode() + b"\n")
        self._zygote.stdin.flush()

    def pid(self, name: str) -> int | None:
        with suppress(OSError, ValueError):
            return int((self._folder / f"{name}.pid").read_text())
        return None

    def kill(self, name: str) -> bool:
        pid = self.pid(name)
        return pid is not None and _signal(pid, SIGKILL)

    def frozen(self, house: str) -> dict[str, int]:
        """The pids of those that have stopped, by the name they are kept under."""
        found = {}
        for path in self._folder.glob(f"{house}-*.pid"):
            with suppress(psutil.Error, ValueError):
                pid = int(path.read_text())
                if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                    found[path.stem] = pid
        return found

    def stop(self) -> None:
        """Kill all of them, at once."""
        self._zygote.stdin.close()
        self._zygote.wait(30)

    def logs(self, words: str) -> list[str]:
        """The lines of all logs that hold these words."""
        return [
            line
            for path in sorted(self._folder.glob("*.log"))
            for line in path.read_text(errors="replace").splitlines()
            if words in line
        ]


@dataclass
class House:
    """One farm of the test, in a database of its own."""

    name: str
    url: str
    broker: str
    images: Path
    plan: Plan
    max_attempts: int
    proxy: Proxy | None = None  # before S3; None: images live in the folder
    stepwise: bool = False  # its model goes step by step
    submitted: set[UUID] = field(default_factory=set)
    callers: list[Caller] = field(default_factory=list)
    _since: dict[int, float] = field(default_factory=dict)  # pid → monotonic time it was first seen frozen

    @property
    def tally(self) -> Tally:
        return Tally(Path(self.plan.tally))

    def env(self) -> dict[str, str]:
        return {
            "FARM_DATABASE_URL": self.url,
            "FARM_BROKER_URL": self.broker,
            "FARM_STORAGE_URL": self._storage_url(),
            **KEYS,
            "FARM_ORPHAN_GRACE_S": "3",
            "FARM_SECRET": "a secret of the chaos, 32 characters or more",
            "FARM_LEASE_S": "2",
            "FARM_SWEEP_S": "0.3",
            "FARM_SETTLE_MS": "50",
            "FARM_BURST_S": "20",
            "FARM_MAX_ATTEMPTS": str(self.max_attempts),
            "FARM_POOL_SIZE": "6",
            **({"FARM_CATALOG": str(self._stepping()), "FARM_CHECKPOINT_S": "0.02"} if self.stepwise else {}),
        }

    def _stepping(self) -> Path:
        """A catalog whose one model goes step by step."""
        path = self.images.with_suffix(".toml")
        if not path.exists():
            entry = {
                **read(BUILTIN)["starter"].model_dump(mode="json"),
                "engine": "step",
                "packs_by": "shape",
            }
            name = entry.pop("name")
            entries.add(path, name, entry)
        return path

    def _storage_url(self) -> str:
        if self.proxy is None:
            return self.images.as_uri()
        return f"s3://{BUCKET}/{self.name}?endpoint={self.proxy.endpoint}&region=us-east-1"

    def file(self, key: str) -> bytes | None:
        """A stored file, as it is, past the proxy; None if there is none."""
        if self.proxy is None:
            path = self.images / key
            return path.read_bytes() if path.exists() else None
        client = client_of(self.proxy.upstream_port)
        try:
            return client.get_object(Bucket=BUCKET, Key=f"{self.name}/{key}")["Body"].read()
        except client.exceptions.NoSuchKey:
            return None

    def count(self, what: str) -> int:
        """How often something befell this farm."""
        return self.tally.count(what) + (self.proxy.happened[what] if self.proxy else 0)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make this the farm of this process."""
        before = dict(os.environ)
        os.environ.update(self.env())
        settings.cache_clear()
        catalog.cache_clear()
        try:
            yield
        finally:
            db.engine().dispose()
            os.environ.clear()
            os.environ.update(before)
            settings.cache_clear()
            catalog.cache_clear()

    def staff(self, crew: Crew, *, workers: int, nodes: int = 0) -> None:
        """Put workers, Celery nodes and a sweep to work."""
        for k in range(workers):
            crew.keep(f"{self.name}-{k}", "worker", self.env(), self.plan)
        for k in range(nodes):
            crew.keep(f"{self.name}-node{k}", "node", self.env(), self.plan)
        crew.keep(f"{self.name}-sweep", "sweep", self.env(), self.plan)

    def open_accounts(self, count: int) -> None:
        with transaction() as session:
            pricing.sync(session, catalog())
            for k in range(count):
                account = accounts.create(session, f"{self.name}-{k}")
                key, _ = accounts.issue_key(session, account)
                self.callers.append(Caller(account.id, account.name, account.currency, key.id, Role.SUBMIT))

    def submit(self, caller: Caller, count: int, *, priority: int = 5, **spec: object) -> UUID:
        asked = {"prompt": "noise", "width": 64, "height": 64, "steps": 4, "count": count, **spec}
        submission = submissions.Submission(spec=asked, priority=priority)
        with transaction() as session:
            job_id, _ = submissions.submit(session, caller, submission)
        self.submitted |= {ids.frame_id(job_id, k) for k in range(count)}
        return job_id

    def ask(self, statement: str) -> list:
        with transaction() as session:
            return list(session.execute(text(statement)).all())

    def open_frames(self) -> int:
        return self.ask("SELECT count(*) FROM frames WHERE ended_at IS NULL")[0][0]

    def at_rest(self) -> bool:
        return (
            self.ask(
                "SELECT count(*) + (SELECT count(*) FROM packs WHERE closed_at IS NULL)"
                " + (SELECT count(*) FROM outbox) FROM jobs WHERE ended_at IS NULL"
            )[0][0]
            == 0
        )

    def wrongs(self) -> dict[str, int]:
        with transaction() as session:
            return checks.wrongs(session, read=self.file, submitted=self.submitted)

    def kill_a_busy_worker(self, crew: Crew) -> None:
        """SIGKILL a process that holds an open pack; it is stopped first, so that it cannot become idle."""
        busy = self._busy()
        if not busy:
            return
        name = random.choice(sorted(busy))
        pid = crew.pid(name.partition("@")[0])
        if pid is None or not _signal(pid, SIGSTOP):
            return
        if name in self._busy() and _signal(pid, SIGKILL):
            self.tally.add("killed at random")
        _signal(pid, SIGCONT)

    def thaw(self, crew: Crew) -> None:
        """Wake those that froze, when somebody else has their packs: at the worst moment."""
        late = crew.frozen(self.name)
        hold = {row.worker for row in self.ask(OPEN)} if late else set()
        for name, pid in late.items():
            self._since.setdefault(pid, time.monotonic())
            stuck = time.monotonic() - self._since[pid] > 15  # it froze with a lock in its hand
            if name not in hold or stuck:
                del self._since[pid]
                _signal(pid, SIGCONT)

    def _busy(self) -> set[str]:
        return {row.worker for row in self.ask(BUSY)}


class Verbs:
    """Somebody who pauses, resumes, reprioritises and cancels jobs while all this happens."""

    def __init__(self, house: House, *, cancel: float = 0.03) -> None:
        self._house = house
        self._cancel = cancel
        self._paused: tuple[UUID, UUID] | None = None

    def say(self) -> None:
        """Resume what was paused before; else pause, reprioritise or, seldom, cancel a job."""
        if self._paused:
            self.relent()
            return
        running = [(r.account_id, r.id) for r in self._house.ask("SELECT * FROM jobs WHERE ended_at IS NULL")]
        if not running:
            return
        job = random.choice(running)
        with self._patiently() as session:
            if random.random() < self._cancel:
                jobs.cancel(session, *job)
            elif random.random() < 0.5:
                jobs.pause(session, *job)
                self._paused = job
            else:
                jobs.reprioritise(session, *job, random.choice((1, 5, 9)))

    def relent(self) -> None:
        """Resume what was paused, if anything."""
        if self._paused:
            with self._patiently() as session:
                jobs.resume(session, *self._paused)
            self._paused = self._paused if self._is_paused() else None

    def _is_paused(self) -> bool:
        return (self._paused[1],) in self._house.ask("SELECT id FROM jobs WHERE status = 'paused'")

    @contextmanager
    def _patiently(self) -> Iterator[Session]:
        """A transaction that gives up when the job has ended, or when who froze has its lock."""
        with suppress(Conflict, OperationalError), transaction() as session:
            session.execute(text("SET LOCAL lock_timeout = '1s'"))
            yield session


@dataclass
class Fault:
    """Something that befalls the whole farm every so often."""

    name: str
    every_s: float
    do: Callable[[], None]
    due: float = 0.0

    def befall(self, tally: Tally) -> None:
        """Do it if its time has come; the first time is soon."""
        now = time.monotonic()
        if now < self.due:
            return
        if self.due:
            self.do()
            tally.add(self.name)
            now = time.monotonic()
        self.due = now + self.every_s * random.uniform(0.5, 1.5)


def take_guards(url: str, statements: list[str]) -> None:
    """Take from a database what would not let a variant do wrong."""
    with psycopg.connect(url, autocommit=True) as raw:
        for statement in statements:
            raw.execute(statement)


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
