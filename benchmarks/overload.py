"""Urgent frames while bulk work comes in 1.3 times as fast as it can be done, through the whole farm.

One worker, a random UNet of 1 M parameters on latents of 8 by 8 that goes step by step, bulk of three accounts with
mixed settings. The worker writes its ticks down (benchmarks/watched.py), the database says when what was committed
and claimed: one clock for both.

Ticks after its claim: ticks that began after an urgent frame was claimed and before the first it took part in.
First step: from commit to the start of that tick, less two ticks of the time around it. p95: from commit to done,
against the same frames in a farm that has nothing else to do. Bulk kept: bulk frames' steps a second with urgent
frames about, over those of the stretches without, less the share of the steps that were the urgent frames' own.
"""

import json
import os
import random
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from uuid import UUID

from sqlalchemy import text

from benchmarks import harness
from benchmarks.harness import Target, quantile, say
from benchmarks.stepwise import MODEL, add_stepwise
from farm import jobs
from farm.accounts import Caller
from farm.db import transaction
from farm.errors import Conflict
from farm.submissions import Submission

Span = tuple[float, float]  # from, until
OVERLOAD = 1.3
FEED_EVERY_S = 0.5
FULL_FRAMES = 16  # on the device: 32 rows, of guided ones two a frame
URGENT_SHARE = 1 / 60  # of the frames the farm can do
URGENT = {"model": MODEL, "prompt": "a red circle", "steps": 20, "guidance": 4.0}
SETTINGS = [  # of bulk: steps, guidance, sampler
    (12, 3.0, "dpm++2m"), (16, 4.5, "euler"), (20, 7.5, "dpm++2m"), (20, 4.0, "ddim"),
    (24, 6.0, "euler-a"), (28, 9.0, "unipc"), (18, 2.5, "dpm++2m-karras"), (22, 5.0, "euler"),
]  # fmt: skip
TARGETS = [
    Target("urgent_p95_ticks_from_claim_to_first_step", at_most=1),
    Target("urgent_p95_ms_to_first_step_over_two_ticks", at_most=50),
    Target("urgent_p95_of_alone", at_most=2.0),
    Target("bulk_kept", at_least=0.95),
]


@dataclass(frozen=True)
class Size:
    capacity: int  # frames to measure it by
    alone: int  # urgent frames
    stretches: int  # with urgent frames, and as many without
    stretch_s: float


QUICK = Size(capacity=48, alone=4, stretches=1, stretch_s=12)
FULL = Size(capacity=300, alone=30, stretches=12, stretch_s=10)  # the machine changes its pace meanwhile


@dataclass(frozen=True)
class Tick:
    began: float
    ended: float
    frames: dict[str, int]  # frame → priority

    @property
    def urgent(self) -> int:
        return sum(priority == 9 for priority in self.frames.values())

    @property
    def bulk(self) -> int:
        return len(self.frames) - self.urgent


@dataclass(frozen=True)
class Urgent:
    frame: str
    committed: float
    claimed: float
    done: float


def main() -> int:
    options = harness.options(__doc__)
    size = QUICK if options.quick else FULL
    with harness.services() as folder:
        os.environ["WATCHED"] = str(folder / "ticks.log")
        add_stepwise(folder)
        owners = harness.callers(4)
        with harness.farm(folder, MODEL, module="benchmarks.watched"):
            figures = _measure(owners, size, folder / "ticks.log")
    return harness.report("overload", figures, TARGETS)


def _measure(owners: Sequence[Caller], size: Size, log: Path) -> dict[str, float]:
    harness.finish(_bulk(owners, 32))
    some = _bulk(owners, size.capacity)
    harness.finish(some)
    images_per_s = size.capacity / harness.worker_seconds(some)
    say(f"{images_per_s:.1f} bulk images/s at most")
    alone = _urgents(owners[3], size.alone, pause_s=0.5)
    say(f"{len(alone)} urgent frames alone")
    spans: list[Span] = []
    sent: dict[UUID, float] = {}
    rng = random.Random(1)
    with _fed(owners, OVERLOAD * images_per_s) as fed:
        harness.until(lambda: harness.how_many(list(fed), "status = 'claimed'") >= FULL_FRAMES, limit_s=60)
        for _ in range(size.stretches):
            spans.append(_stretch(size.stretch_s))
            with _urgent_now_and_then(owners[3], 1 / (URGENT_SHARE * images_per_s), rng) as came:
                spans.append(_stretch(size.stretch_s))
            sent |= came
            harness.finish(list(came))
            say(f"{len(sent)} urgent frames under load")
        spans.append(_stretch(size.stretch_s))
    _cancel(owners, fed)
    ticks = [Tick(*json.loads(line)) for line in log.read_text().splitlines()]
    return _figures(ticks, spans, alone, _read(sent), images_per_s)


def _bulk(owners: Sequence[Caller], frames: int) -> list[UUID]:
    """Queue that many bulk frames of three accounts, with all the settings."""
    made = []
    for k in range(frames):
        steps, guidance, sampler = SETTINGS[k % len(SETTINGS)]
        asked = {"model": MODEL, "steps": steps, "guidance": guidance, "sampler": sampler, "seed": k}
        body = {"spec": {**asked, "prompt": harness.PROMPTS[k % 24]}, "priority": 1, "reuse": False}
        made.append((owners[k % 3], Submission.model_validate(body)))
    return harness.submit(made)


@contextmanager
def _fed(owners: Sequence[Caller], frames_per_s: float) -> Iterator[list[UUID]]:
    """Let bulk frames come in at this rate. Yields their jobs."""
    fed = list(_bulk(owners, 64))
    over = threading.Event()

    def feed() -> None:
        owed = 0.0
        while not over.wait(FEED_EVERY_S):
            owed += frames_per_s * FEED_EVERY_S
            fed.extend(_bulk(owners, int(owed)))
            owed -= int(owed)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        yield fed
    finally:
        over.set()
        feeder.join()


