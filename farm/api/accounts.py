"""Accounts and their API keys."""

from typing import Annotated, Self
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.orm import Session

from farm import accounts, answers, ids, retention
from farm.accounts import Caller, Role
from farm.api.auth import Admin, Reader
from farm.api.bodies import Body, described, read
from farm.api.params import AccountName, KeyId
from farm.api.problems import documented
from farm.db import transaction
from farm.errors import NotFound
from farm.tables import Account, ApiKey

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


class WantedKey(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Role = Field(Role.SUBMIT, description="each may what the one before may")


@router.get("/account", responses=documented())
def show_caller(caller: Reader) -> answers.Caller:
    """The account and the API key this request came with."""
    return answers.Caller(
        id=ids.public("acc", caller.account_id),
        name=caller.account,
        currency=caller.currency,
        key=ids.public("key", caller.key_id),
        role=caller.role,
    )


@router.get("/accounts", tags=["admin"], responses=documented(403))
def list_accounts(caller: Admin) -> answers.Accounts:
    """Every account."""
    with transaction() as db:
        return answers.Accounts(accounts=[_account(a) for a in accounts.every(db)])


@router.post(
    "/accounts",
    tags=["admin"],
    status_code=201,
    responses=documented(403, 409, 413, 422),
    openapi_extra=described(NewAccount),
)
def add_account(caller: Admin, body: Body) -> answers.Account:
    """Add an account."""
    new = read(NewAccount, body)
    with transaction() as db:
        return _account(accounts.create(db, new.name, currency=new.currency, weight=new.weight))


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
        account = _find(db, name)
        if "retention_days" in change.model_fields_set:
            retention.keep_for(account, change.retention_days)
        if "prompt_in_images" in change.model_fields_set:
            account.prompt_in_images = change.prompt_in_images
        db.flush()
        return _account(account)


@router.get("/accounts/{name}/keys", tags=["admin"], responses=documented(403, 404))
def list_keys(caller: Admin, name: AccountName) -> answers.Keys:
    """An account's API keys, without their secrets."""
    with transaction() as db:
        account = _find(db, name)
        return answers.Keys(keys=[_key(k, account.name) for k in accounts.keys_of(db, account)])


@router.post(
    "/accounts/{name}/keys",
    tags=["admin"],
    status_code=201,
    responses=documented(403, 404, 413, 422),
    openapi_extra=described(WantedKey),
)
def add_key(caller: Admin, name: AccountName, body: Body) -> answers.NewKey:
    """Add an API key. Its text is in this answer, and nowhere else."""
    new = read(WantedKey, body)
    with transaction() as db:
        account = _find(db, name)
        key, text = accounts.issue_key(db, account, role=new.role)
        db.refresh(key)
        return answers.NewKey(**_key(key, account.name).model_dump(), api_key=text)


@router.post("/keys/{key}/rotate", tags=["admin"], responses=documented(403, 404))
def rotate_key(caller: Admin, key: KeyId) -> answers.NewKey:
    """Give a key its next secret; the one before stops working."""
    with transaction() as db:
        key_id = ids.parse("key", key)
        text = accounts.rotate_key(db, key_id)
        db.flush()
        return answers.NewKey(**_found_key(db, key_id).model_dump(), api_key=text)


@router.post("/keys/{key}/revoke", tags=["admin"], responses=documented(403, 404))
def revoke_key(caller: Admin, key: KeyId) -> answers.Key:
    """Make a key stop working, for good."""
    with transaction() as db:
        key_id = ids.parse("key", key)
        accounts.revoke_key(db, key_id)
        db.flush()
        return _found_key(db, key_id)


def named(db: Session, caller: Caller, name: str | None) -> Account:
    """The account a request is about: the caller's own, or another that an admin names.

    Raises NotFound if there is none, and for another's if the caller is no admin.
    """
    if name is None or name == caller.account:
        return db.get_one(Account, caller.account_id)
    if caller.role is not Role.ADMIN:
        raise NotFound(account=name)
    return _find(db, name)


def _find(db: Session, name: str) -> Account:
    if not accounts.NAME.fullmatch(name):  # no account has such a name, and Postgres may not even take it
        raise NotFound(account=name)
    return accounts.find(db, name)


def _found_key(db: Session, key_id: UUID) -> answers.Key:
    key = db.get_one(ApiKey, key_id)
    return _key(key, db.get_one(Account, key.account_id).name)


def _account(account: Account) -> answers.Account:
    return answers.Account(
        id=ids.public("acc", account.id),
        name=account.name,
        currency=account.currency,
        weight=account.weight,
        created_at=account.created_at,
        retention_days=account.retention_days,
        prompt_in_images=account.prompt_in_images,
    )


def _key(key: ApiKey, account: str) -> answers.Key:
    return answers.Key(
        id=ids.public("key", key.id),
        account=account,
        role=key.role,
        version=key.version,
        created_at=key.created_at,
        revoked_at=key.revoked_at,
    )
