"""Price books: what a unit costs, since when and until when."""

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from farm import answers, catalog, pricing
from farm.api.accounts import named
from farm.api.auth import Admin, Reader
from farm.api.bodies import Body, described, read
from farm.api.idempotency import Once
from farm.api.params import OfAccount
from farm.api.problems import documented
from farm.catalog import Method
from farm.control import utc
from farm.db import transaction
from farm.pricing import DatedPrice
from farm.tables import Account

router = APIRouter(prefix="/v1/prices", tags=["prices"])


class NewPrice(BaseModel):
    """A price of a model, for one account or for everybody, from now on or from a moment to come."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(strict=True, max_length=63)]
    rate: pricing.Amount = Field(description="as text, with all its digits", examples=["0.0032"])
    account: Annotated[str, Field(strict=True, max_length=63)] | None = Field(
        None, description="its name; left out: everybody without a price of their own"
    )
    method: Method | None = Field(None, description="the catalog's if left out")
    currency: Annotated[str, Field(strict=True, max_length=3)] | None = Field(
        None, description="the account's if left out, or the catalog's"
    )
    since: Annotated[datetime, AfterValidator(utc)] | None = Field(None, description="now if left out")


EXAMPLES = (
    {"model": "starter", "rate": "0.0032"},
    {
        "model": "starter",
        "rate": "0.37",
        "method": "image",
        "account": "acme",
        "since": "2027-01-01T00:00:00Z",
    },
)


@router.get("", responses=documented(404, 422))
def list_prices(
    caller: Reader,
    account: OfAccount = None,
    model: Annotated[
        str | None, Query(max_length=63, pattern=r"^[^\x00]*$", description="only of this model")
    ] = None,
    past: Annotated[bool, Query(description="those too that are over")] = False,
) -> answers.Prices:
    """The account's own prices and everybody's, in its currency: those in force and those planned.

    An account's own comes before everybody's.
    """
    with transaction() as db:
        owner = named(db, caller, account)
        found = pricing.every(db, owner.id, currency=owner.currency, model=model, past=past)
    return answers.Prices(prices=shown(found, owner))


@router.post("", tags=["admin"], status_code=201, responses=documented(403, 404, 409, 413, 422),
             openapi_extra=described(NewPrice, *EXAMPLES))  # fmt: skip
def set_price(caller: Admin, body: Body, once: Once) -> answers.DatedPrice:
    """Start a price. It is in force until the next one that is planned; what was admitted keeps its own."""
    new = read(NewPrice, body)

    def begin(db: Session) -> answers.DatedPrice:
        owner = None if new.account is None else named(db, caller, new.account)
        return start(db, new, owner, set_by=caller.key_id)

    return once(answers.DatedPrice, begin)


@router.delete("", tags=["admin"], responses=documented(403, 404, 422))
def withdraw_price(
    caller: Admin,
    *,
    model: Annotated[str, Query(max_length=63, pattern=r"^[^\x00]*$")],
    since: Annotated[datetime, AfterValidator(utc), Query(description="the moment it was planned for")],
    account: Annotated[
        str | None, Query(max_length=63, description="its name; left out: everybody's price")
    ] = None,
    method: Annotated[Method | None, Query(description="reuse, for the price of a reused image")] = None,
    currency: Annotated[
        str | None, Query(max_length=3, pattern=r"^[^\x00]*$", description="as when it was set")
    ] = None,
) -> answers.DatedPrice:
    """Take out a price that is planned and not in force yet: the one before it goes on until the next one."""
    with transaction() as db:
        owner = None if account is None else named(db, caller, account)
        gone = pricing.withdraw(
            db, catalog.catalog(), account=owner, model=model, since=since, method=method, currency=currency
        )
    return shown([gone], owner)[0]


def start(db: Session, new: NewPrice, owner: Account | None, *, set_by: UUID | None) -> answers.DatedPrice:
    """Start the price that was asked for. owner: the account it names."""
    made = pricing.set_price(
        db,
        catalog.catalog(),
        account=owner,
        model=new.model,
        rate=new.rate,
        method=new.method,
        currency=new.currency,
        since=new.since,
        set_by=set_by,
    )
    return shown([made], owner)[0]


def shown(prices: Iterable[DatedPrice], owner: Account | None) -> list[answers.DatedPrice]:
    """Prices of everybody, and of one account at most."""
    return [
        answers.DatedPrice(
            model=p.model,
            method=p.method,
            currency=p.currency,
            rate=pricing.shown(p.rate),
            account=None if p.account_id is None or owner is None else owner.name,
            version=p.version,
            starts_at=p.starts,
            ends_at=p.ends,
            source=p.source,
            set_at=p.set_at,
        )
        for p in prices
    ]