def _stretch(seconds: float) -> Span:
    began = time.time()
    time.sleep(seconds)
    return began, time.time()


@contextmanager
def _urgent_now_and_then(owner: Caller, every_s: float, rng: random.Random) -> Iterator[dict[UUID, float]]:
    """Submit urgent frames at random times. Yields the jobs sent so far, and when each was committed."""
    sent: dict[UUID, float] = {}
    over = threading.Event()

    def send() -> None:
        while not over.wait(rng.expovariate(1 / every_s)):
            sent.update([_urgent(owner)])

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield sent
    finally:
        over.set()
        sender.join()


def _urgent(owner: Caller) -> tuple[UUID, float]:
    body = {"spec": URGENT, "priority": 9, "reuse": False}
    (job,) = harness.submit([(owner, Submission.model_validate(body))])
    return job, time.time()


def _urgents(owner: Caller, count: int, *, pause_s: float) -> list[Urgent]:
    """Urgent frames one after the other, in a farm that has nothing else to do."""
    sent = {}
    for _ in range(count):
        job, committed = _urgent(owner)
        sent[job] = committed
        harness.until(
            lambda job=job: not harness.how_many([job], "ended_at IS NULL"), limit_s=60, every_s=0.02
        )
        time.sleep(pause_s)
    return _read(sent)


def _read(sent: dict[UUID, float]) -> list[Urgent]:
    query = """
        SELECT f.id, f.job_id, extract(epoch FROM p.claimed_at) AS claimed, extract(epoch FROM f.ended_at) AS done
        FROM frames AS f JOIN usage AS u ON u.frame_id = f.id JOIN packs AS p ON p.id = u.pack_id
        WHERE f.job_id = ANY(:jobs)"""
    with transaction() as db:
        rows = db.execute(text(query), {"jobs": list(sent)}).all()
    return [Urgent(r.id.hex, sent[r.job_id], float(r.claimed), float(r.done)) for r in rows]


def _cancel(owners: Sequence[Caller], bulk: Sequence[UUID]) -> None:
    """Cancel what is left of the bulk jobs, and wait until the farm is at rest."""
    owner_of = "SELECT id, account_id FROM jobs WHERE id = ANY(:jobs) AND ended_at IS NULL"
    with transaction() as db:
        for job, account in db.execute(text(owner_of), {"jobs": list(bulk)}).all():
            with suppress(Conflict):  # it finished meanwhile
                jobs.cancel(db, account, job)
    harness.until(lambda: not harness.how_many(bulk, "ended_at IS NULL"), limit_s=300)


# ------------------------------------------------------------------------------------------------ the figures


def _figures(
    ticks: Sequence[Tick],
    spans: Sequence[Span],
    alone: Sequence[Urgent],
    urgents: Sequence[Urgent],
    images_per_s: float,
) -> dict[str, float]:
    firsts = [_first(ticks, u) for u in urgents]
    waits_s = [u.done - u.committed for u in urgents]
    alone_s = [u.done - u.committed for u in alone]
    kept = [_kept(ticks, *spans[k - 1 : k + 2]) for k in range(1, len(spans), 2)]
    between = [t for span in spans[::2] for t in _within(ticks, span)]
    return {
        "urgent_p95_ticks_from_claim_to_first_step": quantile([n for n, _ in firsts], 0.95),
        "urgent_p95_ms_to_first_step_over_two_ticks": quantile([1000 * s for _, s in firsts], 0.95),
        "urgent_p95_of_alone": quantile(waits_s, 0.95) / quantile(alone_s, 0.95),
        "bulk_kept": median(kept),
        "urgent_most_ticks_from_claim_to_first_step": max(n for n, _ in firsts),
        "urgent_p50_s": median(waits_s),
        "urgent_p95_s": quantile(waits_s, 0.95),
        "urgent_alone_p50_s": median(alone_s),
        "urgent_alone_p95_s": quantile(alone_s, 0.95),
        "urgent_frames": len(urgents),
        "bulk_images_per_s": images_per_s,
        "bulk_tick_ms": 1000 * median(t.ended - t.began for t in between),
        "bulk_frames_a_tick": sum(t.bulk for t in between) / len(between),
    }


def _first(ticks: Sequence[Tick], urgent: Urgent) -> tuple[int, float]:
    """Ticks between its claim and the one with its first step; seconds from commit to that, less two ticks."""
    own = next(k for k, t in enumerate(ticks) if urgent.frame in t.frames)
    after_claim = bisect_left([t.began for t in ticks], urgent.claimed)
    longest_s = max(t.ended - t.began for t in ticks[max(0, own - 2) : own] or ticks[own : own + 1])
    return max(0, own - after_claim), ticks[own].began - urgent.committed - 2 * longest_s


def _within(ticks: Sequence[Tick], span: Span) -> list[Tick]:
    return [t for t in ticks if span[0] <= t.began and t.ended <= span[1]]


def _kept(ticks: Sequence[Tick], before: Span, together: Span, after: Span) -> float:
    """Bulk throughput kept in a stretch with urgent frames, against those before and after it."""
    during = _within(ticks, together)
    urgent, bulk = sum(t.urgent for t in during), sum(t.bulk for t in during)
    alone_per_s = mean(sum(t.bulk for t in _within(ticks, s)) / (s[1] - s[0]) for s in (before, after))
    return bulk / (together[1] - together[0]) / (alone_per_s * (1 - urgent / (urgent + bulk)))


if __name__ == "__main__":
    sys.exit(main())
