"""Accounts and their API keys.

An API key reads `farm_{id}_{secret}{check}`: 32 hex digits, 43 of base64url, 6 hex digits of a checksum that
catches typing errors without a look into the database. The secret is HMAC-SHA256(FARM_SECRET, id.version), so
no secret is stored, a key rotates by its version, and a request's signature can be checked. For a while after that
the version before it may open too, so that whoever has it can be told of the new one.
"""

import base64
import hashlib
import hmac
import re
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from farm import ids
from farm.errors import Conflict, Fault, Forbidden, Invalid, Misconfigured, NotFound, Unauthorized
from farm.settings import settings
from farm.tables import Account, ApiKey

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
KEY = re.compile(r"farm_([0-9a-f]{32})_([A-Za-z0-9_-]{43})([0-9a-f]{6})")


MAX_OVERLAP_S = 30 * 86_400


class Role(StrEnum):
    """What a key may do; each may what the one before may. As a scope, it is that alone."""

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
    scopes: frozenset[Role] | None = None  # None: the role's

    def may(self, role: Role) -> bool:
        """Whether the key's scopes, or else its role, reach that far."""
        return role in (scopes_of(self.role) if self.scopes is None else self.scopes)

    def require(self, role: Role) -> None:
        """Raises Forbidden if the key's role does not reach that far, or its scopes leave it out."""
        if self.may(role):
            return
        if self.scopes is None:
            raise Forbidden(f"this needs a key with role {role}", role=self.role.value)
        raise Forbidden(f"this needs a key with scope {role}", scopes=" ".join(sorted(self.scopes)))


def scopes_of(role: Role) -> frozenset[Role]:
    """What a role comes to."""
    order = list(Role)
    return frozenset(order[: order.index(role) + 1])


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


def issue_key(
    db: Session,
    account: Account,
    *,
    role: Role = Role.SUBMIT,
    scopes: Collection[Role] | None = None,
    name: str | None = None,
    expires_at: datetime | None = None,
) -> tuple[ApiKey, str]:
    """Add an API key; the text of it can be computed again, but is shown only here.

    scopes: what it may do, and no more, instead of what a role comes to. expires_at: it opens nothing from then on.
    Raises Invalid for a name, scopes or a time that are not allowed.
    """
    faults = _faults(db, {"name": name, "expires_at": expires_at})
    if scopes is not None and not scopes:
        faults.append(Fault("scopes", [], f"allowed are some of {', '.join(Role)}"))
    if faults:
        raise Invalid(faults)
    if scopes:
        role = max(scopes, key=list(Role).index)
    own = None if scopes is None or scopes_of(role) == set(scopes) else sorted(scopes)
    key = ApiKey(
        id=ids.new_id(ids.clock_ms(db)), account_id=account.id, role=role, version=1, name=name,
        expires_at=expires_at, scopes=own,
    )  # fmt: skip
    db.add(key)
    db.flush()
    return key, text_of(key.id, key.version)


def change_key(db: Session, key_id: UUID, changes: Mapping[str, Any]) -> ApiKey:
    """Change a key's name, or when it expires: None takes that away.

    Raises NotFound if there is no such key, Invalid for what is not allowed.
    """
    key = _locked(db, key_id)
    if faults := _faults(db, changes):
        raise Invalid(faults)
    for name, value in changes.items():
        setattr(key, name, value)
    db.flush()
    return key


def _faults(db: Session, facts: Mapping[str, Any]) -> list[Fault]:
    faults = []
    name, expires_at = facts.get("name"), facts.get("expires_at")
    if name is not None and not (1 <= len(name) <= 100 and name.isprintable() and name.strip()):
        faults.append(Fault("name", name, "allowed are 1 to 100 printable characters"))
    if expires_at is not None and expires_at <= (now := db.scalars(select(func.clock_timestamp())).one()):
        allowed = f"allowed are moments to come; it is {now.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
        faults.append(Fault("expires_at", expires_at.isoformat(), allowed))
    return faults


def keys_of(db: Session, account: Account) -> list[ApiKey]:
    return list(db.scalars(select(ApiKey).where(ApiKey.account_id == account.id).order_by(ApiKey.id)))


