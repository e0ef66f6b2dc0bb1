"""Admin of a farm whose API does not run: the same answers, straight from the database."""

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Self, TypeVar

from pydantic import BaseModel
from sqlalchemy.orm import Session

from farm import accounts, ids, ledger, pricing, retention
from farm.answers import (
    Account,
    Audit,
    Budgets,
    DatedPrice,
    ImagesAudit,
    Key,
    Limits,
    NewKey,
    Unseen,
    Violation,
)
from farm.catalog import Method, catalog
from farm.client import IMAGES
from farm.db import transaction
from farm.errors import Fault, Invalid
from farm.settings import settings
from farm.storage import open_store
from farm.tables import Account as AccountRow

Body = TypeVar("Body", bound=BaseModel)


class Offline:
    """What `Farm` does for admins, without a farm."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def accounts(self) -> list[Account]:
        from farm.api.accounts import shown

        with transaction() as db:
            return [shown(a) for a in accounts.every(db)]

    def account(self, name: str) -> Account:
        from farm.api.accounts import shown

        with transaction() as db:
            return shown(accounts.find(db, name))

    def add_account(self, name: str, *, currency: str, weight: int) -> Account:
        from farm.api.accounts import shown

        with transaction() as db:
            return shown(accounts.create(db, name, currency=currency, weight=weight))

    def change_account(self, name: str, *, retention_days: int | None) -> Account:
        from farm.api.accounts import shown

        with transaction() as db:
            account = accounts.find(db, name)
            retention.keep_for(account, retention_days)
            return shown(account)

    def put_prompts(self, name: str, *, inside: bool) -> Account:
        from farm.api.accounts import shown

        with transaction() as db:
            account = accounts.find(db, name)
            account.prompt_in_images = inside
            return shown(account)

    def limits(self, account: str, *, key: str | None = None) -> Limits:
        from farm.api.accounts import limits_of

        with transaction() as db:
            return limits_of(db, accounts.find(db, account), key)

    def change_limits(self, account: str, changes: Mapping[str, Any], *, key: str | None = None) -> Limits:
        from farm.api.accounts import ChangedLimits, put_limits

        wanted = _read(ChangedLimits, key=key, **changes)
        with transaction() as db:
            return put_limits(db, accounts.find(db, account), wanted)

    def keys(self, account: str) -> list[Key]:
        from farm.api.keys import shown

        with transaction() as db:
            return [shown(k, account) for k in accounts.keys_of(db, accounts.find(db, account))]

    def key(self, key: str) -> Key:
        from farm.api.keys import found

        with transaction() as db:
            return found(db, ids.parse("key", key))

    def add_key(
        self,
        account: str,
        *,
        role: str | None = None,
        scopes: Sequence[str] | None = None,
        name: str | None = None,
        expires_at: datetime | None = None,
    ) -> NewKey:
        from farm.api.keys import WantedKey, add

        asked = {"role": role, "scopes": scopes, "name": name, "expires_at": expires_at}
        wanted = _read(WantedKey, **{k: v for k, v in asked.items() if v is not None})
        with transaction() as db:
            return add(db, accounts.find(db, account), wanted)

    def change_key(self, key: str, changes: Mapping[str, Any]) -> Key:
        from farm.api.keys import ChangedKey, change

        wanted = _read(ChangedKey, **changes)
        with transaction() as db:
            return change(db, ids.parse("key", key), wanted)

    def rotate_key(self, key: str, *, overlap_s: int = 0) -> NewKey:
        from farm.api.keys import rotate

        with transaction() as db:
            return rotate(db, ids.parse("key", key), overlap_s=overlap_s)

    def revoke_key(self, key: str) -> Key:
        from farm.api.keys import found

        with transaction() as db:
            key_id = ids.parse("key", key)
            accounts.revoke_key(db, key_id)
            return found(db, key_id)

    def prices(
        self, *, model: str | None = None, past: bool = False, account: str | None = None
    ) -> list[DatedPrice]:
        """Everybody's prices, and with an account its own, in its currency."""
        from farm.api.prices import shown

        with transaction() as db:
            owner = _owner(db, account)
            account_id, currency = (owner.id, owner.currency) if owner is not None else (None, None)
            found = pricing.every(db, account_id, currency=currency, model=model, past=past)
            return shown(found, owner)

    def set_price(
        self,
        model: str,
        rate: str,
        *,
        account: str | None = None,
        method: str | None = None,
        currency: str | None = None,
        since: datetime | None = None,
    ) -> DatedPrice:
        from farm.api.prices import NewPrice, start

        new = _read(
            NewPrice, model=model, rate=rate, account=account, method=method, currency=currency, since=since
        )
        with transaction() as db:
            return start(db, new, _owner(db, account), set_by=None)

    def withdraw_price(
        self,
        model: str,
        since: datetime,
        *,
        account: str | None = None,
        method: str | None = None,
        currency: str | None = None,
    ) -> DatedPrice:
        from farm.api.prices import shown

        with transaction() as db:
            owner = _owner(db, account)
            gone = pricing.withdraw(
                db,
                catalog(),
                account=owner,
                model=model,
                since=since,
                method=_method(method),
                currency=currency,
            )
            return shown([gone], owner)[0]

    def budget(self, *, account: str | None = None) -> Budgets:
        from farm.api.budget import shown

        with transaction() as db:
            return shown(db, _must_own(db, account), key=None)

    def set_budget(
        self,
        limit: str | None,
        *,
        account: str | None = None,
        key: str | None = None,
        period: str = "month",
        thresholds: Sequence[tuple[int, str]] = (),
    ) -> Budgets:
        from farm.api.budget import WantedBudget, put

        wanted = _read(
            WantedBudget,
            limit=limit,
            key=key,
            period=period,
            thresholds=[{"percent": percent, "action": action} for percent, action in thresholds],
        )
        with transaction() as db:
            return put(db, wanted, _must_own(db, account))

    def audit(self) -> Audit:
        with transaction() as db:
            return Audit(violations=_violations(ledger.audit(db)), unseen=[
                Unseen(what=u.what, detail=u.detail) for u in ledger.unseen(db)
            ])  # fmt: skip

    def audit_images(self, sample: int | None = None) -> Iterator[ImagesAudit]:
        """As Farm.audit_images(): by FARM_STORAGE_URL."""
        store = open_store(settings().storage_url.get_secret_value())
        seed = None if sample is None else secrets.randbits(63)
        left, after = sample, 0
        while left is None or left > 0:
            limit = IMAGES if left is None else min(left, IMAGES)
            with transaction() as db:
                rows = ledger.images_after(db, after, limit=limit, seed=seed)
            found = ledger.audit_images(rows, store)
            with transaction() as db:  # an image that was deleted meanwhile is not missing
                kept = {str(i.id) for i in ledger.images_among(db, [int(v.subject) for v in found])}
            wrong = _violations(v for v in found if v.subject in kept)
            yield ImagesAudit(checked=len(rows), violations=wrong, next=None)
            if len(rows) < limit:
                return
            left, after = None if left is None else left - limit, rows[-1].id


def _read(body: type[Body], **values: Any) -> Body:
    """What the API would read from such a body. Raises Invalid in its words."""
    from farm.api.bodies import read

    return read(body, json.dumps(values, default=str).encode())


def _owner(db: Session, account: str | None) -> AccountRow | None:
    return None if account is None else accounts.find(db, account)


def _must_own(db: Session, account: str | None) -> AccountRow:
    if account is None:
        raise Invalid([Fault("account", None, "name one: without an API nobody says whose this is")])
    return accounts.find(db, account)


def _method(name: str | None) -> Method | None:
    if name is None:
        return None
    if name in list(Method):
        return Method(name)
    raise Invalid([Fault("method", name, f"allowed are {', '.join(Method)}")])


def _violations(found: Iterable[ledger.Violation]) -> list[Violation]:
    return [Violation(violation=v.violation, subject=v.subject, detail=v.detail) for v in found]
