"""Budgets: what an account may spend; and what happened to it that is no job's."""

from decimal import Decimal
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from farm import answers, budgets, ids, pricing
from farm.accounts import Role
from farm.api.accounts import named
from farm.api.auth import Admin, Reader
from farm.api.bodies import Body, described, read
from farm.api.params import OfAccount
from farm.api.problems import documented
from farm.budgets import Action, Period, Use
from farm.db import transaction
from farm.errors import Fault, Invalid, NotFound
from farm.tables import Account

router = APIRouter(prefix="/v1", tags=["budgets"])


class WantedThreshold(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    percent: Annotated[int, Field(strict=True, description="1 to 100, of the limit, charged")]
    action: Action = Field(description="each but notify also does what the one before does")


class WantedBudget(BaseModel):
    """A budget as it shall be, in the account's currency."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: pricing.Amount | None = Field(
        description="as text; null: there shall be none", examples=["250.00"]
    )
    account: Annotated[str, Field(strict=True, max_length=63)] | None = Field(
        None, description="its name; left out: the caller's"
    )
    key: Annotated[str, Field(strict=True, max_length=64)] | None = Field(
        None, description="an API key's id; left out: of the whole account"
    )
    period: Period = Field(Period.MONTH, description="a calendar month, UTC; or all time")
    thresholds: list[WantedThreshold] = []


EXAMPLE = {
    "account": "acme",
    "limit": "250.00",
    "period": "month",
    "thresholds": [{"percent": 80, "action": "notify"}, {"percent": 100, "action": "drain"}],
}


@router.get("/budget", responses=documented(404))
def show_budget(caller: Reader, account: OfAccount = None) -> answers.Budgets:
    """The account's budgets, and what of them is gone; of keys' own budgets the caller's, an admin sees all."""
    with transaction() as db:
        owner = named(db, caller, account)
        return shown(db, owner, key=None if caller.may(Role.ADMIN) else caller.key_id)


@router.put("/budget", tags=["admin"], responses=documented(403, 404, 413, 422),
            openapi_extra=described(WantedBudget, EXAMPLE))  # fmt: skip
def set_budget(caller: Admin, body: Body) -> answers.Budgets:
    """Set one budget of an account or of one of its keys, or take it away. What was admitted stays."""
    wanted = read(WantedBudget, body)
    with transaction() as db:
        return put(db, wanted, named(db, caller, wanted.account))


def put(db: Session, wanted: WantedBudget, owner: Account) -> answers.Budgets:
    """Set or take away what was asked for, of the account it names; the account's budgets as they are then."""
    budgets.put(
        db,
        owner,
        wanted.limit,
        period=wanted.period,
        key=None if wanted.key is None else _key(wanted.key),
        thresholds=[budgets.Threshold(t.percent, t.action) for t in wanted.thresholds],
    )
    return shown(db, owner, key=None)


def _key(text: str) -> UUID:
    try:
        return ids.parse("key", text)
    except NotFound:
        raise Invalid([Fault("key", text, "it must be an API key's id, as key_…")]) from None


def shown(db: Session, account: Account, *, key: UUID | None) -> answers.Budgets:
    """An account's budgets; key: without those of other keys."""
    return answers.Budgets(
        account=account.name, budgets=[_shown(use) for use in budgets.every(db, account.id, key=key)]
    )


def _shown(use: Use) -> answers.Budget:
    return answers.Budget(
        key=use.api_key_id and ids.public("key", use.api_key_id),
        period=use.period,
        month=f"{use.month:%Y-%m}" if use.period is Period.MONTH else None,
        currency=use.currency,
        limit=pricing.shown(use.limit),
        spent=pricing.shown(use.spent),
        held=pricing.shown(use.held),
        left=pricing.shown(max(use.left, Decimal(0))),
        stopped=use.stopped is not None,
        thresholds=[
            answers.Threshold(percent=t.percent, action=t.action, reached_at=t.reached_at)
            for t in use.thresholds
        ],
    )
