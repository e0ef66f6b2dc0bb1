"""What an account used, and what that cost."""

from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal
from typing import Annotated

from fastapi import APIRouter, Query

from farm import answers, jobs, ledger, pricing
from farm.api.auth import Admin, Reader
from farm.api.params import Moment, job_id
from farm.api.problems import documented
from farm.db import transaction
from farm.ledger import UsageLine

router = APIRouter(prefix="/v1", tags=["usage"])


@router.get("/usage", responses=documented(404, 422))
def show_usage(
    caller: Reader,
    since: Moment | None = None,
    until: Moment | None = None,
    job: Annotated[str | None, Query(description="only of this job")] = None,
) -> answers.Usage:
    """What the account used in [since, until), by model and rate."""
    with transaction() as db:
        found = None if job is None else jobs.find(db, caller.account_id, job_id(job)).id
        lines = ledger.usage_lines(db, caller.account_id, since=since, until=until, job_id=found)
    return answers.Usage(since=since, until=until, lines=[_line(u) for u in lines], totals=_totals(lines))


def _line(line: UsageLine) -> answers.UsageLine:
    return answers.UsageLine(
        model=line.model,
        method=line.method,
        currency=line.currency,
        rate=pricing.shown(line.rate),
        frames=line.frames,
        quantity=line.quantity,
        amount=pricing.shown(line.amount),
    )


def _totals(lines: Iterable[UsageLine]) -> dict[str, str]:
    amounts: dict[str, list[Decimal]] = defaultdict(list)
    for line in lines:
        amounts[line.currency].append(line.amount)
    return {currency: pricing.shown(pricing.total(parts)) for currency, parts in sorted(amounts.items())}


@router.get("/audit", tags=["admin"], responses=documented(403))
def audit_books(caller: Admin) -> answers.Audit:
    """Every fact of the books that is not as it must be; none, if all is well."""
    with transaction() as db:
        found = ledger.audit(db)
    return answers.Audit(
        violations=[
            answers.Violation(violation=v.violation, subject=v.subject, detail=v.detail) for v in found
        ]
    )
