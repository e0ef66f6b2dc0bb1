"""Admin of a farm whose API does not run: the same answers, straight from the database."""

from typing import Self

from sqlalchemy.orm import Session

from farm import accounts, ids, ledger
from farm.accounts import Role
from farm.answers import Account, Key, NewKey, Violation
from farm.db import transaction
from farm.errors import Fault, Invalid
from farm.tables import Account as AccountRow
from farm.tables import ApiKey


class Offline:
    """What `Farm` does for admins, without a farm."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def accounts(self) -> list[Account]:
        with transaction() as db:
            return [_account(a) for a in accounts.every(db)]

    def add_account(self, name: str, *, currency: str, weight: int) -> Account:
        with transaction() as db:
            added = accounts.create(db, name, currency=currency, weight=weight)
            db.refresh(added)
            return _account(added)

    def keys(self, account: str) -> list[Key]:
        with transaction() as db:
            return [_key(k, account) for k in accounts.keys_of(db, accounts.find(db, account))]

    def add_key(self, account: str, *, role: str) -> NewKey:
        if role not in list(Role):
            raise Invalid([Fault("role", role, f"allowed are {', '.join(Role)}")])
        with transaction() as db:
            key, text = accounts.issue_key(db, accounts.find(db, account), role=Role(role))
            return _new(db, key, text)

    def rotate_key(self, key: str) -> NewKey:
        with transaction() as db:
            key_id = ids.parse("key", key)
            text = accounts.rotate_key(db, key_id)
            return _new(db, db.get_one(ApiKey, key_id), text)

    def revoke_key(self, key: str) -> Key:
        with transaction() as db:
            key_id = ids.parse("key", key)
            accounts.revoke_key(db, key_id)
            row = db.get_one(ApiKey, key_id)
            return _key(row, db.get_one(AccountRow, row.account_id).name)

    def audit(self) -> list[Violation]:
        with transaction() as db:
            return [
                Violation(violation=v.violation, subject=v.subject, detail=v.detail) for v in ledger.audit(db)
            ]


def _account(row: AccountRow) -> Account:
    return Account(
        id=ids.public("acc", row.id),
        name=row.name,
        currency=row.currency,
        weight=row.weight,
        created_at=row.created_at,
    )


def _key(row: ApiKey, account: str) -> Key:
    return Key(
        id=ids.public("key", row.id),
        account=account,
        role=row.role,
        version=row.version,
        created_at=row.created_at,
        revoked_at=row.revoked_at,
    )


def _new(db: Session, row: ApiKey, text: str) -> NewKey:
    db.flush()
    db.refresh(row)
    return NewKey(**_key(row, db.get_one(AccountRow, row.account_id).name).model_dump(), api_key=text)
