"""What an account used, and what that cost; and the proof that it is right."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from farm import answers, ids, jobs, ledger, pricing
from farm.api.accounts import named
from farm.api.auth import Admin, Reader
from farm.api.bodies import Body, described, read
from farm.api.idempotency import Once
from farm.api.params import MAX_BIGINT, Moment, OfAccount, job_id
from farm.api.problems import documented
from farm.db import transaction
from farm.errors import Fault, Invalid
from farm.ledger import Entry, HourlyLine, UsageLine
from farm.settings import settings
from farm.storage import open_store

router = APIRouter(prefix="/v1", tags=["usage"])

NDJSON = {"application/x-ndjson": {"schema": {"$ref": "#/components/schemas/UsageEntry"}}}
MAX_EXPORT = 1_000_000  # rows of one answer
EVENTS = 2_000  # looked at in one transaction
MAX_DAYS = 62  # of hourly rows in one answer


class NewReversal(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    frame: Annotated[str, Field(strict=True, examples=["frm_0192f0c1a2b37c4d8e5f6a7b8c000001"])]
    reason: Annotated[str, Field(strict=True, description=f"1 to {ledger.MAX_REASON} characters")]


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


# ------------------------------------------------------------------------------------------------ export


@router.get(
    "/usage/export",
    response_class=StreamingResponse,
    responses={200: {"description": "one JSON object a line", "content": NDJSON}, **documented(404, 422)},
)
def export_usage(
    caller: Reader,
    cursor: Annotated[str, Query(description="of the last row that is at hand; 0: from the start")] = "0",
    limit: Annotated[int, Query(ge=1, le=MAX_EXPORT, description="rows at most")] = 100_000,
    account: OfAccount = None,
) -> StreamingResponse:
    """Every charge and reversal in the order they became known, after a cursor.

    A row comes once and none is left out, whatever commits meanwhile: an answer without rows says that all are at
    hand. Go on with the cursor of the last row that came whole.
    """
    start = _cursor(cursor)
    with transaction() as db:
        owner = named(db, caller, account).id
    return StreamingResponse(ndjson(owner, start, limit), media_type="application/x-ndjson")


def _cursor(written: str) -> int:
    if written.isascii() and written.isdigit() and len(written) < 20 and int(written) <= MAX_BIGINT:
        return int(written)
    raise Invalid([Fault("cursor", written, "it must be a row's cursor, or 0")])


def ndjson(owner: UUID, cursor: int, limit: int) -> Iterator[str]:
    """The account's rows after a cursor, some lines at a time. No transaction is open while the client takes them."""
    more = True
    while more and limit > 0:
        with transaction() as db:
            page, cursor, more = ledger.export(db, owner, cursor=cursor, limit=EVENTS)
        yield "".join(f"{_entry(e).model_dump_json()}\n" for e in page[:limit])
        limit -= len(page)


def _entry(entry: Entry) -> answers.UsageEntry:
    return answers.UsageEntry(
        cursor=str(entry.number),
        frame=ids.public("frm", entry.frame_id),
        kind="reversal" if entry.reversal else "charge",
        job=ids.public("job", entry.job_id),
        model=entry.model,
        method=entry.method,
        currency=entry.currency,
        rate=pricing.shown(entry.rate),
        quantity=-entry.quantity if entry.reversal else entry.quantity,
        amount=pricing.shown(entry.amount),
        at=entry.at,
    )


@router.get("/usage/hourly", responses=documented(404, 422))
def show_hourly_usage(
    caller: Reader, since: Moment | None = None, until: Moment | None = None, account: OfAccount = None
) -> answers.Hourly:
    """What was used hour by hour, of the last day if no times are given.

    A row's id is always the same, so that one sent twice to a meter counts once. Send rows that are final: others may
    grow. Both times are taken down to the start of their hour, and answered so: a row is always that of a whole hour.
    """
    end = ledger.hour_of(until) if until else ledger.hour_of(datetime.now(UTC)) + ledger.HOUR
    start = ledger.hour_of(since) if since else end - timedelta(days=1)
    if not timedelta(0) <= end - start <= timedelta(days=MAX_DAYS):
        raise Invalid([Fault("since", start.isoformat(), f"allowed are up to {MAX_DAYS} days before until")])
    with transaction() as db:
        lines = ledger.hourly(db, named(db, caller, account).id, since=start, until=end)
    return answers.Hourly(since=start, until=end, lines=[_hourly(line) for line in lines])


def _hourly(line: HourlyLine) -> answers.HourlyLine:
    return answers.HourlyLine(
        id=str(line.id),
        hour=line.hour,
        model=line.model,
        method=line.method,
        currency=line.currency,
        rate=pricing.shown(line.rate),
        frames=line.frames,
        reversed=line.reversed,
        quantity=line.quantity,
        amount=pricing.shown(line.amount),
        final=line.final,
    )


# ------------------------------------------------------------------------------------------------ admins


@router.post(
    "/usage/reversals",
    tags=["admin"],
    status_code=201,
    responses=documented(403, 404, 409, 413, 422),
    openapi_extra=described(NewReversal),
)
def reverse_charge(caller: Admin, body: Body, once: Once) -> answers.Reversal:
    """Take back a frame's charge. Money only: the frame stays done and keeps its image."""
    new = read(NewReversal, body)

    def reverse(db: Session) -> answers.Reversal:
        done = ledger.reverse(db, ids.parse("frm", new.frame), reason=new.reason, api_key_id=caller.key_id)
        return answers.Reversal(
            frame=new.frame,
            amount=pricing.shown(done.amount),
            currency=done.currency,
            reason=new.reason.strip(),
            at=done.at,
        )

    return once(answers.Reversal, reverse)


@router.get("/audit", tags=["admin"], responses=documented(403))
def audit_books(caller: Admin) -> answers.Audit:
    """Every fact of the books that is not as it must be; none, if all is well. What is not there is not seen."""
    with transaction() as db:
        found, unseen = ledger.audit(db), ledger.unseen(db)
    return answers.Audit(
        violations=_violations(found), unseen=[answers.Unseen(what=u.what, detail=u.detail) for u in unseen]
    )


@router.get("/audit/images", tags=["admin"], responses=documented(403, 422))
def audit_images(
    caller: Admin,
    after: Annotated[int, Query(ge=0, le=MAX_BIGINT, description="next of the page before")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="images of a page")] = 100,
    seed: Annotated[
        int | None,
        Query(
            ge=0, le=MAX_BIGINT, description="pages in an order drawn by it; the same for each page of a run"
        ),
    ] = None,
) -> answers.ImagesAudit:
    """Read stored images and compare them with the hashes that were booked.

    Oldest first; with a seed at random. Pages that go on from next give no image twice.
    """
    with transaction() as db:
        images = ledger.images_after(db, after, limit=limit, seed=seed)
    found = ledger.audit_images(images, open_store(settings().storage_url.get_secret_value()))
    with transaction() as db:  # an image that was deleted meanwhile is not missing
        kept = {str(i.id) for i in ledger.images_among(db, [int(v.subject) for v in found])}
    return answers.ImagesAudit(
        checked=len(images),
        violations=_violations(v for v in found if v.subject in kept),
        next=images[-1].id if len(images) == limit else None,
    )


def _violations(found: Iterable[ledger.Violation]) -> list[answers.Violation]:
    return [answers.Violation(violation=v.violation, subject=v.subject, detail=v.detail) for v in found]
