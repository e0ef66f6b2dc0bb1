"""Who works on which frame. This module alone writes frames.status.

A frame:

                      ┌──────────── answer: with the image of its equal ─────────────┐
                      │                                                              ▼
                 ┌─────────┐ answer ┌────────┐  claim_pack  ┌─────────┐   settle    ┌──────┐
                 │ waiting │ ─────▶ │ queued │ ───────────▶ │ claimed │ ──────────▶ │ done │ billed
                 └─────────┘ nobody └────────┘              └─────────┘             └──────┘
            on an equal│    makes it  │    ▲     release,      │  │ └─ ─ ─ ─ ─ ─ ▶ rejected (by a check)
            frame      │              │    └── fail, reclaim ──┘  │
                       │       cancel │       (then a suspect,    ├──────────────▶ failed, after three packs
                       ▼              ▼        claimed alone)     │                that it took down alone
                       └─────────▶ cancelled ◀────────────────────┘

Beyond its job's max_parallel a frame is staged: refill makes it queued once there is room, narrow takes it back when
the job has less. Past the deadline of a job that asks for it what is open ends as failed, in place of cancelled.

A job (its verbs stand in jobs.py):   staged ─ ─ ▶ active ⇄ paused,  both ──▶ finished or cancelled, or late ─▶ finished

Who waits for whom: see reuse.py. Dashed: a place kept for later. What ended stays as it is; the database refuses
anything else.

A pack is the fence: settle, fail and release touch a frame only while frames.pack_id is that pack. What a
worker does too late is left out, without an error. Everybody locks in the same order: packs, jobs, frames,
job_keys, job_lanes, lanes.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from farm import lanes
from farm.catalog import PackLimit
from farm.db import Db, array, hot, scalar
from farm.settings import settings
from farm.spec import Spec
from farm.tables import Job, Pack

NEAREST = 32  # lanes looked at for a head: so far ahead may a warm model be preferred to a fairer share
# for what may be lost with a crash of Postgres, and is done again then: no wait for the disk at commit
ASYNC = text("SET LOCAL synchronous_commit = off")


class FrameStatus(StrEnum):
    STAGED = "staged"
    WAITING = "waiting"
    QUEUED = "queued"
    CLAIMED = "claimed"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REJECTED = "rejected"


class Outcome(StrEnum):
    """How a pack ended."""

    SETTLED = "settled"
    FAILED = "failed"
    LOST = "lost"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class ClaimedFrame:
    id: UUID
    job_id: UUID
    index: int
    key_no: int
    account_id: UUID
    seed: int
    work: int
    spec: Spec
    prompt: bool = False  # its account wants the prompt inside the image
    priority: int = 5


@dataclass(frozen=True, slots=True)
class Head:
    """The frame whose turn it is, locked until the end of the transaction."""

    model: str
    priority: int
    account_id: UUID
    aged: bool
    frame_id: UUID
    suspect: bool
    call_key: str
    shape_key: str
    pixels: int
    work: int


@dataclass(frozen=True, slots=True)
class ClaimedPack:
    """Frames that are one worker's until the lease runs out. Its id is the fence."""

    id: int
    worker: str
    model: str
    call_key: str
    priority: int
    aged: bool
    full: bool
    lease_until: datetime
    frames: tuple[ClaimedFrame, ...]
    alone: bool = False  # a suspect: nothing else may be on the device beside it


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """A frame whose image is in the store, and what settle needs to know of it."""

    frame_id: UUID
    job_id: UUID
    pack_id: int
    key: str
    format: str
    sha256: bytes
    pixel_sha256: bytes
    bytes: int
    width: int
    height: int
    prompt: bool = False  # the file says it
    since: datetime | None = None  # by the database, before it was stored anew; None: its pack's claim


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of stored frames; those in neither list had been lost to somebody else.

    over: jobs of theirs that have no queued frame left, and may be finished.
    """

    done: frozenset[UUID]
    cancelled: frozenset[UUID]
    over: frozenset[UUID]


@dataclass(frozen=True, slots=True)
class Extended:
    """The packs still the worker's, each with its frames of cancelled jobs, and whether it is to drain.

    priorities: of the frames it still has, where they were asked for.
    """

    packs: Mapping[int, frozenset[UUID]]
    drain: bool
    priorities: Mapping[UUID, int] = field(default_factory=dict)


def claim_pack(
    db: Db,
    *,
    models: Sequence[str],
    worker: str,
    limits: Mapping[str, PackLimit],
    ageing: bool = True,
    engines: Mapping[str, Mapping[str, str]] | None = None,
    by_shape: Collection[str] = (),
    warm: str | None = None,
) -> ClaimedPack | None:
    """Claim the next pack of these models; None if they have no runnable frame.

    limits: what a pack of each model may hold. ageing: a lane unserved too long may come before its class.
    engines: what renders each model here, versions and the model's revision; kept for provenance. by_shape: those of
    them that pack by shape, several packs at once on a device. warm: a model to be preferred inside a class.
    """
    head = find_head(db, models=models, ageing=ageing, warm=warm)
    if head is None:
        _close_empty(db, models)
        return None
    return take(
        db,
        head,
        worker=worker,
        frames=frames_in(limits[head.model], head.pixels),
        engine=engines[head.model] if engines else None,
        by_shape=head.model in by_shape,
    )


def frames_in(limit: PackLimit, pixels: int) -> int:
    """How many frames of so many pixels a pack holds; at least 1."""
    return max(1, min(limit.frames, limit.pixels // pixels))


def find_head(
    db: Db,
    *,
    models: Sequence[str],
    ageing: bool = True,
    warm: str | None = None,
    above: int = -1,
    suspects: bool = True,
) -> Head | None:
    """Find and lock the frame whose turn it is; None if there is none.

    above: only of classes more urgent than this one. suspects: also one that has to be claimed alone.
    """
    values = {
        "models": array(models),
        "ageing": ageing,
        "ageing_s": settings().ageing_s,
        "warm": warm,
        "above": above,
        "suspects": suspects,
    }
    # all lanes only where nothing can be claimed of the nearest ones: paused, or a rival's just now
    found = hot(db, "head", {**values, "lanes": NEAREST}) or hot(db, "head", {**values, "lanes": None})
    return Head(*found[0][1:]) if found else None


def take(
    db: Db,
    head: Head,
    *,
    worker: str,
    frames: int,
    engine: Mapping[str, str] | None = None,
    by_shape: bool = False,
    above: int = -1,
) -> ClaimedPack:
    """Claim the head frame and its kin: at most so many frames, and only of classes above this one."""
    key = head.shape_key if by_shape else head.call_key
    claimed = hot(
        db,
        "claim",
        {
            "model": head.model,
            "priority": head.priority,
            "account_id": head.account_id,
            "call_key": key,
            "frame_id": head.frame_id,
            "work": head.work,
            "alone": head.suspect,
            "frames": frames,
            "worker": worker,
            "lease_s": settings().lease_s,
            "engine": json.dumps(dict(engine)) if engine else None,
            "shared": by_shape and not head.suspect,
            "above": above,
        },
        change=("k.call_key = ", "k.shape_key = ") if by_shape else None,
    )
    taken = tuple(
        ClaimedFrame(
            r.id,
            r.job_id,
            r.frame_index,
            r.key_no,
            r.account_id,
            r.seed,
            r.work,
            Spec.from_text(r.spec),
            r.prompt,
            r.priority,
        )
        for r in claimed
    )
    if emptied := sorted({(r.job_id, r.key_no) for r in claimed if r.emptied}):
        _close(db, emptied)
    return ClaimedPack(
        id=claimed[0].pack_id,
        worker=worker,
        model=head.model,
        call_key=key,
        priority=head.priority,
        aged=head.aged,
        full=len(taken) == frames,
        lease_until=claimed[0].lease_until,
        frames=taken,
        alone=head.suspect,
    )


def _close_empty(db: Db, models: Sequence[str]) -> None:
    """Close what two claims emptied at the same moment: each saw the other's frames queued still, and left it open."""
    empty = hot(db, "empty_keys", {"models": array(models)})
    if empty:
        _close(db, [(r.job_id, r.key_no) for r in empty])


