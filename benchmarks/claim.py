"""Claims at 10,000 and at 1,000,000 queued frames, and frames a second claimed and settled.

1,000 accounts × 3 priorities, of which one lane in ten has work, 8 keys, packs of 8 filled from other accounts.
The plain alternative is the queue everybody writes first, ORDER BY id … FOR UPDATE SKIP LOCKED on the same table,
which knows neither lanes nor keys: measured in turns with ours, it is a yardstick for the machine.

Then four processes claim packs of 16 and settle each beside the next claim, as a worker does, nothing rendered, a
sweep beside them; and the verbs on a job of a million frames.
"""

import hashlib
import multiprocessing
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from benchmarks import harness
from benchmarks.harness import Target, quantile, say
from farm import jobs, queue, submissions, sweep
from farm.accounts import Caller
from farm.catalog import PackLimit
from farm.db import direct, engine, transaction
from farm.ids import public
from farm.queue import ClaimedPack, StoredFrame
from farm.settings import settings
from farm.submissions import Submission

PRIORITIES = (9, 5, 1)
SHAPES = [(64, 64), (96, 64), (64, 96), (96, 96)]
SPECS = [{"width": w, "height": h, "steps": s} for w, h in SHAPES for s in (10, 20)]  # 8 keys
FRAMES_A_JOB = 10_000
LIMITS = {"starter": PackLimit(frames=8, pixels=1 << 30)}
IN_HAND = 6  # packs that a worker has on its shelf before it claims no more: workers/run.py
LARGE = {"starter": PackLimit(frames=16, pixels=1 << 30)}

PLAIN = """
UPDATE frames SET status = 'claimed', pack_id = :pack WHERE id = ANY (ARRAY (
    SELECT id FROM frames WHERE status = 'queued' AND id > :after ORDER BY id LIMIT 8 FOR UPDATE SKIP LOCKED))
"""


@dataclass(frozen=True)
class Scale:
    """How large the run is."""

    accounts: int
    few: int
    many: int
    claims: int
    settle_s: float
    large_job: int


FULL = Scale(accounts=1000, few=10_000, many=1_000_000, claims=1000, settle_s=20, large_job=1_000_000)
QUICK = Scale(accounts=100, few=1_000, many=50_000, claims=200, settle_s=5, large_job=50_000)


