"""What tests of the spine are made of: accounts, jobs, packs, and images that nobody rendered."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Row, text
from sqlalchemy.orm import Session

from farm import accounts, jobs, lanes, ledger, pricing, queue, submissions
from farm.accounts import Caller, Role
from farm.catalog import BUILTIN, Catalog, Model, PackLimit, read
from farm.db import hot, transaction
from farm.queue import ClaimedFrame, ClaimedPack, Settled, StoredFrame
from farm.storage import image_key


def model(name: str, **changes: Any) -> Model:
    """A model of the Stable Diffusion family: 512 × 512, 4 steps, 4 frames a pack, 0.0032 a megapixel and step."""
    facts = read(BUILTIN)["sd15"].model_dump() | {
        "engine": "pipe",
        "packs_by": "call",
        "free": ("guidance",),
        "name": name,
        "side": {"min": 64, "max": 2048, "multiple": 8, "default": 512},
        "steps": {"min": 1, "max": 100, "default": 4},
        "pack": {"frames": 4, "pixels": 4 << 20},
        "pool": "both",
        "price": {"method": "mpx_step", "rate": "0.0032", "currency": "USD"},
    }
    return Model.model_validate(facts | changes)


CATALOG = Catalog(
    [
        model("alpha"),
        model("beta"),
        model("flat", price={"method": "image", "rate": "0.37", "currency": "USD"}),
        model("flux", free=(), negative_prompt=False, guided_rows=1),
    ]
)
NOTHING = Settled(frozenset(), frozenset(), frozenset())  # what settling somebody else's frames comes to
LIMITS = {m.name: m.pack for m in CATALOG.values()}
FRAME = Decimal("0.0032")  # what 512 × 512 in 4 steps cost: a quarter of a megapixel, four times


@pytest.fixture
def books(database: str) -> Iterator[str]:
    """A migrated database with the prices of CATALOG, whose books must be right when the test is over."""
    with transaction() as db:
        pricing.sync(db, CATALOG)
    yield database
    assert violations() == []


def violations() -> list[ledger.Violation]:
    with transaction() as db:
        return ledger.audit(db)


def ask(statement: str, **values: Any) -> Sequence[Row[Any]]:
    """The rows of a statement, in a transaction of its own."""
    with transaction() as db:
        result = db.execute(text(statement), values)
        return result.all() if result.returns_rows else []


def one(statement: str, **values: Any) -> Any:
    """The one value of a statement's one row."""
    ((value,),) = ask(statement, **values)
    return value


def _in(db: Session | None) -> AbstractContextManager[Session]:
    return transaction() if db is None else nullcontext(db)


# ------------------------------------------------------------------------------------------------ who asks


def account(name: str = "acme", *, weight: int = 1) -> Caller:
    with transaction() as db:
        made = accounts.create(db, name, weight=weight)
        key, _ = accounts.issue_key(db, made)
        return Caller(made.id, made.name, made.currency, key.id, Role.SUBMIT)


def submission(*, priority: Any = 5, reuse: bool = False, **spec: Any) -> submissions.Submission:
    """One spec, of alpha if no model is named. All ask for equal images: only with reuse they are rendered once."""
    return submissions.Submission(
        spec={"prompt": "a red circle", "model": "alpha", "seed": 0, **spec}, priority=priority, reuse=reuse
    )


def submit(
    caller: Caller,
    count: int = 1,
    *,
    db: Session | None = None,
    priority: Any = 5,
    models: Catalog = CATALOG,
    **spec: Any,
) -> UUID:
    """Submit a job of one spec; steps tells keys apart."""
    with _in(db) as session:
        sent = submission(priority=priority, count=count, **spec)
        return submissions.submit(session, caller, sent, models=models)[0]


def submit_keys(caller: Caller, steps: Sequence[int], **spec: Any) -> UUID:
    """Submit a job with a frame of each number of steps: as many keys."""
    specs = [{"prompt": "a red circle", "model": "alpha", "seed": 0, "steps": n, **spec} for n in steps]
    with transaction() as db:
        sent = submissions.Submission(specs=specs, reuse=False)
        return submissions.submit(db, caller, sent, models=CATALOG)[0]


def view(caller: Caller, job: UUID) -> jobs.JobView:
    with transaction() as db:
        return jobs.find(db, caller.account_id, job)


def statuses(job: UUID) -> list[str]:
    return [r.status for r in ask("SELECT status FROM frames WHERE job_id = :job ORDER BY id", job=job)]


# ------------------------------------------------------------------------------------------------ who works


def claim(
    worker: str = "a",
    *,
    db: Session | None = None,
    models: Sequence[str] = ("alpha",),
    frames: int | None = None,
    ageing: bool = True,
) -> ClaimedPack | None:
    """Claim a pack; frames: how many one may hold, instead of the model's limit."""
    limits = LIMITS if frames is None else {m: PackLimit(frames=frames, pixels=1 << 40) for m in models}
    with _in(db) as session:
        return queue.claim_pack(session, models=models, worker=worker, limits=limits, ageing=ageing)


def must_claim(worker: str = "a", **options: Any) -> ClaimedPack:
    pack = claim(worker, **options)
    assert pack is not None
    return pack


