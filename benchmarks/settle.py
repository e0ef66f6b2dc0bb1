"""Settling with 8 processes, packs of 1 and of 16, against a bare INSERT of the same rows in the same run.

Eight processes claim their packs first; what is timed is queue.settle() and its commit, with fsync, as a worker calls
it: the fence, frames done, images, charges with their checks and triggers, counts and events. The bare side
inserts the very rows that settle wrote (image, usage, count, event), in one statement and one transaction a pack,
prepared before, into copies of those tables that have their indexes and nothing else: no frame is touched, nothing is
checked. Both take turns with the same processes; ratios are medians of these turns. Between turns the sweep relays
and folds.

Then 10 M more rows of usage, in this month's partition, and the packs of 16 again. Those rows are taken out, as they
have no frames, and the packs of 16 are settled once more without them: a machine that gets slower or faster meanwhile
does so on both sides.
"""

import json
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from sqlalchemy import text

from benchmarks import harness
from benchmarks.harness import Target, ratio, say
from farm import queue, submissions, sweep
from farm.accounts import Caller
from farm.catalog import PackLimit
from farm.db import engine, transaction
from farm.queue import ClaimedPack, StoredFrame
from farm.submissions import Submission

PROCESSES = 8
TABLES = ("images", "usage", "counts", "outbox")


@dataclass(frozen=True)
class Scale:
    """How large the run is. Packs are a process's, in one turn."""

    turns: int
    packs_of_1: int
    packs_of_16: int
    rows: int


FULL = Scale(turns=5, packs_of_1=200, packs_of_16=100, rows=10_000_000)
QUICK = Scale(turns=1, packs_of_1=40, packs_of_16=20, rows=100_000)

BARE = " ".join(
    ["WITH", ", ".join(
        f"{t}_ AS (INSERT INTO bare_{t} SELECT * FROM json_populate_recordset(NULL::bare_{t}, CAST(:{t} AS json)))"
        for t in TABLES
    ), "SELECT 1"]
)  # fmt: skip
WRITTEN = """
SELECT (SELECT json_agg(u) FROM usage AS u WHERE u.frame_id = ANY(:frames))::text AS usage,
       (SELECT json_agg(i) FROM images AS i WHERE i.key = ANY(:keys))::text AS images
"""
# UUIDv7s that rise with time, of this month and of jobs nobody submitted
PRESENT = """
INSERT INTO usage (frame_id, account_id, job_id, model, method, currency, price_id, rate, quantity, amount, at)
SELECT (lpad(to_hex((extract(epoch FROM date_trunc('month', now())) * 1000)::bigint + n / 100), 12, '0')
        || '7000' || '8000' || lpad(to_hex(n), 12, '0'))::uuid,
       u.account_id, u.job_id, u.model, u.method, u.currency, u.price_id, u.rate, u.quantity, u.amount, u.at
FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS n, (SELECT * FROM usage LIMIT 1) AS u
"""


def main() -> int:
    scale = QUICK if harness.options(__doc__).quick else FULL
    with harness.services(FARM_MAX_COUNT="2000000", FARM_LEASE_S="3600", FARM_POOL_SIZE="2"):
        owners = harness.callers(PROCESSES)
        with transaction() as db:
            for table in TABLES:
                db.execute(
                    text(f"CREATE TABLE bare_{table} (LIKE {table} INCLUDING DEFAULTS INCLUDING INDEXES)")
                )
        workers = [_Worker(number) for number in range(PROCESSES)]
        try:
            _turn(workers, owners, size=16, packs=5)  # plans, and pages in memory
            ones = [_turn(workers, owners, size=1, packs=scale.packs_of_1) for _ in range(scale.turns)]
            say("packs of 16")
            many = [_turn(workers, owners, size=16, packs=scale.packs_of_16) for _ in range(scale.turns)]
            _add_rows(scale.rows)
            present = [_turn(workers, owners, size=16, packs=scale.packs_of_16) for _ in range(scale.turns)]
            _take_rows_out()
            many += [_turn(workers, owners, size=16, packs=scale.packs_of_16) for _ in range(scale.turns)]
        finally:
            for worker in workers:
                worker.stop()
        say("checking the books")
    alone = ratio(*_columns(many))
    figures = {
        "frames_per_s_in_1": median(ours for ours, _ in ones),
        "bare_per_s_in_1": median(bare for _, bare in ones),
        "ratio_in_1": ratio(*_columns(ones)),
        "frames_per_s_in_16": median(ours for ours, _ in many),
        "bare_per_s_in_16": median(bare for _, bare in many),
        "ratio_in_16": alone,
        f"frames_per_s_with_{scale.rows}_rows": median(ours for ours, _ in present),
        "ratio_with_rows": ratio(*_columns(present)),
        "kept_with_rows": ratio(*_columns(present)) / alone,
        "kept_with_rows_not_against_bare": median(x for x, _ in present) / median(x for x, _ in many),
    }
    return harness.report(
        "settle",
        figures,
        [
            Target("ratio_in_1", at_least=0.5),
            Target("ratio_in_16", at_least=0.5),
            Target("frames_per_s_in_16", at_least=6000),
            Target("kept_with_rows", at_least=0.9),
        ],
    )