def main() -> int:
    scale = QUICK if harness.options(__doc__).quick else FULL
    with harness.services(FARM_MAX_COUNT="2000000", FARM_LEASE_S="3600") as folder:
        owners = harness.callers(scale.accounts)
        _empty_lanes(owners[scale.accounts // 10 :])
        busy = owners[: scale.accounts // 10]
        figures: dict[str, float] = {}
        queued = 0
        for name, frames in (("few", scale.few), ("many", scale.many)):
            _fill(busy, frames - queued)
            queued = frames
            ours, plain = _claim_and_release(scale.claims)
            figures |= {f"p{q}_ms_{name}": 1000 * quantile(ours, q / 100) for q in (50, 99)}
            figures[f"plain_p50_ms_{name}"] = 1000 * quantile(plain, 0.5)
        figures["p50_ratio"] = figures["p50_ms_many"] / figures["p50_ms_few"]
        figures["p99_ratio"] = figures["p99_ms_many"] / figures["p99_ms_few"]
        figures |= _settled(scale, str(folder))
        figures |= _verbs(owners[0], scale.large_job)
        with transaction() as db:
            figures["deadlocks"] = db.scalar(
                text("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
            )
        say("checking the books")
    return harness.report(
        "claim",
        figures,
        [
            Target("p50_ratio", at_most=1.5),
            Target("p99_ratio", at_most=2.5),
            Target("settled_frames_per_s", at_least=4000),
            Target("deadlocks", at_most=0),
            *(Target(f"{verb}_ms", at_most=50) for verb in ("pause", "resume", "priority", "cancel")),
        ],
    )


def _empty_lanes(owners: list[Caller]) -> None:
    """Lanes that had work once: a job of one frame in each class, cancelled."""
    say(f"{len(owners) * len(PRIORITIES)} lanes that are empty")
    for owner in owners:
        with transaction() as db:
            for priority in PRIORITIES:
                job, _ = submissions.submit(db, owner, Submission(spec={"prompt": "x"}, priority=priority))
                jobs.cancel(db, owner.account_id, job)
    sweep.tidy()


def _fill(owners: list[Caller], frames: int) -> None:
    """Queue frames in every lane of these accounts, each job with some of the 8 keys."""
    say(f"{frames} more queued frames in {len(owners) * len(PRIORITIES)} lanes")
    rng = random.Random(frames)
    lanes = [(owner, priority) for owner in owners for priority in PRIORITIES]
    share = max(1, frames // len(lanes))
    for owner, priority in lanes:
        left = share
        while left > 0:
            count = min(left, FRAMES_A_JOB)
            left -= count
            some = rng.sample(SPECS, min(4, count))
            specs = [
                {**spec, "prompt": f"picture {k}", "count": count // len(some)} for k, spec in enumerate(some)
            ]
            specs[0]["count"] += count - sum(spec["count"] for spec in specs)
            with transaction() as db:
                submissions.submit(db, owner, Submission(specs=specs, priority=priority))
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))


def _claim_and_release(claims: int) -> tuple[list[float], list[float]]:
    """Seconds of our claims and of plain ones, in turns, their transactions included; all frames go back."""
    say(f"{claims} claims, and as many plain ones")
    ours: list[float] = []
    plain: list[float] = []
    packs: list[ClaimedPack] = []
    for number in range(claims):
        started = time.perf_counter()
        pack = _claim("bench", LIMITS)
        ours.append(time.perf_counter() - started)
        assert pack is not None
        packs.append(pack)
        plain.append(_claim_plainly(pack.id))
        if number % 25 == 24:
            with transaction() as db:
                queue.release(db, [p.id for p in packs])
            packs.clear()
            sweep.tidy()
    return ours[claims // 10 :], plain[claims // 10 :]  # without the first, which plan


def _claim_plainly(pack: int) -> float:
    """Seconds of a claim by an UPDATE without lanes, keys and fairness; rolled back."""
    with Session(engine()) as db:
        started = time.perf_counter()
        db.execute(text("SET LOCAL synchronous_commit = off"))
        db.execute(text(PLAIN), {"pack": pack, "after": UUID(int=0)})
        seconds = time.perf_counter() - started
        db.rollback()
    return seconds


def _claim(worker: str, limits: dict[str, PackLimit]) -> ClaimedPack | None:
    with direct() as db:
        return queue.claim_pack(db, models=["starter"], worker=worker, limits=limits)


def _settled(scale: Scale, folder: str) -> dict[str, float]:
    """Frames a second that four processes claim and settle, while a sweep folds and relays."""
    say(f"four processes claim and settle for {scale.settle_s:g} s")
    with harness.process([sys.executable, "-c", harness.SWEEP], log=Path(folder) / "sweep.log"):
        context = multiprocessing.get_context("spawn")
        with context.Pool(4) as pool:
            pool.map(_warm, range(4))
            results = pool.starmap(_work, [(k, scale.settle_s) for k in range(4)], chunksize=1)
    frames = sum(n for n, _ in results)
    seconds = max(s for _, s in results)
    return {"settled_frames_per_s": frames / seconds, "settled_frames": frames}


def _warm(_number: int) -> None:
    with transaction() as db:
        db.execute(text("SELECT 1"))


def _work(number: int, seconds: float) -> tuple[int, float]:
    """As a worker does it: a thread of its own settles what is ready, while the next packs are claimed."""
    started = time.monotonic()
    rendered: SimpleQueue[ClaimedPack | None] = SimpleQueue()
    room = threading.Semaphore(IN_HAND)
    with ThreadPoolExecutor(1) as shelf:
        booked = shelf.submit(_settle_all, rendered, room)
        while time.monotonic() - started < seconds and not booked.done():
            room.acquire()
            if (pack := _claim(f"bench-{os.getpid()}", LARGE)) is None:
                break
            rendered.put(pack)
        rendered.put(None)
        settled = booked.result()
    return settled, time.monotonic() - started


def _settle_all(rendered: "SimpleQueue[ClaimedPack | None]", room: threading.Semaphore) -> int:
    """Settle packs until there comes none; several at once if they are there already."""
    settled = 0
    while (pack := rendered.get()) is not None:
        packs = [pack]
        with suppress(Empty):
            while sum(len(p.frames) for p in packs) + LARGE["starter"].frames <= settings().settle_at_once:
                if (pack := rendered.get_nowait()) is None:
                    rendered.put(None)
                    break
                packs.append(pack)
        settled += _settle(packs)
        room.release(len(packs))
    return settled


def _settle(packs: Sequence[ClaimedPack]) -> int:
    with direct() as db:
        result = queue.settle(db, [_stored(pack, k) for pack in packs for k in range(len(pack.frames))])
    if result.over:
        with transaction() as db:
            queue.finish(db, sorted(result.over))
    return len(result.done)


def _stored(pack: ClaimedPack, k: int) -> StoredFrame:
    """What a worker would say of this frame, had it rendered it."""
    frame = pack.frames[k]
    digest = hashlib.sha256(frame.id.bytes).digest()
    return StoredFrame(
        frame_id=frame.id,
        job_id=frame.job_id,
        pack_id=pack.id,
        key=f"v1/{frame.account_id.hex}/{digest.hex()}.png",
        format="png",
        sha256=digest,
        pixel_sha256=digest,
        bytes=1000,
        width=frame.spec.width,
        height=frame.spec.height,
    )


def _verbs(owner: Caller, frames: int) -> dict[str, float]:
    """Milliseconds of each verb on one large job, its commit included: the median of seven."""
    say(f"a job of {frames} frames")
    times: dict[str, list[float]] = {"pause": [], "resume": [], "priority": [], "cancel": []}
    with transaction() as db:
        job, _ = submissions.submit(
            db, owner, Submission(spec={"prompt": "x", "count": frames}, priority="bulk")
        )
    say(f"the verbs on {public('job', job)}")
    for turn in range(7):
        _timed(times["pause"], lambda db: jobs.pause(db, owner.account_id, job))
        _timed(times["resume"], lambda db: jobs.resume(db, owner.account_id, job))
        _timed(times["priority"], lambda db, to=turn % 9: jobs.reprioritise(db, owner.account_id, job, to))
    _timed(times["cancel"], lambda db: jobs.cancel(db, owner.account_id, job))
    return {f"{verb}_ms": 1000 * quantile(seconds, 0.5) for verb, seconds in times.items()}


def _timed(times: list[float], verb) -> None:
    started = time.perf_counter()
    with transaction() as db:
        verb(db)
    times.append(time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
