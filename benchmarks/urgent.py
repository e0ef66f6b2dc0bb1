"""An urgent frame every second while 1,000 bulk frames are queued, on one worker with the starter model.

Each has to be in the very next pack claimed after its commit. A claim that was looking just then cannot have
seen it: packs claimed within LOOK_S of the commit do not count as next. From commit to done it waits for the
rest of the running pack, its own, and the way into the books.

Bulk throughput kept: bulk images a second with urgent frames about, over those without, less the share of the
work that the urgent frames took: bulk / (bulk alone x (1 - urgent share)). All frames cost the same. Rates run
from claim to claim, and stretches without and with urgent frames take turns.

In a queue first in, first out, an urgent frame waits for all that came before: computed from the same run.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median
from uuid import UUID

from sqlalchemy import text

from benchmarks import harness
from benchmarks.harness import Target, quantile, say
from farm import jobs
from farm.accounts import Caller
from farm.db import transaction

MODEL = {"model": "starter"}
BULK, A_JOB = 1000, 250
EVERY_S = 1.0
LOOK_S = 0.05  # a claim takes 2 to 5 ms, more on a busy machine
TARGETS = [
    Target("urgent_in_next_pack_share", at_least=1.0),
    Target("urgent_p95_packs", at_most=2.5),  # the rest of one, its own, and the books
    Target("bulk_throughput_kept", at_least=0.95),
]


@dataclass(frozen=True)
class Pack:
    id: int
    claimed_at: datetime
    frames: int
    urgent: int  # of these frames


@dataclass(frozen=True)
class Urgent:
    """One urgent frame: when it was committed and done, and the pack it was in."""

    committed_at: datetime
    done_at: datetime
    pack_id: int

    @property
    def seconds(self) -> float:
        return (self.done_at - self.committed_at).total_seconds()


@dataclass(frozen=True)
class Stretch:
    """Packs claimed one after the other. The last one only says when the one before was over."""

    packs: Sequence[Pack]

    @property
    def seconds(self) -> float:
        return (self.packs[-1].claimed_at - self.packs[0].claimed_at).total_seconds()

    @property
    def images(self) -> int:
        return sum(p.frames for p in self.packs[:-1])

    @property
    def urgent(self) -> int:
        return sum(p.urgent for p in self.packs[:-1])

    @property
    def pack_s(self) -> float:
        return self.seconds / (len(self.packs) - 1)

    def kept(self, alone: "Stretch") -> float:
        """Bulk throughput kept, against a stretch without urgent frames."""
        bulk_per_s = (self.images - self.urgent) / self.seconds
        return bulk_per_s / (alone.images / alone.seconds * (1 - self.urgent / self.images))


def main() -> int:
    options = harness.options(__doc__)
    rounds, packs = (1, 2) if options.quick else (5, 5)  # the bulk frames last for so many packs of 16
    with harness.services() as folder, harness.farm(folder, "starter"):
        owners = harness.callers(3)
        harness.finish(harness.submit(harness.requests(owners, MODEL, frames=8, a_job=2)))
        bulk = harness.submit(harness.requests(owners[:2], MODEL, frames=BULK, a_job=A_JOB, priority=1))
        say(f"warm, and {BULK} bulk frames are queued")
        spans: list[tuple[int, int]] = []
        sent: dict[UUID, datetime] = {}
        for _ in range(rounds):
            spans.append(_await_packs(packs))
            say(f"{packs} packs of bulk frames alone")
            with _urgent_every_second(owners[2]) as came:
                spans.append(_await_packs(packs))
            sent |= came
            harness.finish(list(came))
            say(f"{packs} packs with {len(came)} urgent frames")
        _cancel(owners, bulk)
        figures = _figures(_packs(list(sent)), spans, _urgents(sent))
    return harness.report("urgent", figures, TARGETS)


def _await_packs(packs: int) -> tuple[int, int]:
    """Wait while this many packs are rendered. Returns the first one's id, and that of the one claimed after."""
    before = _latest_packs()[0]
    harness.until(lambda: len(_latest_packs(after=before)) > packs, limit_s=1800, every_s=0.1)
    claimed = _latest_packs(after=before)
    return claimed[-1], claimed[-1 - packs]


