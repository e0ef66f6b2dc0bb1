"""What every benchmark stands on: services in a folder of their own, a farm on them, and the report.

Nothing is simulated: Postgres with fsync, the migrated schema with its triggers, Redis, the folder store, the
product's own processes and functions; and at the end the audit must find nothing.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from uuid import UUID

from sqlalchemy import text

from farm import accounts, catalog, db, embedded, jobs, ledger, pricing, submissions, tokens
from farm.accounts import Caller
from farm.settings import settings
from farm.submissions import Submission

SECRET = "a secret of the benchmarks, 32 characters or more"
REPOSITORY = Path(__file__).parent.parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
PROMPTS = tuple(
    f"a {colour} {shape} on a {ground} background"
    for colour in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "triangle")
    for ground in ("white", "black")
)
KEPT = ("FARM_CATALOG", "FARM_MODELS_DIR")  # to measure models of one's own
READY_S = 180  # loading torch and a checkpoint on a busy machine
SWEEP = "import threading; from farm import sweep; sweep.run(threading.Event())"  # what `farm sweep` does

Requests = Sequence[tuple[Caller, Submission]]

# ------------------------------------------------------------------------------------------------ the report


@dataclass(frozen=True)
class Target:
    """What a figure has to reach."""

    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )


def options(doc: str | None) -> argparse.Namespace:
    """Read the command line: --quick, and nothing else."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute, and less exact")
    return parser.parse_args()


def say(line: str) -> None:
    """Tell how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def report(name: str, figures: Mapping[str, float], targets: Sequence[Target]) -> int:
    """Print the figures, and as the last line one JSON object; returns 0 if every target holds."""
    rounded = {key: float(f"{value:.4g}") for key, value in figures.items()}
    held = {t.figure: t.holds(figures[t.figure]) for t in targets}
    for key, value in rounded.items():
        print(f"{key:>48}  {value:g}{'' if held.get(key, True) else '   MISSED'}")
    told = {t.figure: {k: v for k, v in vars(t).items() if k != "figure" and v is not None} for t in targets}
    ok = all(held.values())
    print(json.dumps({"name": name, "ok": ok, "figures": rounded, "targets": told}), flush=True)
    return 0 if ok else 1


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of ratios of runs side by side: what else the machine does hits both."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest-rank quantile: no value that was not measured."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# ------------------------------------------------------------------------------------------------ services


@contextmanager
def services(**env: str) -> Iterator[Path]:
    """Start Postgres and Redis in a temporary folder, migrate, and let FARM_* name them; env adds to it.

    Yields the folder. At the end the audit has to find nothing.
    """
    folder = Path(tempfile.mkdtemp(prefix="farm-bench-"))
    folder.chmod(0o711)  # as root Postgres runs as nobody
    before = dict(os.environ)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    try:
        for name in [n for n in os.environ if n.startswith("FARM_") and n not in KEPT]:
            del os.environ[name]
        os.environ.update({"FARM_SECRET": SECRET, **env})
        forget()
        with embedded.services(folder / "services") as found:
            _point_at(found)
            yield folder
            audit()
            db.engine().dispose()
    except BaseException:
        for log in sorted(folder.glob("*.log")):
            say(f"{log.name} ends with:\n{log.read_text(errors='replace')[-1500:]}")
        raise
    finally:
        os.environ.clear()
        os.environ.update(before)
        forget()
        shutil.rmtree(folder, ignore_errors=True)


def _point_at(found: embedded.Services) -> None:
    from migrations import upgrade

    os.environ["FARM_DATABASE_URL"] = found.database_url
    os.environ["FARM_BROKER_URL"] = found.broker_url
    os.environ["FARM_STORAGE_URL"] = found.storage_url
    forget()
    upgrade(found.database_url)
    with db.transaction() as session:
        assert session.scalar(text("SHOW fsync")) == "on"
        assert session.scalar(text("SHOW session_replication_role")) == "origin"  # triggers fire
        pricing.sync(session, catalog.catalog())


def forget() -> None:
    """Drop what this process remembers of the environment."""
    for cached in (settings, catalog.catalog, tokens.app, tokens._sender):
        cached.cache_clear()


def audit() -> None:
    """Raises AssertionError if the books do not add up."""
    with db.transaction() as session:
        found = ledger.audit(session)
    assert not found, f"{len(found)} violations, the first: {found[0]}"


def callers(count: int) -> list[Caller]:
    """Accounts with a key each."""
    with db.transaction() as session:
        owners = [accounts.create(session, f"bench-{k}") for k in range(count)]
        return [accounts.authenticate(session, accounts.issue_key(session, owner)[1]) for owner in owners]


# ------------------------------------------------------------------------------------------------ the farm


@contextmanager
def process(command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> Iterator[Any]:
    """Run a process of ours; SIGTERM at the end, and SIGKILL to one that does not listen."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=REPOSITORY,
            env={**os.environ, **ONE_THREAD, **(env or {})},
            start_new_session=True,
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def farm(folder: Path, pool: str, *, module: str = "workers") -> Iterator[None]:
    """A sweep, and one worker of this pool on one CPU thread."""
    workers = [sys.executable, "-m", module, "--pool", pool, "--cpus", "1"]
    with (
        process([sys.executable, "-c", SWEEP], log=folder / "sweep.log"),
        process(workers, log=folder / f"worker-{pool}.log") as worker,
    ):
        until(lambda: _is_up(pool), alive(worker, folder / f"worker-{pool}.log"), limit_s=READY_S)
        yield


