"""Quotes: what a job costs, before it is one."""

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from farm import answers, budgets, ids, pricing, submissions
from farm.api.auth import Submitter
from farm.api.bodies import Body, described, read
from farm.api.enhancer import helped
from farm.api.idempotency import Once
from farm.api.inputs import taken
from farm.api.problems import documented
from farm.budgets import Room
from farm.quotes import Quoted
from farm.submissions import Submission

router = APIRouter(prefix="/v1/quotes", tags=["jobs"])


@router.post("", status_code=201, responses=documented(402, 403, 404, 409, 410, 413, 422),
             openapi_extra=described(Submission, {"spec": {"prompt": "a red circle", "count": 1000}}))  # fmt: skip
async def quote_job(caller: Submitter, body: Body, once: Once) -> answers.Quote:
    """Say what a job costs at most, to the last digit, and when it may be done.

    The body is a job's. Submit the same with the quote's id as `quote` until it expires: the job then costs that at
    most, whatever the prices are by then, and less where frames fail, are cancelled or reused. A quote keeps prices,
    not room in a budget: `fits` says whether a job that costs all of it would be admitted now, `budgets` what is left.
    """
    submission = await run_in_threadpool(read, Submission, body)
    submission = await taken(caller, submission, idempotency_key=None)
    submission = await helped(submission)

    def quote(db: Session) -> answers.Quote:
        quoted = submissions.quote(db, caller, submission)
        return _shown(quoted, budgets.rooms(db, caller, quoted.amount))

    return await run_in_threadpool(once, answers.Quote, quote)


def _shown(quoted: Quoted, rooms: list[Room]) -> answers.Quote:
    return answers.Quote(
        id=ids.public("quo", quoted.id),
        frames=quoted.frames,
        currency=quoted.currency,
        amount=pricing.shown(quoted.amount),
        lines=[
            answers.QuoteLine(
                model=p.rate.model,
                method=p.rate.method,
                rate=pricing.shown(p.rate.rate),
                frames=p.frames,
                quantity=p.quantity,
                amount=pricing.shown(p.amount),
            )
            for p in quoted.parts
        ],
        expires_at=quoted.expires_at,
        expected_start=quoted.starts,
        expected_end=quoted.ends,
        fits=all(room.refused is None for room in rooms),
        budgets=[
            answers.Room(
                budget=room.use.whose,
                period=room.use.period,
                currency=room.use.currency,
                limit=pricing.shown(room.use.limit),
                left=pricing.shown(room.left),
                needed=pricing.shown(room.needed),
                refused=room.refused,
            )
            for room in rooms
        ],
    )
