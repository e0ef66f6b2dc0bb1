"""Accounts and their API keys.

An API key reads `farm_{id}_{secret}{check}`: 32 hex digits, 43 of base64url, 6 hex digits of a checksum that
catches typing errors without a look into the database. The secret is HMAC-SHA256(FARM_SECRET, id.version), so
no secret is stored, a key rotates by its version, and a request's signature can be checked.
"""

import base64
import hashlib
import hmac
import re
import zlib
from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from farm import ids
from farm.errors import Conflict, Fault, Forbidden, Invalid, Misconfigured, NotFound, Unauthorized
from farm.settings import settings
from farm.tables import Account, ApiKey

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
KEY = re.compile(r"farm_([0-9a-f]{32})_([A-Za-z0-9_-]{43})([0-9a-f]{6})")


class Role(StrEnum):
    """What a key may do; each may what the one before may."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request comes from."""

    account_id: UUID
    account: str
    currency: str
    key_id: UUID
    role: Role

    def require(self, role: Role) -> None:
        """Raises Forbidden if the key's role does not reach that far."""
        order = list(Role)
        if order.index(self.role) < order.index(role):
            raise Forbidden(f"this needs a key with role {role}", role=self.role.value)


def create(db: Session, name: str, *, currency: str = "USD", weight: int = 1) -> Account:
    """Add an account.

    Raises Invalid for a name or weight that is not allowed, Conflict if the name is taken.
    """
    faults = []
    if not NAME.fullmatch(name):
        faults.append(Fault("name", name, "allowed are 1 to 63 of a-z, 0-9, '.', '_' and '-'"))
    if not re.fullmatch("[A-Z]{3}", currency):
        faults.append(Fault("currency", currency, "allowed are three capital letters, as USD"))
    if not 1 <= weight <= 1000:
        faults.append(Fault("weight", weight, "allowed are 1 to 1000"))
    if faults:
        raise Invalid(faults)
    facts = {"id": ids.new_id(ids.clock_ms(db)), "name": name, "currency": currency, "weight": weight}
    added = insert(Account).values(facts).on_conflict_do_nothing(index_elements=["name"])  # two at once
    account = db.scalars(added.returning(Account)).one_or_none()
    if account is None:
        raise Conflict("an account of this name exists", name=name)
    return account


def find(db: Session, name: str) -> Account:
    """The account of this name.

    Raises NotFound if there is none.
    """
    account = db.scalar(select(Account).where(Account.name == name))
    if account is None:
        raise NotFound(account=name)
    return account


def every(db: Session) -> list[Account]:
    return list(db.scalars(select(Account).order_by(Account.name)))


def issue_key(db: Session, account: Account, *, role: Role = Role.SUBMIT) -> tuple[ApiKey, str]:
    """Add an API key; the text of it can be computed again, but is shown only here."""
    key = ApiKey(id=ids.new_id(ids.clock_ms(db)), account_id=account.id, role=role, version=1)
    db.add(key)
    db.flush()
    return key, text_of(key.id, key.version)


def keys_of(db: Session, account: Account) -> list[ApiKey]:
    return list(db.scalars(select(ApiKey).where(ApiKey.account_id == account.id).order_by(ApiKey.id)))


def rotate_key(db: Session, key_id: UUID) -> str:
    """Give a key its next secret; the one before stops working.

    Raises NotFound if there is no such key.
    """
    key = db.get(ApiKey, key_id, with_for_update=True)
    if key is None:
        raise NotFound(key=ids.public("key", key_id))
    key.version += 1
    return text_of(key.id, key.version)


def revoke_key(db: Session, key_id: UUID) -> None:
    """Raises NotFound if there is no such key."""
    key = db.get(ApiKey, key_id, with_for_update=True)
    if key is None:
        raise NotFound(key=ids.public("key", key_id))
    key.revoked_at = key.revoked_at or db.scalar(select(func.now()))


def authenticate(db: Session, text: str) -> Caller:
    """Who this API key belongs to.

    Raises Unauthorized for a key that is malformed, unknown, rotated away or revoked; it does not say which.
    """
    match = KEY.fullmatch(text)
    if match is None or _check(match[1] + match[2]) != match[3]:
        raise Unauthorized("the API key is malformed")
    row = db.execute(
        select(ApiKey, Account)
        .join(Account, Account.id == ApiKey.account_id)
        .where(ApiKey.id == UUID(hex=match[1]), ApiKey.revoked_at.is_(None))
    ).one_or_none()
    version = row[0].version if row else 0  # the digest is computed either way: no timing tells
    if not hmac.compare_digest(_secret(UUID(hex=match[1]), version), match[2]) or row is None:
        raise Unauthorized("the API key is not valid")
    key, account = row
    return Caller(account.id, account.name, account.currency, key.id, Role(key.role))


def text_of(key_id: UUID, version: int) -> str:
    secret = _secret(key_id, version)
    return f"farm_{key_id.hex}_{secret}{_check(key_id.hex + secret)}"


def _secret(key_id: UUID, version: int) -> str:
    root = settings().secret.get_secret_value()
    if len(root) < 32:
        raise Misconfigured("FARM_SECRET needs 32 characters or more", setting="FARM_SECRET")
    digest = hmac.digest(root.encode(), f"{key_id.hex}.{version}".encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _check(text: str) -> str:
    return f"{zlib.crc32(text.encode()) & 0xFFFFFF:06x}"
