"""Closing a month of 1,000,000 rows of usage, batch after batch, and how much memory that takes.

The charges are real: jobs that were submitted, claimed and settled; then copied a thousand times over within the
database, with the triggers off, and spread over the last month. Then it closes in batches, as the farm does it, while
another account's packs are claimed and settled beside it. The audit at the end proves that lines partition the rows.
Memory is what the closing process grows by between the tenth batch and the last. cpu_s is what the backends that closed
took of a core: what else the machine does is not in it.

Then all of these rows are exported as NDJSON, as the API writes them, and the margin of the month is computed.
"""

import resource
import sys
import threading
import time
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import psutil
from sqlalchemy import text

from benchmarks import harness
from benchmarks.harness import Target, quantile, say
from farm import jobs, margin, queue, statements, submissions, sweep
from farm.accounts import Caller
from farm.api.usage import ndjson
from farm.catalog import PackLimit
from farm.db import engine, transaction
from farm.queue import ClaimedPack, StoredFrame
from farm.submissions import Submission
from farm.tables import Account

FULL, QUICK = 1_000_000, 50_000
LIMITS = {"starter": PackLimit(frames=1000, pixels=1 << 40)}
SEED = 1000  # frames that are really settled; the others are copies of them

NOW = datetime.now(UTC)
MONTH = (date(NOW.year, NOW.month, 1) - timedelta(days=1)).replace(day=1)

# a copied frame keeps its job and gets the next ids of it; image, charge, event and counts with it
COPIES = (
    "SET LOCAL session_replication_role = replica",
    "SET LOCAL enable_seqscan = on",
    """INSERT INTO frames (id, job_id, index, key_no, account_id, status, seed, work, quantity, price_id, image_id,
                           ended_at, fingerprint, spec)
       SELECT (left(j.id::text, 30) || lpad(to_hex(n + 1), 6, '0'))::uuid, j.id, n, f.key_no, f.account_id, 'done', n,
              f.work, f.quantity, f.price_id, f.image_id, f.ended_at, f.fingerprint, f.spec
       FROM jobs AS j CROSS JOIN generate_series(CAST(:from AS integer), CAST(:to AS integer) - 1) AS n
       JOIN frames AS f ON f.id = (left(j.id::text, 30) || lpad(to_hex(n % :seed + 1), 6, '0'))::uuid
       WHERE j.account_id = :account""",
    """INSERT INTO usage (frame_id, account_id, job_id, model, method, currency, price_id, rate, quantity, amount,
                          pack_id, at)
       SELECT f.id, f.account_id, f.job_id, u.model, u.method, u.currency, u.price_id, u.rate, u.quantity, u.amount,
              u.pack_id, u.at
       FROM frames AS f
       JOIN usage AS u ON u.frame_id = (left(f.job_id::text, 30) || lpad(to_hex(f.index % :seed + 1), 6, '0'))::uuid
       WHERE f.account_id = :account AND f.index >= :from AND f.index < :to""",
    """INSERT INTO events (number, account_id, job_id, frame_id, kind, data, at)
       SELECT (SELECT max(number) FROM events) + row_number() OVER (ORDER BY f.id), f.account_id, f.job_id, f.id,
              'frame.done', '{}', f.ended_at
       FROM frames AS f
       WHERE f.account_id = :account AND f.index >= :from AND f.index < :to""",
)
PACK, GPU_MS = 16, 640  # frames of a pack, and what they took
SPREAD = (
    "SET LOCAL session_replication_role = replica",
    "SET LOCAL enable_seqscan = on",
    # a pack at a time, and not in the order of the ids: within six hours
    """UPDATE usage AS u
       SET at = t.at, pack_id = ((extract(epoch FROM t.at) * 1000000)::bigint << 12) | (t.pack & 4095)
       FROM (
           SELECT frame_id, pack, CAST(:month AS timestamp) AT TIME ZONE 'UTC'
                  + abs(hashint4(pack)::bigint) % 21600 * interval '1 second'
                  + pack * :pack * (interval '27 days' / :frames) AS at
           FROM (SELECT frame_id, (('x' || right(frame_id::text, 6))::bit(24)::integer - 1) / :pack AS pack
                 FROM usage WHERE account_id = :account) AS n
       ) AS t
       WHERE u.account_id = :account AND u.frame_id = t.frame_id""",
    """INSERT INTO packs (id, worker, model, call_key, priority, frames, work, claimed_at, lease_until, gpu_ms, outcome,
                          closed_at)
       SELECT u.pack_id, 'bench', min(u.model), 'bench', 5, count(*), sum(f.work), max(u.at) - interval '1 second',
              max(u.at), :gpu_ms, 'settled', max(u.at)
       FROM usage AS u JOIN frames AS f ON f.id = u.frame_id
       WHERE u.account_id = :account
       GROUP BY u.pack_id""",
    "UPDATE jobs SET frames = :frames WHERE account_id = :account",
    """UPDATE counts SET done = :frames, charged = (SELECT sum(amount) FROM usage WHERE account_id = :account)
       WHERE job_id = (SELECT id FROM jobs WHERE account_id = :account)""",
    """UPDATE tallies SET spent = (SELECT sum(amount) FROM usage WHERE account_id = :account)
       WHERE account_id = :account AND month IS NOT NULL""",
)