def owners(pack: ClaimedPack) -> list[UUID]:
    return [f.account_id for f in pack.frames]


def stored(
    pack: ClaimedPack, frames: Sequence[ClaimedFrame] | None = None, *, content: bytes | None = None
) -> list[StoredFrame]:
    """What settle is told of a pack's images; content: the same bytes in each, not its own."""
    return [_stored(pack, f, content or f.id.bytes) for f in (pack.frames if frames is None else frames)]


def _stored(pack: ClaimedPack, frame: ClaimedFrame, content: bytes) -> StoredFrame:
    digest = hashlib.sha256(content).digest()
    return StoredFrame(
        frame_id=frame.id,
        job_id=frame.job_id,
        pack_id=pack.id,
        key=image_key(frame.account_id, digest, frame.spec.format),
        format=frame.spec.format.value,
        sha256=digest,
        pixel_sha256=hashlib.sha256(b"pixels" + content).digest(),
        bytes=len(content),
        width=frame.spec.width,
        height=frame.spec.height,
    )


def settle(
    pack: ClaimedPack, frames: Sequence[ClaimedFrame] | None = None, *, db: Session | None = None
) -> Settled:
    """Settle a pack's frames and, in a transaction of our own, finish their jobs after it as workers do."""
    with _in(db) as session:
        settled = queue.settle(session, stored(pack, frames))
    if db is None:
        with transaction() as session:
            queue.finish(session, sorted({f.job_id for f in pack.frames}))
    return settled


def fail(pack: ClaimedPack, reason: str = "it would not render") -> int:
    with transaction() as db:
        return queue.fail(db, pack.id, reason)


def release(pack: ClaimedPack, *, db: Session | None = None) -> int:
    with _in(db) as session:
        return queue.release(session, [pack.id])


def lose(pack: ClaimedPack) -> int:
    """Let a pack's lease run out, and take it back."""
    expire(pack)
    with transaction() as db:
        return queue.reclaim(db)


def expire(pack: ClaimedPack) -> None:
    ask("UPDATE packs SET lease_until = clock_timestamp() - interval '1 s' WHERE id = :pack", pack=pack.id)


BACK_DATE = (
    "SET LOCAL session_replication_role = replica",  # the database refuses it otherwise
    "UPDATE usage SET at = :at WHERE statement_line IS NULL AND (CAST(:job AS uuid) IS NULL OR job_id = :job)",
    "SET LOCAL session_replication_role = origin",
)


def back_date(at: datetime, *, job: UUID | None = None, db: Session | None = None) -> None:
    """Let charges that are on no statement have been made at another time, those of one job or all."""
    with _in(db) as session:
        for statement in BACK_DATE:
            session.execute(text(statement), {"at": at, "job": job} if ":at" in statement else {})


def pass_time(seconds: float) -> None:
    """Let the lanes have waited that much longer."""
    ask("UPDATE lanes SET waiting_at = waiting_at - make_interval(secs => :s)", s=seconds)


def retire(*, db: Session | None = None) -> int:
    with _in(db) as session:
        return queue.retire_lanes(session)


def active_lanes() -> list[tuple[str, int, UUID]]:
    rows = ask(
        "SELECT model, priority, account_id FROM lanes WHERE active ORDER BY model, priority, account_id"
    )
    return [tuple(r) for r in rows]


def served(caller: Caller, *, priority: int = 5, model: str = "alpha") -> int:
    lane = "SELECT served FROM lanes WHERE model = :model AND priority = :priority AND account_id = :account"
    return int(one(lane, model=model, priority=priority, account=caller.account_id))


def open_places(job: UUID) -> tuple[list[bool], list[bool]]:
    """Whether each key of a job is open, and each of its lanes."""
    keys = ask("SELECT open FROM job_keys WHERE job_id = :job ORDER BY key_no", job=job)
    lanes = ask("SELECT open FROM job_lanes WHERE job_id = :job ORDER BY model", job=job)
    return [r.open for r in keys], [r.open for r in lanes]


def add_worker(name: str, *models: str, state: str = "up") -> None:
    ask(
        "INSERT INTO workers (id, pool, models, device, state) VALUES (:name, 'both', :models, 'cpu', :state)",
        name=name, models=list(models), state=state,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ at once


def until_blocked(sessions: int = 1) -> None:
    """Wait until that many sessions wait for a lock that an open transaction holds."""
    deadline = time.monotonic() + 20
    while one("SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted") < sessions:
        assert time.monotonic() < deadline, "nobody waits for a lock"


@contextmanager
def before(statement: str, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Do something, once, in the moment before queue.py runs a statement of farm/sql."""
    acts = [act]

    def once(name: str) -> None:
        if name == statement and acts:
            acts.pop()()

    def hot_after_act(db: Session, name: str, *values: Mapping[str, Any], **options: Any) -> Any:
        once(name)
        return hot(db, name, *values, **options)

    with monkeypatch.context() as patch:
        patch.setattr(queue, "hot", hot_after_act)
        patch.setattr(lanes, "hot", hot_after_act)
        yield
    assert not acts, f"{statement} was not run"
