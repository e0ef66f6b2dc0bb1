"""Accounts, and what they may do at most."""

from typing import Annotated, Self
from uuid import UUID

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.orm import Session

from farm import accounts, answers, ids, limits, retention
from farm.accounts import Caller, Role
from farm.api.auth import Admin, Anybody
from farm.api.bodies import Body, described, read
from farm.api.idempotency import Once
from farm.api.limits import rates
from farm.api.params import AccountName
from farm.api.problems import documented
from farm.db import transaction
from farm.errors import NotFound
from farm.limits import MAX_BIG, MAX_COUNT, MAX_RATE, Limits
from farm.settings import settings
from farm.tables import Account

router = APIRouter(prefix="/v1", tags=["accounts"])


class NewAccount(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(strict=True, examples=["acme"])]
    currency: Annotated[str, Field(strict=True, description="three capital letters")] = "USD"
    weight: Annotated[
        int, Field(strict=True, description="1 to 1000: its part of a class, against others'")
    ] = 1


class ChangedAccount(BaseModel):
    """What may be changed of an account: what is left out stays as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    retention_days: Annotated[
        int | None,
        Field(strict=True, description="1 to 36500: images go so long after their job's end; null: never"),
    ] = None
    prompt_in_images: Annotated[
        bool,
        Field(strict=True, description="whether images carry their prompt inside, from now on"),
    ] = False

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("send retention_days, prompt_in_images or both")
        return self


PerSecond = Annotated[
    float, Field(ge=0, le=MAX_RATE, allow_inf_nan=False, description="0: none; null: as the settings say")
]


class ChangedLimits(BaseModel):
    """What may be changed of an account's limits, or of a key's: what is left out stays as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: Annotated[str, Field(strict=True, max_length=64)] | None = Field(
        None, description="the limits of this key of the account; left out: of all its keys together"
    )
    reads_per_s: PerSecond | None = None
    writes_per_s: PerSecond | None = None
    submissions_per_s: PerSecond | None = None
    open_frames: Annotated[int, Field(strict=True, ge=0, le=MAX_BIG)] | None = Field(
        None, description="frames that have not ended; not for a key"
    )
    inputs: Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT)] | None = None
    input_bytes: Annotated[int, Field(strict=True, ge=0, le=MAX_BIG)] | None = None


@router.get("/account", responses=documented())
def show_caller(caller: Anybody) -> answers.Caller:
    """The account and the API key this request came with."""
    return answers.Caller(
        id=ids.public("acc", caller.account_id),
        name=caller.account,
        currency=caller.currency,
        key=ids.public("key", caller.key_id),
        role=caller.role,
        scopes=sorted(accounts.scopes_of(caller.role) if caller.scopes is None else caller.scopes),
        username=caller.account,
    )


@router.get("/limits", responses=documented())
def show_limits(caller: Anybody) -> answers.Limits:
    """What the account, and the API key this request came with, may do at most, and what of it is used."""
    with transaction() as db:
        return limits_of(db, db.get_one(Account, caller.account_id), ids.public("key", caller.key_id))


@router.get("/accounts", tags=["admin"], responses=documented(403))
def list_accounts(caller: Admin) -> answers.Accounts:
    """Every account."""
    with transaction() as db:
        return answers.Accounts(accounts=[shown(a) for a in accounts.every(db)])


@router.post(
    "/accounts",
    tags=["admin"],
    status_code=201,
    responses=documented(403, 409, 413, 422),
    openapi_extra=described(NewAccount),
)
def add_account(caller: Admin, body: Body, once: Once) -> answers.Account:
    """Add an account."""
    new = read(NewAccount, body)
    return once(
        answers.Account,
        lambda db: shown(accounts.create(db, new.name, currency=new.currency, weight=new.weight)),
    )


@router.get("/accounts/{name}", tags=["admin"], responses=documented(403, 404))
def show_account(caller: Admin, name: AccountName) -> answers.Account:
    """An account."""
    with transaction() as db:
        return shown(find(db, name))


