"""Price books: what a unit costs, since when and until when."""

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from farm import answers, catalog, pricing
from farm.api.accounts import named
from farm.api.auth import Admin, Reader
from farm.api.bodies import Body, described, read
from farm.api.params import OfAccount, utc
from farm.api.problems import documented
from farm.catalog import Method
from farm.db import transaction
from farm.pricing import DatedPrice

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
    return answers.Prices(prices=list(_shown(found, {owner.id: owner.name})))


@router.post("", tags=["admin"], status_code=201, responses=documented(403, 404, 413, 422),
             openapi_extra=described(NewPrice, *EXAMPLES))  # fmt: skip
def set_price(caller: Admin, body: Body) -> answers.DatedPrice:
    """Start a price. It is in force until the next one that is planned; what was admitted keeps its own."""
    new = read(NewPrice, body)
    with transaction() as db:
        account = None if new.account is None else named(db, caller, new.account)
        made = pricing.set_price(
            db,
            catalog.catalog(),
            account=account,
            model=new.model,
            rate=new.rate,
            method=new.method,
            currency=new.currency,
            since=new.since,
            set_by=caller.key_id,
        )
    (answer,) = _shown([made], {account.id: account.name} if account is not None else {})
    return answer


def _shown(prices: Iterable[DatedPrice], names: dict[UUID, str]) -> Iterable[answers.DatedPrice]:
    return (
        answers.DatedPrice(
            model=p.model,
            method=p.method,
            currency=p.currency,
            rate=pricing.shown(p.rate),
            account=None if p.account_id is None else names[p.account_id],
            version=p.version,
            starts_at=p.starts,
            ends_at=p.ends,
            source=p.source,
            set_at=p.set_at,
        )
        for p in prices
    )
