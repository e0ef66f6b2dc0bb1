"""Admin of a farm whose API does not run: the same answers, straight from the database."""

from collections.abc import Iterator
from typing import Self

from sqlalchemy.orm import Session

from farm import accounts, ids, ledger, retention
from farm.accounts import Role
from farm.answers import Account, ImagesAudit, Key, NewKey, Violation
from farm.client import IMAGES
from farm.db import transaction
from farm.errors import Fault, Invalid
from farm.settings import settings
from farm.storage import open_store
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

    def change_account(self, name: str, *, retention_days: int | None) -> Account:
        with transaction() as db:
            account = accounts.find(db, name)
            retention.keep_for(account, retention_days)
            return _account(account)

    def put_prompts(self, name: str, *, inside: bool) -> Account:
        with transaction() as db:
            account = accounts.find(db, name)
            account.prompt_in_images = inside
            return _account(account)

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

    def audit_images(self, sample: int | None = None) -> Iterator[ImagesAudit]:
        """As Farm.audit_images(): by FARM_STORAGE_URL."""
        store, after, last = open_store(settings().storage_url.get_secret_value()), 0, sample is not None
        while True:
            with transaction() as db:
                rows = (
                    ledger.images_after(db, after, limit=IMAGES)
                    if sample is None
                    else ledger.sampled_images(db, sample)
                )
            found = ledger.audit_images(rows, store)
            with transaction() as db:  # an image that was deleted meanwhile is not missing
                kept = {str(i.id) for i in ledger.images_among(db, [int(v.subject) for v in found])}
            wrong = [
                Violation(violation=v.violation, subject=v.subject, detail=v.detail)
                for v in found
                if v.subject in kept
            ]
            yield ImagesAudit(checked=len(rows), violations=wrong, next=None)
            if last or len(rows) < IMAGES:
                return
            after = rows[-1].id


def _account(row: AccountRow) -> Account:
    return Account(
        id=ids.public("acc", row.id),
        name=row.name,
        currency=row.currency,
        weight=row.weight,
        created_at=row.created_at,
        retention_days=row.retention_days,
        prompt_in_images=row.prompt_in_images,
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
