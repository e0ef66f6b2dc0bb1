"""What accounts owe for a month: as JSON, as CSV, and as a page to send."""

import csv
import io
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from farm import answers, pricing, statements
from farm.api import statement_page
from farm.api.accounts import named
from farm.api.auth import Admin, Reader
from farm.api.bodies import Body, described, read
from farm.api.params import OfAccount
from farm.api.problems import documented
from farm.catalog import Method
from farm.db import transaction
from farm.statements import Bill, Line

router = APIRouter(prefix="/v1/statements", tags=["usage"])

CLOSING_S = 5.0  # how long one call goes on closing
UNITS: dict[str, str] = {
    Method.MPX_STEP: "pixel-step",
    Method.IMAGE: "image",
    Method.REUSE: "reused image",
}  # of a quantity
TEXT = {"schema": {"type": "string"}}
FORMATS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/csv": TEXT, "text/html": TEXT}}}
HEADERS = {
    "Cache-Control": "private, no-cache",
    "Vary": "Accept",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}

Month = Annotated[str, Path(description="a year and a month, UTC", examples=["2026-11"])]


class Closing(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    account: Annotated[str, Field(strict=True, examples=["acme"])]


@router.get("", responses=documented(404))
def list_statements(caller: Reader, account: OfAccount = None) -> answers.Statements:
    """The account's closed statements, newest first."""
    with transaction() as db:
        found = statements.every(db, named(db, caller, account))
    return answers.Statements(
        statements=[
            answers.StatementSummary(
                account=b.account,
                month=f"{b.month:%Y-%m}",
                currency=b.currency,
                total=f"{b.total:f}",
                closed_at=b.closed_at,
            )
            for b in found
        ]
    )


@router.get("/{month}", response_model=answers.Statement, responses={**FORMATS, **documented(404, 422)})
def show_statement(
    caller: Reader,
    month: Month,
    response: Response,
    *,
    account: OfAccount = None,
    form: Annotated[
        Literal["json", "csv", "html"] | None,
        Query(alias="format", description="left out: html for a browser, or else json"),
    ] = None,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
) -> answers.Statement | Response:
    """A month's statement; while the month is not closed, a draft of it.

    A browser shows the page: it asks for the API key as the password, whatever the name.
    """
    form = form or _preferred(accept)
    wanted = statements.month_of(month)
    with transaction() as db:
        bill = statements.find(db, named(db, caller, account), wanted)
    if form == "json":
        response.headers["Vary"] = "Accept"
        return _answer(bill)
    text, kind = (_csv(bill), "text/csv") if form == "csv" else (statement_page.html(bill), "text/html")
    headers = {**HEADERS, "Content-Disposition": f'inline; filename="{bill.account}-{month}.{form}"'}
    return Response(text, media_type=f"{kind}; charset=utf-8", headers=headers)


def _preferred(accept: str) -> Literal["json", "html"]:
    """A browser names HTML before anything else."""
    return "html" if accept.lower().startswith("text/html") else "json"


@router.post(
    "/{month}/close",
    tags=["admin"],
    responses=documented(403, 404, 409, 413, 422),
    openapi_extra=described(Closing),
)
def close_statement(caller: Admin, month: Month, body: Body) -> answers.Statement:
    """Close a month that is over, or go on closing it for some seconds: call it until status is closed.

    What is closed stays as it is; usage that becomes known later is on the next statement.
    """
    wanted, about = statements.month_of(month), read(Closing, body)
    with transaction() as db:
        owner = named(db, caller, about.account)
    give_up, closed = time.monotonic() + CLOSING_S, False
    while not closed and time.monotonic() < give_up:
        with transaction() as db:
            closed = statements.close_further(db, owner, wanted)
    with transaction() as db:
        return _answer(statements.find(db, owner, wanted))


def _answer(bill: Bill) -> answers.Statement:
    return answers.Statement(
        account=bill.account,
        month=f"{bill.month:%Y-%m}",
        status=bill.status,
        currency=bill.currency,
        lines=[_line(line) for line in bill.lines],
        exact=pricing.shown(bill.exact),
        total=f"{bill.total:f}",
        closed_at=bill.closed_at,
    )


def _line(line: Line) -> answers.StatementLine:
    return answers.StatementLine(
        model=line.model,
        method=line.method,
        rate=pricing.shown(line.rate),
        frames=line.frames,
        reversed=line.reversed,
        late=line.late,
        quantity=line.quantity,
        exact=pricing.shown(line.exact),
        amount=f"{line.amount:f}",
    )


COLUMNS = ("model", "method", "rate", "frames", "reversed", "late", "quantity")
AMOUNTS = ("exact", "amount")


def _csv(bill: Bill) -> str:
    """One row a line; account, month, status and currency stand in each. unit: of quantity."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(("account", "month", "status", "currency", *COLUMNS, "unit", *AMOUNTS))
    for line in bill.lines:
        shown = _line(line)
        writer.writerow(
            (bill.account, f"{bill.month:%Y-%m}", bill.status.value, bill.currency,
             *(getattr(shown, column) for column in COLUMNS), UNITS.get(line.method, line.method),
             *(getattr(shown, column) for column in AMOUNTS))
        )  # fmt: skip
    return file.getvalue()