def find_key(db: Session, key_id: UUID) -> ApiKey:
    """Raises NotFound if there is no such key."""
    key = db.get(ApiKey, key_id)
    if key is None:
        raise NotFound(key=ids.public("key", key_id))
    return key


def rotate_key(db: Session, key_id: UUID, *, overlap_s: float = 0) -> str:
    """Give a key its next secret; the one before stops working, now or after so many seconds.

    The one before that stops at once. Raises NotFound if there is no such key, Conflict if it was revoked, Invalid
    for an overlap of more than 30 days.
    """
    if not 0 <= overlap_s <= MAX_OVERLAP_S:
        raise Invalid([Fault("overlap_s", overlap_s, f"allowed are 0 to {MAX_OVERLAP_S}")])
    key = _locked(db, key_id)
    if key.revoked_at is not None:
        raise Conflict("this key was revoked", key=ids.public("key", key_id))
    key.version += 1
    now = db.scalars(select(func.clock_timestamp())).one()
    key.previous_until = now + timedelta(seconds=overlap_s) if overlap_s else None
    return text_of(key.id, key.version)


def revoke_key(db: Session, key_id: UUID) -> None:
    """Raises NotFound if there is no such key."""
    key = _locked(db, key_id)
    key.revoked_at = key.revoked_at or db.scalar(select(func.now()))


def _locked(db: Session, key_id: UUID) -> ApiKey:
    key = db.get(ApiKey, key_id, with_for_update=True)
    if key is None:
        raise NotFound(key=ids.public("key", key_id))
    return key


USED = """
WITH due AS MATERIALIZED (
    SELECT k.id, clock_timestamp() - make_interval(secs => u.ago_s) AS at
    FROM unnest(CAST(:ids AS uuid[]), CAST(:ago_s AS double precision[])) AS u (id, ago_s)
    JOIN api_keys AS k ON k.id = u.id
    ORDER BY k.id
    FOR NO KEY UPDATE OF k SKIP LOCKED
)
UPDATE api_keys AS k SET last_used_at = due.at
FROM due WHERE k.id = due.id AND (k.last_used_at IS NULL OR k.last_used_at < due.at)
"""


def note_use(db: Session, ago_s: Mapping[UUID, float]) -> None:
    """Write down when keys were used last, that many seconds ago; not of one that is being changed just now."""
    db.execute(text(USED), {"ids": list(ago_s), "ago_s": list(ago_s.values())})


# ------------------------------------------------------------------------------------------------ who it is


def authenticate(db: Session, text: str) -> Caller:
    """Who this API key belongs to.

    Raises Unauthorized for a key that is malformed, unknown, rotated away, expired or revoked; it does not say which.
    """
    match = KEY.fullmatch(text)
    if match is None or _check(match[1] + match[2]) != match[3]:
        raise Unauthorized("the API key is malformed")
    key_id = UUID(hex=match[1])
    found = valid(db, key_id)
    versions = found[1] if found else (0,)  # a digest is computed either way: no timing tells
    right = [hmac.compare_digest(_secret(key_id, version), match[2]) for version in versions]
    if not any(right) or found is None:
        raise Unauthorized("the API key is not valid")
    return found[0]


def valid(db: Session, key_id: UUID) -> tuple[Caller, tuple[int, ...]] | None:
    """Who a key of this id belongs to, and the versions of it that open; None if nothing does.

    Whoever asks compares a secret: nothing here did.
    """
    row = db.execute(
        select(ApiKey, Account, ApiKey.previous_until > func.clock_timestamp())
        .join(Account, Account.id == ApiKey.account_id)
        .where(
            ApiKey.id == key_id,
            ApiKey.revoked_at.is_(None),
            ApiKey.expires_at.is_(None) | (ApiKey.expires_at > func.clock_timestamp()),
        )
    ).one_or_none()
    if row is None:
        return None
    key, account, overlaps = row.tuple()
    scopes = None if key.scopes is None else frozenset(map(Role, key.scopes))
    caller = Caller(account.id, account.name, account.currency, key.id, Role(key.role), scopes)
    return caller, (key.version, key.version - 1) if overlaps else (key.version,)


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
