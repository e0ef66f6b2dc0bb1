"""Quotes: what a job costs, before it is one."""

from fastapi import APIRouter

from farm import answers, ids, jobs, pricing
from farm.api.auth import Submitter
from farm.api.bodies import Body, described, read
from farm.api.problems import documented
from farm.db import transaction
from farm.jobs import Submission
from farm.quotes import Quoted

router = APIRouter(prefix="/v1/quotes", tags=["jobs"])


@router.post("", status_code=201, responses=documented(402, 403, 413, 422),
             openapi_extra=described(Submission, {"spec": {"prompt": "a red circle", "count": 1000}}))  # fmt: skip
def quote_job(caller: Submitter, body: Body) -> answers.Quote:
    """Say what a job costs at most, to the last digit, and when it may be done.

    The body is a job's. Submit the same with the quote's id as `quote` until it expires: the job then costs that at
    most, whatever the prices are by then, and less where frames fail, are cancelled or reused.
    """
    submission = read(Submission, body)
    with transaction() as db:
        return _shown(jobs.quote(db, caller, submission))


def _shown(quoted: Quoted) -> answers.Quote:
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
    )