def _close(db: Db, keys: Sequence[tuple[UUID, int]]) -> None:
    """Close job keys that a claim emptied, and then their job lanes: the next head need not look there."""
    locked = hot(db, "close_keys", _arrays(("jobs", "keys"), keys))
    left = hot(db, "close", _arrays(("jobs", "keys"), locked)) if locked else None
    if left:
        hot(db, "close_lanes", _arrays(("jobs", "models"), left))


def retire_lanes(db: Session) -> int:
    """Make lanes inactive that hold no open job: the next head need not look there. Returns how many it tried."""
    db.execute(ASYNC)
    empty = hot(db, "empty_lanes")
    if empty:
        hot(db, "retire", _columns(("models", "priorities", "accounts"), empty))
    return len(empty)


def extend(db: Session, *, worker: str, packs: Sequence[int]) -> Extended:
    """Extend the leases of these packs, and say what the worker should know of them."""
    db.execute(ASYNC)
    _hold(db, packs)  # in order: settling locks the same packs
    rows = hot(db, "extend", {"packs": list(packs), "worker": worker, "lease_s": settings().lease_s})
    return Extended({r.pack_id: frozenset(r.cancelled) for r in rows}, any(r.drain for r in rows))


def look(db: Session, *, worker: str, packs: Sequence[int]) -> Extended:
    """Say what the worker should know of these packs, and of how urgent their frames are, without extending them."""
    rows = hot(db, "look", {"packs": list(packs), "worker": worker})
    cancelled: dict[int, set[UUID]] = {r.pack_id: set() for r in rows}
    for row in rows:
        if row.cancelled:
            cancelled[row.pack_id].add(row.frame_id)
    return Extended(
        {pack: frozenset(frames) for pack, frames in cancelled.items()},
        any(r.drain for r in rows),
        {r.frame_id: r.priority for r in rows if r.frame_id is not None},
    )