def _latest_packs(after: int = 0) -> list[int]:
    """Ids of the packs claimed later than this one, the newest first; ids rise with time."""
    with transaction() as db:
        return list(
            db.scalars(text("SELECT id FROM packs WHERE id > :after ORDER BY id DESC"), {"after": after})
        )


@contextmanager
def _urgent_every_second(owner: Caller) -> Iterator[dict[UUID, datetime]]:
    """Submit an urgent frame each second. Yields the jobs sent so far, and when each was committed."""
    sent: dict[UUID, datetime] = {}
    over = threading.Event()

    def send() -> None:
        while not over.wait(EVERY_S):
            request = harness.requests([owner], MODEL, frames=1, a_job=1, priority=9)
            (job,) = harness.submit(request)
            with transaction() as db:
                sent[job] = db.execute(text("SELECT clock_timestamp()")).scalar_one()

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield sent
    finally:
        over.set()
        sender.join()


def _cancel(owners: Sequence[Caller], bulk: Sequence[UUID]) -> None:
    """Cancel what is left of the bulk jobs, and wait until the farm is at rest."""
    with transaction() as db:
        for owner in owners:
            for job in jobs.every(db, owner.account_id, limit=1000):
                if job.id in bulk and job.ended_at is None:
                    jobs.cancel(db, owner.account_id, job.id)
    harness.until(lambda: not harness.how_many(bulk, "ended_at IS NULL"), limit_s=300)


# ------------------------------------------------------------------------------------------------ the figures


def _packs(urgent: Sequence[UUID]) -> list[Pack]:
    query = """
        SELECT p.id, p.claimed_at, p.frames, count(u.frame_id) AS urgent
        FROM packs AS p LEFT JOIN usage AS u ON u.pack_id = p.id AND u.job_id = ANY(:urgent)
        GROUP BY p.id ORDER BY p.id"""
    with transaction() as db:
        return [Pack(*row) for row in db.execute(text(query), {"urgent": list(urgent)})]


def _urgents(sent: dict[UUID, datetime]) -> list[Urgent]:
    query = """
        SELECT f.job_id, f.ended_at, u.pack_id FROM frames AS f JOIN usage AS u ON u.frame_id = f.id
        WHERE f.job_id = ANY(:jobs) ORDER BY f.id"""
    with transaction() as db:
        rows = db.execute(text(query), {"jobs": list(sent)}).all()
    return [Urgent(sent[row.job_id], row.ended_at, row.pack_id) for row in rows]


def _figures(
    packs: Sequence[Pack], spans: Sequence[tuple[int, int]], urgents: Sequence[Urgent]
) -> dict[str, float]:
    stretches = [Stretch([p for p in packs if first <= p.id <= last]) for first, last in spans]
    alone, together = stretches[::2], stretches[1::2]
    full = max(p.frames for p in packs)
    assert all(p.frames == full for s in stretches for p in s.packs), "the bulk frames did not last"
    pack_s = median(s.pack_s for s in alone)
    waits_s = [u.seconds for u in urgents]
    queued = [
        BULK - sum(p.frames - p.urgent for p in packs if p.claimed_at < u.committed_at) for u in urgents
    ]
    return {
        "urgent_in_next_pack_share": sum(_next(packs, u) == u.pack_id for u in urgents) / len(urgents),
        "urgent_p95_packs": quantile(waits_s, 0.95) / pack_s,
        "bulk_throughput_kept": median(b.kept(a) for a, b in zip(alone, together, strict=True)),
        "urgent_p50_s": median(waits_s),
        "urgent_p95_s": quantile(waits_s, 0.95),
        "pack_s": pack_s,
        "first_in_first_out_s": median(queued) / full * pack_s,
        "urgent_frames": len(urgents),
        "bulk_alone_images_per_s": median(s.images / s.seconds for s in alone),
        "with_urgent_images_per_s": median(s.images / s.seconds for s in together),
    }


def _next(packs: Sequence[Pack], urgent: Urgent) -> int:
    """The pack that had to have it: the first whose claim began after the commit; or its own, if one before."""
    seen_from = urgent.committed_at + timedelta(seconds=LOOK_S)
    first = next((p.id for p in packs if p.claimed_at > seen_from), urgent.pack_id)
    return min(first, urgent.pack_id)


if __name__ == "__main__":
    sys.exit(main())