def _columns(turns: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [ours for ours, _ in turns], [bare for _, bare in turns]


def _turn(workers: list["_Worker"], owners: list[Caller], *, size: int, packs: int) -> tuple[float, float]:
    """Frames a second settled, and inserted barely, by all processes together."""
    frames = PROCESSES * packs * size
    for owner in owners:
        with transaction() as db:
            asked = {"prompt": "x", "count": packs * size}
            submissions.submit(db, owner, Submission(spec=asked, **_reuse()))
    _all(workers, ("claim", size, packs))
    began = time.perf_counter()
    _all(workers, ("settle",))
    ours = frames / (time.perf_counter() - began)
    _all(workers, ("prepare",))
    began = time.perf_counter()
    _all(workers, ("bare",))
    bare = frames / (time.perf_counter() - began)
    while sweep.tidy():
        pass
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("CHECKPOINT"))
    say(f"packs of {size}: {ours:,.0f} frames/s, bare {bare:,.0f}")
    return ours, bare


def _reuse() -> dict[str, bool]:
    """Equal prompts are rendered each, where jobs may ask for that."""
    return {"reuse": False} if "reuse" in Submission.model_fields else {}


def _all(workers: list["_Worker"], command: tuple[Any, ...]) -> None:
    """Let all processes do this at once, and wait for the last."""
    for worker in workers:
        worker.pipe.send(command)
    for worker in workers:
        answer = worker.pipe.recv()
        if answer is not None:
            raise RuntimeError(answer)


def _add_rows(rows: int) -> None:
    say(f"{rows} rows of usage")
    step = 500_000
    for first in range(1, rows + 1, step):
        with transaction() as db:
            db.execute(text("SET LOCAL session_replication_role = replica"))
            db.execute(text(PRESENT), {"first": first, "last": min(rows, first + step - 1)})
    _vacuum()


def _vacuum() -> None:
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE usage"))
        connection.execute(text("CHECKPOINT"))


def _take_rows_out() -> None:
    with transaction() as db:
        db.execute(text("SET LOCAL session_replication_role = replica"))
        db.execute(text("SET LOCAL enable_seqscan = on"))
        db.execute(text("DELETE FROM usage WHERE pack_id IS NULL"))
    _vacuum()


# ------------------------------------------------------------------------------------------------ a process


class _Worker:
    """One of the processes, and the pipe it takes commands from."""

    def __init__(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(number, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def stop(self) -> None:
        self.pipe.close()
        self._process.join(10)


def _serve(number: int, pipe: Connection) -> None:
    packs: list[ClaimedPack] = []
    stored: list[list[StoredFrame]] = []
    bare: list[dict[str, str]] = []
    while True:
        try:
            command, *facts = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            match command:
                case "claim":
                    packs = [_claim(number, facts[0]) for _ in range(facts[1])]
                    stored = [[_stored(pack, k) for k in range(len(pack.frames))] for pack in packs]
                case "settle":
                    for frames in stored:
                        with transaction() as db:
                            done = queue.settle(db, frames, gpu_ms={frames[0].pack_id: 40}, commit=True)
                        assert len(done.done) == len(frames)
                case "prepare":
                    bare = [_written(pack, frames) for pack, frames in zip(packs, stored, strict=True)]
                case "bare":
                    for rows in bare:
                        with transaction() as db:
                            db.execute(text(BARE), rows)
            pipe.send(None)
        except Exception as e:
            pipe.send(f"{type(e).__name__}: {e}")


def _claim(number: int, size: int) -> ClaimedPack:
    limits = {"starter": PackLimit(frames=size, pixels=1 << 40)}
    with transaction() as db:
        pack = queue.claim_pack(db, models=["starter"], worker=f"bench-{number}", limits=limits)
    assert pack is not None
    assert len(pack.frames) == size
    return pack


def _stored(pack: ClaimedPack, k: int) -> StoredFrame:
    frame = pack.frames[k]
    digest = frame.id.bytes * 2
    key = f"v1/{frame.account_id.hex}/{digest.hex()}.png"
    return StoredFrame(frame.id, frame.job_id, pack.id, key, "png", digest, digest, 1000, 64, 64)


def _written(pack: ClaimedPack, frames: list[StoredFrame]) -> dict[str, str]:
    """The rows that settling a pack wrote, as JSON."""
    with transaction() as db:
        facts = {"frames": [f.frame_id for f in frames], "keys": [f.key for f in frames]}
        row = db.execute(text(WRITTEN), facts).one()
    now = json.loads(row.usage)[0]["at"]
    owners = {f.id: (f.account_id, f.job_id, f.index) for f in pack.frames}
    counts = {"id": pack.id, "job_id": str(frames[0].job_id), "done": len(frames), "failed": 0, "cancelled": 0,
              "reused": 0, "waiting": 0, "charged": "0.004", "freed": "0.004", "folded": False, "at": now}  # fmt: skip
    outbox = [
        {"id": random.getrandbits(62), "account_id": str(owners[f.frame_id][0]), "job_id": str(owners[f.frame_id][1]),
         "frame_id": str(f.frame_id), "kind": "frame.done", "data": {"index": owners[f.frame_id][2]}, "at": now}
        for f in frames
    ]  # fmt: skip
    return {
        "usage": row.usage,
        "images": row.images,
        "counts": json.dumps([counts]),
        "outbox": json.dumps(outbox),
    }


if __name__ == "__main__":
    sys.exit(main())
