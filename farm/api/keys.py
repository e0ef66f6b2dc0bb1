"""API keys: how accounts prove themselves."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Self
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.orm import Session

from farm import accounts, answers, ids
from farm.accounts import MAX_OVERLAP_S, Role
from farm.api.accounts import find
from farm.api.auth import Admin
from farm.api.bodies import Body, described, read
from farm.api.idempotency import Once
from farm.api.params import AccountName, KeyId
from farm.api.problems import documented
from farm.control import utc
from farm.db import transaction
from farm.tables import Account, ApiKey

router = APIRouter(prefix="/v1", tags=["admin"])

Name = Annotated[str, Field(strict=True, max_length=100, description="what it is for", examples=["web shop"])]
Expiry = Annotated[
    datetime,
    AfterValidator(utc),
    Field(description="RFC 3339; it opens nothing from then on", examples=["2027-01-01T00:00:00Z"]),
]


class WantedKey(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Role = Field(Role.SUBMIT, description="each may what the one before may")
    scopes: Annotated[list[Role], Field(min_length=1, max_length=3)] | None = Field(
        None, description="instead of a role: what it may do, and no more", examples=[["submit"]]
    )
    name: Name | None = None
    expires_at: Expiry | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.scopes is not None and "role" in self.model_fields_set:
            raise ValueError("send either role or scopes")
        return self


class ChangedKey(BaseModel):
    """What may be changed of a key: what is left out stays as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name | None = None
    expires_at: Expiry | None = Field(None, description="null: never")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("send name, expires_at or both")
        return self


class Rotation(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    overlap_s: Annotated[int, Field(strict=True, ge=0, le=MAX_OVERLAP_S)] = Field(
        0, description="seconds for which the secret before this one opens too"
    )


OPTIONAL = described(Rotation, {"overlap_s": 86_400})
OPTIONAL["requestBody"]["required"] = False


@router.get("/accounts/{name}/keys", responses=documented(403, 404))
def list_keys(caller: Admin, name: AccountName) -> answers.Keys:
    """An account's API keys, without their secrets."""
    with transaction() as db:
        account = find(db, name)
        return answers.Keys(keys=[shown(k, account.name) for k in accounts.keys_of(db, account)])


@router.post(
    "/accounts/{name}/keys",
    status_code=201,
    responses=documented(403, 404, 409, 413, 422),
    openapi_extra=described(WantedKey, {"role": "submit", "name": "web shop"}, {"scopes": ["submit"]}),
)
def add_key(caller: Admin, name: AccountName, body: Body, once: Once) -> answers.NewKey:
    """Add an API key. Its text is in this answer, and in none but its repetition."""
    new = read(WantedKey, body)
    return once(answers.NewKey, lambda db: add(db, find(db, name), new), without="api_key", whole=_whole)


@router.get("/keys/{key}", responses=documented(403, 404))
def show_key(caller: Admin, key: KeyId) -> answers.Key:
    """An API key, without its secret."""
    with transaction() as db:
        return found(db, ids.parse("key", key))


@router.patch("/keys/{key}", responses=documented(403, 404, 413, 422), openapi_extra=described(ChangedKey))
def change_key(caller: Admin, key: KeyId, body: Body, request: Request) -> answers.Key:
    """Rename a key, or say when it expires."""
    wanted = read(ChangedKey, body)
    with transaction() as db:
        changed = change(db, ids.parse("key", key), wanted)
    request.app.state.door.forget()
    return changed


@router.post("/keys/{key}/rotate", responses=documented(403, 404, 409, 413, 422), openapi_extra=OPTIONAL)
def rotate_key(caller: Admin, key: KeyId, body: Body, request: Request, once: Once) -> answers.NewKey:
    """Give a key its next secret; the one before stops working, at once or after overlap_s."""
    rotation = read(Rotation, body) if body else Rotation()
    rotated = once(
        answers.NewKey,
        lambda db: rotate(db, ids.parse("key", key), overlap_s=rotation.overlap_s),
        without="api_key",
        whole=_whole,
    )
    request.app.state.door.forget()
    return rotated


@router.post("/keys/{key}/revoke", responses=documented(403, 404))
def revoke_key(caller: Admin, key: KeyId, request: Request) -> answers.Key:
    """Make a key stop working, for good: here at once, in other API processes within 5 seconds."""
    with transaction() as db:
        key_id = ids.parse("key", key)
        accounts.revoke_key(db, key_id)
        db.flush()
        revoked = found(db, key_id)
    request.app.state.door.forget()
    return revoked


def _whole(kept: Mapping[str, Any]) -> dict[str, Any]:
    """An answer that was kept without the key's text, with it."""
    return {**kept, "api_key": accounts.text_of(ids.parse("key", kept["id"]), kept["version"])}


# ------------------------------------------------------------------------------------------------ in the books


def add(db: Session, account: Account, new: WantedKey) -> answers.NewKey:
    key, text = accounts.issue_key(
        db, account, role=new.role, scopes=new.scopes, name=new.name, expires_at=new.expires_at
    )
    db.refresh(key)
    return answers.NewKey(**shown(key, account.name).model_dump(), api_key=text)


def change(db: Session, key_id: UUID, wanted: ChangedKey) -> answers.Key:
    accounts.change_key(db, key_id, {n: getattr(wanted, n) for n in wanted.model_fields_set})
    return found(db, key_id)


def rotate(db: Session, key_id: UUID, *, overlap_s: float) -> answers.NewKey:
    text = accounts.rotate_key(db, key_id, overlap_s=overlap_s)
    db.flush()
    return answers.NewKey(**found(db, key_id).model_dump(), api_key=text)


def found(db: Session, key_id: UUID) -> answers.Key:
    """Raises NotFound if there is no such key."""
    key = accounts.find_key(db, key_id)
    return shown(key, db.get_one(Account, key.account_id).name)


def shown(key: ApiKey, account: str) -> answers.Key:
    return answers.Key(
        id=ids.public("key", key.id),
        account=account,
        role=key.role,
        version=key.version,
        created_at=key.created_at,
        revoked_at=key.revoked_at,
        name=key.name,
        scopes=sorted(key.scopes or accounts.scopes_of(Role(key.role))),
        expires_at=key.expires_at,
        previous_until=key.previous_until,
        last_used_at=key.last_used_at,
    )
