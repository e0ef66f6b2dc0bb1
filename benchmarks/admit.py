"""Admissions on one hot account with a budget: 32 clients at once, with nothing and with a million open frames.

Four processes of eight clients each send jobs of one frame, each in a transaction of its own, for a while: how many a
second, and how long one takes, waiting for the others included. The same on an account without a budget is the
yardstick. A sweep folds beside them.

Then the limit is set a few hundred jobs above what is held, and the 32 send until each was refused many times: what
was granted has to be exactly what there was room for, and spent and held never pass the limit.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sqlalchemy import text

from benchmarks import harness
from benchmarks.harness import Target, quantile, say
from farm import accounts, budgets, submissions
from farm.accounts import Caller
from farm.db import engine, transaction
from farm.errors import BudgetExceeded
from farm.submissions import Submission

PROCESSES, CLIENTS = 4, 8  # of each
SPEC: dict[str, Any] = {"prompt": "a red circle on a blue background", "steps": 1}
FRAME = Decimal("0.0000125")  # what one of these costs: 64 × 64 in one step at 0.0032
WITHOUT = Decimal(10) ** 9  # a limit nobody reaches
REFUSED = 20  # times in a row, until a client gives up


@dataclass(frozen=True)
class Scale:
    """How large the run is."""

    seconds: float
    open_jobs: int
    frames_a_job: int
    room: int


FULL = Scale(seconds=20, open_jobs=10, frames_a_job=100_000, room=2000)
QUICK = Scale(seconds=4, open_jobs=2, frames_a_job=20_000, room=300)


def main() -> int:
    scale = QUICK if harness.options(__doc__).quick else FULL
    env = {"FARM_MAX_COUNT": "2000000", "FARM_POOL_SIZE": str(CLIENTS)}
    with harness.services(**env) as folder:
        plain, hot = harness.callers(2)
        _limit(hot, WITHOUT)
        context = multiprocessing.get_context("spawn")
        sweep = harness.process([sys.executable, "-c", harness.SWEEP], log=folder / "sweep.log")
        together = context.Barrier(PROCESSES)
        with sweep, context.Pool(PROCESSES, _join, (together,)) as pool:
            pool.map(_warm, range(PROCESSES), chunksize=1)
            figures = _rate(pool, plain, scale, "without_budget")
            figures |= _rate(pool, hot, scale, "few")
            _fill(hot, scale)
            figures |= _rate(pool, hot, scale, "many")
            figures |= _exactly(pool, hot, scale)
        say("checking the books")
    return harness.report(
        "admit",
        figures,
        [
            Target("jobs_per_s_few", at_least=300),
            Target("jobs_per_s_many", at_least=300),
            Target("above_the_limit", at_most=0),
            Target("room_not_granted", at_most=0),
        ],
    )


def _limit(owner: Caller, limit: Decimal) -> None:
    with transaction() as db:
        budgets.put(db, accounts.find(db, owner.account), limit)


def _fill(owner: Caller, scale: Scale) -> None:
    """Open frames of one account."""
    say(f"{scale.open_jobs * scale.frames_a_job} open frames")
    for number in range(scale.open_jobs):
        with transaction() as db:
            spec = {**SPEC, "prompt": f"picture {number}", "count": scale.frames_a_job}
            submissions.submit(db, owner, Submission(spec=spec))
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))


def _rate(pool: Any, owner: Caller, scale: Scale, name: str) -> dict[str, float]:
    """Jobs a second that all clients together have admitted, and how long one takes."""
    say(f"{PROCESSES * CLIENTS} clients for {scale.seconds:g} s, {name.replace('_', ' ')}")
    arguments = [(owner, scale.seconds)] * PROCESSES
    times = [t for part in pool.starmap(_send_for, arguments, chunksize=1) for t in part]
    return {
        f"jobs_per_s_{name}": len(times) / scale.seconds,
        f"p50_ms_{name}": 1000 * quantile(times, 0.5),
        f"p99_ms_{name}": 1000 * quantile(times, 0.99),
    }


def _exactly(pool: Any, owner: Caller, scale: Scale) -> dict[str, float]:
    """How far what was granted is from the room there was, and what is spent and held from the limit."""
    with transaction() as db:
        (use,) = budgets.every(db, owner.account_id)
    limit = use.spent + use.held + scale.room * FRAME + FRAME / 2  # half a job more: nobody gets half a job
    _limit(owner, limit)
    say(f"{PROCESSES * CLIENTS} clients for room of {scale.room} jobs")
    results = pool.starmap(_send_until_refused, [(owner,)] * PROCESSES, chunksize=1)
    granted = sum(g for g, _ in results)
    above = (
        "SELECT coalesce(sum(held), 0) + (SELECT coalesce(sum(amount), 0) FROM usage WHERE account_id = :a)"
    )
    with transaction() as db:
        db.execute(text("SET LOCAL enable_seqscan = on"))
        gone = db.scalar(text(f"{above} FROM jobs WHERE account_id = :a"), {"a": owner.account_id})
    return {
        "granted": granted,
        "refused": sum(r for _, r in results),
        "above_the_limit": float(max(Decimal(0), gone - limit)),
        "room_not_granted": abs(granted - scale.room),
    }


# ------------------------------------------------------------------------------------------------ the clients


_started: Any = None  # the barrier that these processes meet at: each takes one task, and all begin at once


def _join(together: Any) -> None:
    global _started  # noqa: PLW0603 - a barrier reaches a pool's process only when it is made
    _started = together


def _warm(_number: int) -> None:
    _all(lambda: [_touch()])
    _started.wait(60)


def _touch() -> None:
    with transaction() as db:
        db.execute(text("SELECT 1"))


def _send_for(owner: Caller, seconds: float) -> list[float]:
    """Seconds of each admission of this process's clients."""
    _started.wait(60)
    end = time.monotonic() + seconds

    def client() -> list[float]:
        times = []
        while (started := time.monotonic()) < end:
            _admit(owner)
            times.append(time.monotonic() - started)
        return times

    return _all(client)


def _send_until_refused(owner: Caller) -> tuple[int, int]:
    """Jobs that were granted to this process's clients, and refused."""
    _started.wait(60)

    def client() -> list[bool]:
        answers: list[bool] = []
        while len(answers) < REFUSED or any(answers[-REFUSED:]):
            try:
                _admit(owner)
                answers.append(True)
            except BudgetExceeded:
                answers.append(False)
        return answers

    answers = _all(client)
    return sum(answers), len(answers) - sum(answers)


def _admit(owner: Caller) -> None:
    with transaction() as db:
        submissions.submit(db, owner, Submission(spec=SPEC))


def _all(client: Callable[[], list[Any]]) -> list[Any]:
    """What this process's clients return, together."""
    with ThreadPoolExecutor(CLIENTS) as threads:
        running = [threads.submit(client) for _ in range(CLIENTS)]
        return [item for future in running for item in future.result()]


if __name__ == "__main__":
    sys.exit(main())