def settle(
    db: Db,
    stored: Sequence[StoredFrame],
    *,
    gpu_ms: Mapping[int, int] | None = None,
    commit: bool = False,
) -> Settled:
    """Book stored frames as done: image, charge, count and event in this one transaction.

    gpu_ms: pack id → milliseconds on the device, written down when the pack closes. commit: nothing else belongs to
    the transaction; it ends here. Call finish() with the jobs that may be over afterwards, in a transaction of its own.
    """
    if not stored:
        return Settled(frozenset(), frozenset(), frozenset())
    packs, jobs = {s.pack_id for s in stored}, {s.job_id for s in stored}
    locked = hot(db, "hold", {"packs": array(packs), "jobs": array(jobs)})
    ended = hot(
        db,
        "settle",
        {
            "stored": json.dumps([_as_json(s, gpu_ms or {}) for s in stored]),
            "held": array(r.pack_id for r in locked if r.pack_id),
            "jobs": array(jobs),
            "cancelled_jobs": array(r.job_id for r in locked if r.status == "cancelled"),
        },
        commit=commit,
    )
    return Settled(
        frozenset(r.id for r in ended if not r.cancelled),
        frozenset(r.id for r in ended if r.cancelled),
        frozenset(r.job_id for r in ended if r.over),
    )


def _as_json(stored: StoredFrame, gpu_ms: Mapping[int, int]) -> dict[str, Any]:
    return {
        "frame_id": stored.frame_id.hex,
        "pack_id": stored.pack_id,
        "key": stored.key,
        "format": stored.format,
        "sha256": stored.sha256.hex(),
        "pixel_sha256": stored.pixel_sha256.hex(),
        "bytes": stored.bytes,
        "width": stored.width,
        "height": stored.height,
        "gpu_ms": gpu_ms.get(stored.pack_id),
        "prompt": stored.prompt,
    }


