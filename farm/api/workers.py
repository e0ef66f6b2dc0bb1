"""Workers, and the packs they have in hand."""

from collections import defaultdict

from fastapi import APIRouter
from sqlalchemy import func, select

from farm import answers, tokens
from farm.api.auth import Admin
from farm.api.problems import documented
from farm.db import transaction
from farm.errors import NotFound
from farm.tables import Ailment, Pack, Worker

router = APIRouter(prefix="/v1/workers", tags=["admin"])


@router.get("", responses=documented(403))
def list_workers(caller: Admin) -> answers.Workers:
    """Every worker the farm knows of."""
    in_hand: dict[str, list[Pack]] = defaultdict(list)
    ailing: dict[str, list[Ailment]] = defaultdict(list)
    with transaction() as db:
        now = func.clock_timestamp()
        for ailment in db.scalars(select(Ailment).where(Ailment.until > now).order_by(Ailment.model)):
            ailing[ailment.worker].append(ailment)
        for pack in db.scalars(select(Pack).where(Pack.closed_at.is_(None)).order_by(Pack.id)):
            in_hand[pack.worker].append(pack)
        workers = db.scalars(select(Worker).order_by(Worker.pool, Worker.id)).all()
    return answers.Workers(workers=[_worker(w, in_hand[w.id], ailing[w.id]) for w in workers])


@router.post("/{worker}/drain", responses=documented(403, 404))
def drain_worker(caller: Admin, worker: str) -> answers.Worker:
    """Have a worker claim nothing more: what it has in hand it finishes within FARM_GRACE_S, or gives back."""
    return _set(worker, "up", "draining")


@router.post("/{worker}/undrain", responses=documented(403, 404))
def undrain_worker(caller: Admin, worker: str) -> answers.Worker:
    """Have a drained worker claim again: it is started anew for that."""
    return _set(worker, "draining", "up")


def _set(worker: str, before: str, after: str) -> answers.Worker:
    with transaction() as db:
        found = db.get(Worker, worker, with_for_update=True)
        if found is None:
            raise NotFound("no such worker", worker=worker)
        if found.state == before:
            found.state = after
        packs = db.scalars(
            select(Pack).where(Pack.worker == worker, Pack.closed_at.is_(None)).order_by(Pack.id)
        )
        ailing = db.scalars(
            select(Ailment).where(Ailment.worker == worker, Ailment.until > func.clock_timestamp())
        )
        answer = _worker(found, list(packs), list(ailing))
    if after == "up":
        tokens.wake(answer.models)
    return answer


def _worker(worker: Worker, packs: list[Pack], ailments: list[Ailment]) -> answers.Worker:
    is_sick = worker.state == "up" and any(not a.model for a in ailments)
    return answers.Worker(
        id=worker.id,
        pool=worker.pool,
        models=worker.models,
        device=worker.device,
        state="sick" if is_sick else worker.state,
        started_at=worker.started_at,
        seen_at=worker.seen_at,
        packs=[
            answers.PackInHand(
                id=str(p.id),
                model=p.model,
                priority=p.priority,
                frames=p.frames,
                claimed_at=p.claimed_at,
                lease_until=p.lease_until,
            )
            for p in packs
        ],
        ailments=[
            answers.Ailment(model=a.model or None, reason=a.reason, since=a.since, until=a.until)
            for a in ailments
        ],
    )