def main() -> int:
    rows = QUICK if harness.options(__doc__).quick else FULL
    with harness.services(FARM_MAX_COUNT="2000000", FARM_LEASE_S="3600"):
        caller, other = harness.callers(2)
        _fill(caller, rows)
        figures = _close(caller, other)
        with transaction() as db:
            bill = statements.find(db, db.get_one(Account, caller.account_id), MONTH)
        assert sum(line.frames for line in bill.lines) == rows
        assert bill.total == sum((line.amount for line in bill.lines), Decimal(0))
        figures |= _export(caller, rows)
        figures |= _margin(caller, rows)
        say(f"{bill.total} {bill.currency}, exactly {bill.exact:f}; checking the books")
    figures["rows_per_s"] = rows / figures["close_s"]
    for name in ("close_s", "close_cpu_s", "export_s", "margin_s"):
        figures[f"{name}_of_1M"] = figures.pop(name) * FULL / rows
    return harness.report(
        "statement",
        figures,
        [Target("close_s_of_1M", at_most=30), Target("memory_growth_mib", at_most=16)],
    )


def _fill(caller: Caller, rows: int) -> None:
    say(f"{rows} rows of usage")
    specs = [{"prompt": "x", "steps": 1 + k % 40, "count": SEED // 40} for k in range(40)]
    with transaction() as db:
        submissions.submit(db, caller, Submission(specs=specs, **_reuse()))
    while (pack := _claim()) is not None:
        _settle(pack)
    with transaction() as db:
        queue.finish(db, [job.id for job in jobs.every(db, caller.account_id)])
    sweep.tidy()
    for start in range(SEED, rows, 100_000):
        _run(
            COPIES,
            {"from": start, "to": min(rows, start + 100_000), "seed": SEED, "account": caller.account_id},
        )
    facts = {"month": MONTH, "account": caller.account_id, "frames": rows, "pack": PACK, "gpu_ms": GPU_MS}
    _run(SPREAD, facts)
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))


def _reuse() -> dict[str, bool]:
    """Equal prompts are rendered each, where jobs may ask for that."""
    return {"reuse": False} if "reuse" in Submission.model_fields else {}


def _run(statements_: tuple[str, ...], facts: dict[str, object]) -> None:
    with transaction() as db:
        for statement in statements_:
            names = {name: value for name, value in facts.items() if f":{name}" in statement}
            db.execute(text(statement), names)


def _claim() -> ClaimedPack | None:
    with transaction() as db:
        return queue.claim_pack(db, models=["starter"], worker="bench", limits=LIMITS)