def finish(db: Session, jobs: Sequence[UUID]) -> None:
    """End the jobs whose frames have all ended, and refill those that go on. The sweep does both; this is sooner."""
    db.execute(ASYNC)
    capped = [r[0] for r in hot(db, "finish", {"jobs": list(jobs)})]
    if capped:
        refill(db, capped)


def fail(
    db: Session,
    pack: int,
    reason: str,
    *,
    frames: Sequence[UUID] | None = None,
    gpu_ms: Mapping[int, int] | None = None,
) -> int:
    """Give back frames of a pack that failed, all of them if none are named; those claimed alone are blamed.

    gpu_ms: as settle() takes it. Returns how many came back or ended.
    """
    return _give_back(db, [pack], Outcome.FAILED, reason=reason, frames=frames, gpu_ms=gpu_ms)


def release(
    db: Session,
    packs: Sequence[int],
    *,
    frames: Sequence[UUID] | None = None,
    gpu_ms: Mapping[int, int] | None = None,
) -> int:
    """Give back frames without blame: a draining worker's, or those of a pack nobody wants any more.

    gpu_ms: as settle() takes it.
    """
    return _give_back(db, packs, Outcome.RELEASED, frames=frames, gpu_ms=gpu_ms)


def off_device(db: Session, gpu_ms: Mapping[int, int]) -> None:
    """Note that these packs, still open, are off the device: their worker may be woken for others.

    gpu_ms: pack id → milliseconds on the device.
    """
    for pack, ms in sorted(gpu_ms.items()):
        db.execute(update(Pack).where(Pack.id == pack, Pack.closed_at.is_(None)).values(gpu_ms=ms))


def lapse(db: Session, worker: str) -> int:
    """End the leases of a worker whose process is dead: reclaim() need not wait for them. Returns how many."""
    db.execute(ASYNC)
    held = _hold(db, db.scalars(select(Pack.id).where(Pack.worker == worker, Pack.closed_at.is_(None))).all())
    db.execute(update(Pack).where(Pack.id.in_(held)).values(lease_until=func.clock_timestamp()))
    return len(held)


def reclaim(db: Session, *, limit: int = 100) -> int:
    """Take back the frames of packs whose lease ran out. Returns how many packs were lost."""
    lost = db.scalars(
        select(Pack.id)
        .where(Pack.closed_at.is_(None), Pack.lease_until < func.clock_timestamp())
        .order_by(Pack.id)
        .limit(limit)
        .with_for_update(skip_locked=True, key_share=True)
    ).all()
    if lost:
        _give_back(db, lost, Outcome.LOST, reason="the worker was lost while it rendered this frame alone")
    return len(lost)


def cancel_queued(db: Session, *, limit: int = 5000) -> int:
    """End the frames of cancelled jobs, and of those past their deadline, that are on no device. Returns how many."""
    return scalar(db, "cancel_frames", {"n": limit}) or 0


def release_late(db: Session, *, limit: int = 5000) -> int:
    """Take frames off devices whose job is past its deadline: cancel_queued() comes by. Returns how many."""
    rows = hot(db, "late_packs", {"n": limit})
    if not rows:
        return 0
    return release(db, sorted({r.pack_id for r in rows}), frames=[r.id for r in rows])


def refill(db: Session, jobs: Sequence[UUID] | None = None, *, limit: int = 5000) -> int:
    """Queue staged frames of jobs that have fewer queued and claimed than their max_parallel. Returns of how many jobs.

    jobs: only of these. limit: frames of a job at a time.
    """
    ready = [r[0] for r in hot(db, "capped", {"jobs": None if jobs is None else list(jobs)})]
    if ready:
        rows = hot(db, "refill", {"jobs": ready, "n": limit})
        _queued_again(db, [(r.job_id, r.key_no) for r in rows])
    return len(ready)


def narrow(db: Session, job: UUID, *, limit: int = 5000) -> int:
    """Stage queued frames of a job, which the caller has locked, down to its max_parallel. Returns how many."""
    return scalar(db, "narrow", {"job": job, "n": limit}) or 0


