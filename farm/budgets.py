"""Budgets: what an account, or one of its keys, may spend in a month or in all.

    spent + held ≤ limit        by key and by account; held is what open frames may still cost

Nobody keeps a balance. Each change of a job's hold leaves a delta in tallies by a trigger, each fold of counts what
was charged; the sweep folds both, and their sum is all that admission reads. It does so last of all in its
transaction and under a lock of the account's, so that of many at once each sees those that went before it. Settling
does nothing for this.

A threshold compares what was charged: notify tells, and stop admits nothing more from then on; drain also pauses
the jobs, so that what runs is finished; cancel also ends what is queued then. It is over when the month is, or when
the limit was raised: jobs that a budget paused go on by themselves.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from farm import ids, lanes
from farm.accounts import Caller
from farm.db import hot, scalar, together
from farm.errors import BudgetExceeded, Fault, Invalid
from farm.pricing import EXACT, shown
from farm.tables import Account, ApiKey, Budget, BudgetPause, BudgetThreshold

LOCK = 0x62756467  # "budg", and the account beside it
MAX_THRESHOLDS = 20


class Period(StrEnum):
    """A calendar month, in UTC; or all time."""

    MONTH = "month"
    TOTAL = "total"


class Action(StrEnum):
    """What happens at a threshold; each but notify also does what the one before does."""

    NOTIFY = "notify"
    STOP = "stop"
    DRAIN = "drain"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True)
class Threshold:
    """reached_at: None while less than that was charged."""

    percent: int
    action: Action
    reached_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Use:
    """A budget, and what of it is gone. api_key_id: None for the whole account. month: the present one."""

    id: int
    api_key_id: UUID | None
    period: Period
    currency: str
    limit: Decimal
    month: date
    spent: Decimal
    held: Decimal
    stopped: int | None
    thresholds: tuple[Threshold, ...] = ()

    @property
    def left(self) -> Decimal:
        """What may still be admitted; below 0 if the limit was lowered."""
        return EXACT.subtract(self.limit, EXACT.add(self.spent, self.held))

    @property
    def whose(self) -> str:
        return "key" if self.api_key_id else "account"

    @property
    def name(self) -> str:
        whose = "this API key's budget" if self.api_key_id else "the account's budget"
        return f"{whose} of {shown(self.limit)} {self.currency}" + (
            " a month" if self.period is Period.MONTH else ""
        )


@dataclass(frozen=True, slots=True)
class Room:
    """Whether a budget lets something in. left: what may still be admitted, never below 0; refused: why not."""

    use: Use
    needed: Decimal
    left: Decimal
    refused: str | None


# ------------------------------------------------------------------------------------------------ admission


def admit(
    db: Session,
    caller: Caller,
    needed: Decimal,
    *,
    first: Sequence[tuple[str, Mapping[str, Any]]] = (),
    then: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> None:
    """Let the job that this transaction stored count, or refuse it; the last thing before the commit.

    Until then nobody else of an account with a budget is admitted. first: statements that store it; then: such as come
    last of all; sent along.
    Raises BudgetExceeded with what is needed and what is left.
    """
    found = together(
        db,
        [
            *first,
            ("budget_lock", {"lock": LOCK, "account_id": caller.account_id}),
            ("budget_use", {"accounts": [caller.account_id], "key": caller.key_id}),
            *then,
        ],
    )
    locked, uses = found[len(first) : len(first) + 2]
    if locked:
        _refuse_over(map(_use, uses), needed=needed, stored=True)


def foresee(db: Session, caller: Caller, needed: Decimal) -> None:
    """Refuse what admit would refuse as things stand: before a million frames are stored in vain.

    Raises BudgetExceeded.
    """
    _refuse_over(_of_caller(db, caller), needed=needed, stored=False)


def rooms(db: Session, caller: Caller, needed: Decimal) -> list[Room]:
    """What the caller's budgets would say to a job that costs so much, if it came now. Nothing is kept for it."""
    return [_room(use, needed=needed, stored=False) for use in _of_caller(db, caller)]