def _is_up(pool: str) -> bool:
    with db.transaction() as session:
        query = "SELECT count(*) FROM workers WHERE pool = :pool AND state = 'up'"
        return bool(session.scalar(text(query), {"pool": pool}))


def alive(child: Any, log: Path) -> Callable[[], None]:
    """A check that raises RuntimeError once this process has ended."""

    def check() -> None:
        if child.poll() is not None:
            raise RuntimeError(f"it ended with {child.returncode}: {log.read_text()[-2000:]}")

    return check


def until(
    reached: Callable[[], bool],
    check: Callable[[], None] = lambda: None,
    *,
    limit_s: float,
    every_s: float = 0.2,
) -> None:
    """Wait until something is so. Raises TimeoutError if it is not within the limit."""
    deadline = time.monotonic() + limit_s
    while not reached():
        check()
        if time.monotonic() > deadline:
            raise TimeoutError(f"not reached within {limit_s:g} s")
        time.sleep(every_s)


def requests(
    owners: Sequence[Caller], ask: Mapping[str, Any], *, frames: int, a_job: int, priority: int = 5
) -> Requests:
    """Jobs of a_job frames, in turn from each of these accounts, with a prompt of their own."""
    made = []
    for k, first in enumerate(range(0, frames, a_job)):
        count = min(a_job, frames - first)
        asked = {**ask, "prompt": PROMPTS[k % len(PROMPTS)], "seed": first, "count": count}
        # the same seeds in each round, and each time rendered
        body = {"spec": asked, "priority": priority, "reuse": False}
        made.append((owners[k % len(owners)], Submission.model_validate(body)))
    return made


def submit(requests: Requests) -> list[UUID]:
    """Accept all of these in one transaction, so that they are queued at once, and wake their workers."""
    with db.transaction() as session:
        accepted = [submissions.submit(session, caller, submission)[0] for caller, submission in requests]
        models = sorted({m for job in accepted for m in jobs.models_of(session, job)})
    tokens.wake(models)
    return accepted


def finish(accepted: Sequence[UUID], *, limit_s: float = 1800) -> None:
    """Wait until every frame of these jobs is done. Raises AssertionError if one ended otherwise."""
    until(lambda: not how_many(accepted, "ended_at IS NULL"), limit_s=limit_s)
    assert not how_many(accepted, "status <> 'done'"), "frames that are not done"


def how_many(accepted: Sequence[UUID], condition: str) -> int:
    """Frames of these jobs of which an SQL condition is true."""
    query = f"SELECT count(*) FROM frames WHERE job_id = ANY(:jobs) AND {condition}"
    with db.transaction() as session:
        return int(session.scalar(text(query), {"jobs": list(accepted)}) or 0)


def worker_seconds(accepted: Sequence[UUID]) -> float:
    """From the first claim to the last settle of these jobs, by the database's clock."""
    query = """
        SELECT extract(epoch FROM max(f.ended_at) - min(p.claimed_at))
        FROM frames AS f JOIN usage AS u ON u.frame_id = f.id JOIN packs AS p ON p.id = u.pack_id
        WHERE f.job_id = ANY(:jobs)"""
    with db.transaction() as session:
        return float(session.scalar(text(query), {"jobs": list(accepted)}) or 0)