@router.patch(
    "/accounts/{name}",
    tags=["admin"],
    responses=documented(403, 404, 413, 422),
    openapi_extra=described(ChangedAccount),
)
def change_account(caller: Admin, name: AccountName, body: Body) -> answers.Account:
    """Say for how long an account's images are kept, and whether they carry their prompt.

    What is past its time goes within minutes, for good.
    """
    change = read(ChangedAccount, body)
    with transaction() as db:
        account = find(db, name)
        if "retention_days" in change.model_fields_set:
            retention.keep_for(account, change.retention_days)
        if "prompt_in_images" in change.model_fields_set:
            account.prompt_in_images = change.prompt_in_images
        db.flush()
        return shown(account)


@router.get("/accounts/{name}/limits", tags=["admin"], responses=documented(403, 404, 422))
def show_limits_of_account(
    caller: Admin,
    name: AccountName,
    key: Annotated[str | None, Query(description="with the rates of this key of the account")] = None,
) -> answers.Limits:
    """What an account may do at most, and what of it is used."""
    with transaction() as db:
        return limits_of(db, find(db, name), key)


@router.patch(
    "/accounts/{name}/limits",
    tags=["admin"],
    responses=documented(403, 404, 413, 422),
    openapi_extra=described(ChangedLimits, {"submissions_per_s": 50, "open_frames": 200_000}),
)
def change_limits(caller: Admin, name: AccountName, body: Body, request: Request) -> answers.Limits:
    """Say what an account, or one of its keys, may do at most; null: what the farm's settings say."""
    change = read(ChangedLimits, body)
    with transaction() as db:
        changed = put_limits(db, find(db, name), change)
    request.app.state.door.forget()
    return changed


def put_limits(db: Session, account: Account, change: ChangedLimits) -> answers.Limits:
    key = None if change.key is None else _own_key(db, account, change.key)
    changes = {n: getattr(change, n) for n in change.model_fields_set if n != "key"}
    limits.put(db, account, changes, key=key)
    return limits_of(db, account, change.key)


def _own_key(db: Session, account: Account, key: str) -> UUID:
    """Raises NotFound if it is not the account's."""
    found = accounts.find_key(db, ids.parse("key", key))
    if found.account_id != account.id:
        raise NotFound(key=key)
    return found.id


def named(db: Session, caller: Caller, name: str | None) -> Account:
    """The account a request is about: the caller's own, or another that an admin names.

    Raises NotFound if there is none, and for another's if the caller is no admin.
    """
    if name is None or name == caller.account:
        return db.get_one(Account, caller.account_id)
    if not caller.may(Role.ADMIN):
        raise NotFound(account=name)
    return find(db, name)


def find(db: Session, name: str) -> Account:
    if not accounts.NAME.fullmatch(name):  # no account has such a name, and Postgres may not even take it
        raise NotFound(account=name)
    return accounts.find(db, name)


def shown(account: Account) -> answers.Account:
    return answers.Account(
        id=ids.public("acc", account.id),
        name=account.name,
        currency=account.currency,
        weight=account.weight,
        created_at=account.created_at,
        retention_days=account.retention_days,
        prompt_in_images=account.prompt_in_images,
    )


def limits_of(db: Session, account: Account, key: str | None) -> answers.Limits:
    """What an account, and a key of it, may do at most. Raises NotFound if the key is not the account's."""
    use, own = limits.use(db, account.id), limits.of(db, account.id)
    rates_of_key = None
    if key is not None:
        rates_of_key = _rates(limits.of(db, account.id, _own_key(db, account, key)), own)
    return answers.Limits(
        account=account.name,
        key=key,
        account_rates=_rates(own),
        key_rates=rates_of_key,
        open_frames=answers.Filled(used=use.open_frames, allowed=use.max_open_frames),
        inputs=answers.Filled(used=use.inputs, allowed=use.max_inputs),
        input_bytes=answers.Filled(used=use.input_bytes, allowed=use.max_input_bytes),
    )


def _rates(*own: Limits) -> answers.Rates:
    return answers.Rates(**rates(*own), burst_s=settings().rate_burst_s)