def cap(needed: Decimal, limit: Decimal | None, currency: str) -> None:
    """Raises BudgetExceeded if a job costs more than its own budget allows."""
    if limit is not None and needed > limit:
        raise BudgetExceeded(
            f"this job costs up to {shown(needed)} {currency}; its budget is {shown(limit)}",
            needed=shown(needed), left=shown(limit), currency=currency, budget="job",
        )  # fmt: skip


def _of_caller(db: Session, caller: Caller) -> list[Use]:
    return _uses(db, [caller.account_id], key=caller.key_id)


def _refuse_over(uses: Iterable[Use], *, needed: Decimal, stored: bool) -> None:
    """stored: what is needed is among what is held already."""
    for use in uses:
        room = _room(use, needed=needed, stored=stored)
        if room.refused is not None:
            raise BudgetExceeded(
                room.refused, needed=shown(needed), left=shown(room.left), limit=shown(use.limit),
                currency=use.currency, budget=use.whose, period=use.period.value,
            )  # fmt: skip


def _room(use: Use, *, needed: Decimal, stored: bool) -> Room:
    left = max(EXACT.add(use.left, needed) if stored else use.left, Decimal(0))
    refused = None
    if use.stopped is not None:
        refused = f"{use.stopped} % of {use.name} are spent, and it says to stop there"
    elif needed > left:
        refused = f"this job costs up to {shown(needed)} {use.currency}; of {use.name} {shown(left)} are left"
    return Room(use, needed, left, refused)


def _uses(db: Session, accounts: Sequence[UUID], *, key: UUID | None = None) -> list[Use]:
    return [_use(r) for r in hot(db, "budget_use", {"accounts": list(accounts), "key": key})]


