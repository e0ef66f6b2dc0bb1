"""Workers, and the packs they have in hand."""

from collections import defaultdict

from fastapi import APIRouter
from sqlalchemy import func, select

from farm import answers
from farm.api.auth import Admin
from farm.api.problems import documented
from farm.db import transaction
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