def narrow_waiting(db: Session) -> int:
    """The same for jobs that wait, and have more queued than one bite. Returns how many frames."""
    jobs = db.scalars(
        select(Job.id)
        .where(Job.waits, Job.ended_at.is_(None), Job.max_parallel.is_not(None))
        .order_by(Job.id)
        .limit(100)
        .with_for_update(skip_locked=True, key_share=True)
    ).all()
    return sum(narrow(db, job) for job in jobs)


def answer(db: Session, waiting: Mapping[UUID, UUID], *, at_once: bool = False) -> int:
    """Decide on waiting frames, each given with its job: done with an image that is known, queued, or waiting on.

    A done one is charged the price of reusing. at_once: they are being submitted, and no more than that is held
    for them. Returns how many are done.
    """
    facts = {
        "frames": list(waiting),
        "cancelled_jobs": _lock_jobs(db, set(waiting.values())),
        "at_once": at_once,
    }
    rows = hot(db, "answer", facts)
    _queued_again(db, [(r.job_id, r.key_no) for r in rows if r.status == FrameStatus.QUEUED])
    return sum(r.status == FrameStatus.DONE for r in rows)


def reopen_lanes(db: Session) -> int:
    """Make lanes active that hold runnable work but are not. Returns how many jobs were found waiting there."""
    jobs = [r[0] for r in hot(db, "reopen_lanes")]
    if jobs:
        lanes.open_for(db, jobs)
    return len(jobs)


def _give_back(
    db: Session,
    packs: Sequence[int],
    outcome: Outcome,
    *,
    reason: str | None = None,
    frames: Sequence[UUID] | None = None,
    gpu_ms: Mapping[int, int] | None = None,
) -> int:
    held = _hold(db, packs)
    rows = hot(
        db,
        "give_back",
        {
            "cancelled_jobs": _lock_jobs(db, [r[0] for r in hot(db, "jobs_of_packs", {"packs": held})]),
            "packs": held,
            "frames": None if frames is None else list(frames),
            "blame": outcome is not Outcome.RELEASED,
            "lost": outcome is Outcome.LOST,
            "max_attempts": settings().max_attempts,
            "reason": reason,
        },
    )
    if held:
        known = gpu_ms or {}
        hot(
            db,
            "close_packs",
            {"packs": held, "outcome": outcome, "gpu_ms": [known.get(pack) for pack in held]},
        )
    _queued_again(db, [(r.job_id, r.key_no) for r in rows if r.status == FrameStatus.QUEUED])
    return len(rows)


def _queued_again(db: Session, keys: Sequence[tuple[UUID, int]]) -> None:
    """Open what leads to the frames of these job keys that are queued now."""
    if keys:
        hot(db, "open_keys", _columns(("jobs", "keys"), keys))
        jobs = sorted({job for job, _ in keys})
        hot(db, "open_job_lanes", {"jobs": jobs})
        lanes.open_for(db, jobs)


def _hold(db: Session, packs: Iterable[int]) -> Sequence[int]:
    """Lock those of the packs that are open: no other transaction touches their frames from here on.

    A statement of its own: the next one's snapshot is younger than the lock.
    """
    return db.scalars(
        select(Pack.id)
        .where(Pack.id.in_(packs), Pack.closed_at.is_(None))
        .order_by(Pack.id)
        .with_for_update(key_share=True)
    ).all()


def _lock_jobs(db: Session, jobs: Iterable[UUID]) -> list[UUID]:
    """Lock jobs against being cancelled: whichever commits first wins. Returns those that are cancelled already."""
    rows = hot(db, "lock_jobs", {"jobs": list(jobs)})
    return [r.id for r in rows if r.status == "cancelled"]


def _columns(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    """Rows as one array a column, for unnest()."""
    return {name: [row[k] for row in rows] for k, name in enumerate(names)}


def _arrays(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, str]:
    """The same for hot()."""
    return {name: array(column) for name, column in _columns(names, rows).items()}