def _use(row: Any) -> Use:
    return Use(
        row.id, row.api_key_id, Period(row.period), row.currency, row.amount, row.month, row.spent, row.held,
        row.stopped,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ to look at, to set


def every(db: Session, account_id: UUID, *, key: UUID | None = None) -> list[Use]:
    """An account's budgets and what of them is gone: its own first. key: without those of other keys."""
    found: dict[int, list[Threshold]] = {}
    rows = select(BudgetThreshold).where(BudgetThreshold.account_id == account_id)
    for row in db.scalars(rows.order_by(BudgetThreshold.percent, BudgetThreshold.action)):
        found.setdefault(row.budget_id, []).append(Threshold(row.percent, Action(row.action), row.reached_at))
    return [
        Use(u.id, u.api_key_id, u.period, u.currency, u.limit, u.month, u.spent, u.held, u.stopped,
            tuple(found.get(u.id, ())))
        for u in _uses(db, [account_id], key=key)
    ]  # fmt: skip


def put(
    db: Session,
    account: Account,
    limit: Decimal | None,
    *,
    period: Period = Period.MONTH,
    key: UUID | None = None,
    thresholds: Sequence[Threshold] = (),
) -> None:
    """Set a budget of an account or of one of its keys, or take it away: limit None.

    What was admitted stays; a limit below what is spent and held lets nothing more in.
    Raises Invalid for an amount, key or threshold that is not allowed.
    """
    if faults := _faults(db, account, limit, key, thresholds):
        raise Invalid(faults)
    db.execute(
        text("SELECT pg_advisory_xact_lock(:lock, hashtext(:account))"),
        {"lock": LOCK, "account": str(account.id)},
    )
    found = db.scalar(
        select(Budget).where(
            Budget.account_id == account.id,
            Budget.api_key_id.is_not_distinct_from(key),
            Budget.period == period,
        )
    )
    if limit is None:
        if found is not None:
            db.delete(found)
            db.flush()
        return
    if found is None:
        found = Budget(
            account_id=account.id, api_key_id=key, period=period, currency=account.currency, amount=limit
        )
        db.add(found)
    else:
        found.amount, found.set_at = limit, db.scalars(select(func.now())).one()
    db.flush()
    _put_thresholds(db, found, thresholds)


def _put_thresholds(db: Session, budget: Budget, thresholds: Sequence[Threshold]) -> None:
    """Those that stay keep their mark: they are not told of twice."""
    wanted = {(t.percent, t.action) for t in thresholds}
    for row in db.scalars(select(BudgetThreshold).where(BudgetThreshold.budget_id == budget.id)):
        if (row.percent, row.action) not in wanted:
            db.delete(row)
    db.flush()
    values = [
        {"budget_id": budget.id, "account_id": budget.account_id, "percent": percent, "action": action.value}
        for percent, action in sorted(wanted)
    ]
    if values:
        db.execute(insert(BudgetThreshold).values(values).on_conflict_do_nothing())


def _faults(
    db: Session,
    account: Account,
    limit: Decimal | None,
    key: UUID | None,
    thresholds: Sequence[Threshold],
) -> list[Fault]:
    faults = []
    if limit is not None and not re.fullmatch(r"\d{1,12}(\.\d{1,12})?", shown(limit)):
        allowed = "allowed are 0 and more, with up to 12 digits before and after the point"
        faults.append(Fault("limit", str(limit), allowed))
    if key is not None and db.scalar(select(ApiKey.account_id).where(ApiKey.id == key)) != account.id:
        faults.append(Fault("key", ids.public("key", key), f"allowed are the keys of {account.name}"))
    if len(thresholds) > MAX_THRESHOLDS:
        faults.append(Fault("thresholds", len(thresholds), f"allowed are up to {MAX_THRESHOLDS}"))
    for n, threshold in enumerate(thresholds):
        if not 1 <= threshold.percent <= 100:
            faults.append(Fault(f"thresholds[{n}].percent", threshold.percent, "allowed are 1 to 100"))
    return faults


# ------------------------------------------------------------------------------------------------ the sweep's


def fold(db: Session) -> int:
    """Fold the deltas of tallies. Returns how many there were."""
    return int(scalar(db, "fold_tallies") or 0)


def enforce(db: Session, *, limit: int = 5000) -> int:
    """Mark the thresholds that were reached, tell of them, and do what they say. Returns how many changes that took."""
    changed = int(scalar(db, "budget_mark") or 0)
    reached = set(
        db.scalars(select(BudgetThreshold.action).where(BudgetThreshold.reached_at.is_not(None)).distinct())
    )
    if (
        Action.CANCEL in reached
    ):  # before the pause: what is paused now may be on a device until the next round
        changed += int(scalar(db, "budget_cancel", {"n": limit}) or 0)
    if reached & {Action.DRAIN, Action.CANCEL}:
        changed += int(scalar(db, "budget_pause", {"n": limit}) or 0)
    resumed = [r[0] for r in hot(db, "budget_resume", {"n": limit})]
    if resumed:
        lanes.open_for(db, resumed)
    return changed + len(resumed)


def refuse_held_back(db: Session, account_id: UUID, key: UUID | None) -> None:
    """Raises BudgetExceeded if a budget holds this key's jobs back."""
    rows: Any = db.execute(
        select(BudgetThreshold.percent, BudgetThreshold.action)
        .join(Budget, Budget.id == BudgetThreshold.budget_id)
        .where(
            Budget.account_id == account_id,
            Budget.api_key_id.is_(None) | (Budget.api_key_id == key),
            BudgetThreshold.reached_at.is_not(None),
            BudgetThreshold.action.in_([Action.DRAIN, Action.CANCEL]),
        )
        .order_by(BudgetThreshold.percent)
    ).first()
    if rows is not None:
        raise BudgetExceeded(
            f"{rows.percent} % of the budget are spent, and it holds its jobs back from there on",
            percent=rows.percent,
            action=rows.action,
        )


def forget_pause(db: Session, job_id: UUID) -> None:
    """A person has paused this job as well: it does not go on by itself."""
    db.execute(delete(BudgetPause).where(BudgetPause.job_id == job_id))