def _settle(pack: ClaimedPack) -> None:
    with transaction() as db:
        queue.settle(db, [_stored(pack, k) for k in range(len(pack.frames))])


def _stored(pack: ClaimedPack, k: int) -> StoredFrame:
    frame = pack.frames[k]
    digest = frame.id.bytes * 2
    key = f"v1/{frame.account_id.hex}/{digest.hex()}.png"
    return StoredFrame(frame.id, frame.job_id, pack.id, key, "png", digest, digest, 1000, 64, 64)


def _close(caller: Caller, other: Caller) -> dict[str, float]:
    """Close the month while another account's packs are settled, and say how that went."""
    say("closing, while another account's packs are settled")
    stop, settles, first = threading.Event(), [], threading.Event()
    work = threading.Thread(target=_settle_beside, args=(other, stop, first, settles))
    with transaction() as db:
        account = db.get_one(Account, caller.account_id)
    work.start()
    assert first.wait(60)
    batches, sizes, closed, cpu_s = [], [], False, 0.0
    started = time.perf_counter()
    while not closed:
        began = time.perf_counter()
        with transaction() as db:
            backend = psutil.Process(db.scalar(text("SELECT pg_backend_pid()")))
            before = sum(backend.cpu_times()[:2])
            closed = statements.close_further(db, account, MONTH)
            cpu_s += sum(backend.cpu_times()[:2]) - before
        batches.append(time.perf_counter() - began)
        sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    seconds = time.perf_counter() - started
    stop.set()
    work.join()
    with transaction() as db:
        assert statements.close_further(db, account, MONTH)
    return {
        "close_s": seconds,
        "close_cpu_s": cpu_s,
        "batches": len(batches),
        "batch_p50_ms": 1000 * quantile(batches, 0.5),
        "batch_max_ms": 1000 * max(batches),
        "memory_growth_mib": sizes[-1] - sizes[min(10, len(sizes) - 1)],
        "settle_beside_p50_ms": 1000 * quantile(settles, 0.5),
        "settle_beside_max_ms": 1000 * max(settles),
    }


def _export(caller: Caller, rows: int) -> dict[str, float]:
    say("exporting")
    began, lines, size = time.perf_counter(), 0, 0
    for part in ndjson(caller.account_id, 0, 2 * rows):
        lines, size = lines + part.count("\n"), size + len(part)
    seconds = time.perf_counter() - began
    assert lines == rows, f"{lines} rows"
    return {
        "export_s": seconds,
        "export_rows_per_s": rows / seconds,
        "export_mib_of_1M": size * FULL / rows / 2**20,
    }


def _margin(caller: Caller, rows: int) -> dict[str, float]:
    say("margin of the month")
    since, until = statements.start_of(MONTH), statements.start_of(statements.month_after(MONTH))
    began = time.perf_counter()
    with transaction() as db:
        found = margin.find(db, since=since, until=until)
    seconds = time.perf_counter() - began
    packs = -(-rows // PACK)
    (share,) = [s for s in found.accounts if s.name == caller.account]
    assert (share.frames, share.gpu_us) == (rows, packs * GPU_MS * 1000), share
    return {"margin_s": seconds}


def _settle_beside(
    other: Caller, stop: threading.Event, first: threading.Event, settles: list[float]
) -> None:
    """A worker at leisure: a pack of 16 each tenth of a second."""
    small = {"starter": PackLimit(frames=16, pixels=1 << 40)}
    with transaction() as db:
        submissions.submit(db, other, Submission(spec={"prompt": "x", "count": 20_000}, **_reuse()))
    while not stop.wait(0.1):
        with transaction() as db:
            pack = queue.claim_pack(db, models=["starter"], worker="bench", limits=small)
        if pack is None:
            return
        began = time.perf_counter()
        _settle(pack)
        settles.append(time.perf_counter() - began)
        first.set()


if __name__ == "__main__":
    sys.exit(main())
