"""Reuse: of equal frames of one account one is rendered, the others are answered with its image.

Equal are frames of the same fingerprint and format whose seeds were asked for. Whoever may end the waiting of a
frame (its equal was settled, given back or cancelled; a job was paused, resumed, cancelled or moved to another
class; a submission put it there) writes a row into waiters_due in its own transaction; the sweep looks at the
frames these rows name. So nothing is missed, whichever commits first, and nobody waits for a frame that ended.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from farm import ids, pricing, queue
from farm.accounts import Caller
from farm.catalog import Method
from farm.db import hot
from farm.drafts import Draft
from farm.errors import Conflict, Invalid
from farm.spec import quantity

Key = tuple[bytes, str]  # fingerprint and format

LOCKS = 64  # an account's submissions that may ask for the same take turns, in so many groups
CHUNK = 10_000  # keys a statement
LOCKED = 1000  # a larger submission takes no lock: it would hold up the account's others for long


def rates(db: Session, account_id: UUID, *, currency: str, models: Iterable[str]) -> dict[str, pricing.Rate]:
    """The prices of reusing an image of these models; where nobody set one it is 0, from now on."""
    wanted = dict.fromkeys(models, Method.REUSE)
    try:
        return pricing.current(db, account_id=account_id, currency=currency, models=wanted)
    except Invalid:
        for model in sorted(wanted):
            pricing.start_free_reuse(db, model, currency)
        return pricing.current(db, account_id=account_id, currency=currency, models=wanted)


def equals(
    db: Session, account_id: UUID, *, priority: int, keys: Collection[Key], within: UUID | None = None
) -> dict[Key, bool]:
    """Of these keys those that need not be rendered: True if an image is known, False if it is being made.

    within: a job that is being uploaded, whose own frames count too.

    Of two small submissions at once that ask for the same, the later waits here until the earlier is committed.
    """
    wanted = list(keys)
    if len(wanted) <= LOCKED:
        groups = sorted({_lock(account_id, fingerprint) for fingerprint, _ in wanted})
        db.execute(
            text("SELECT pg_advisory_xact_lock(k) FROM unnest(CAST(:k AS bigint[])) AS k"), {"k": groups}
        )
    found = {}
    for start in range(0, len(wanted), CHUNK):
        part = wanted[start : start + CHUNK]
        asked = {"fingerprints": [k[0] for k in part], "formats": [k[1] for k in part], "within": within}
        rows = hot(db, "equals", {"account_id": account_id, "priority": priority, **asked})
        found.update({part[r.no]: r.known for r in rows})
    return found


def _lock(account_id: UUID, fingerprint: bytes) -> int:
    name = b"reuse" + account_id.bytes + bytes([fingerprint[0] % LOCKS])
    return int.from_bytes(hashlib.sha256(name).digest()[:8], signed=True)


def look_later(db: Session, account_id: UUID, fingerprints: Iterable[bytes]) -> None:
    """Have the sweep look at the frames that wait for these, once this is committed."""
    db.execute(
        text(
            "INSERT INTO waiters_due (account_id, fingerprints) VALUES (:account, CAST(:fingerprints AS bytea[]))"
        ),
        {"account": account_id, "fingerprints": list(fingerprints)},
    )


def answer_waiters(db: Session, *, rows: int = 1000, frames: int = 500) -> int:
    """Look at waiting frames that are due: end them, queue them, or let them wait on.

    rows of waiters_due at a time, and so many frames of each; a row that names more stays for the next time.
    Returns how many rows were looked at.
    """
    due = db.execute(
        text(
            "SELECT id, account_id, fingerprints IS NULL AS every, after FROM waiters_due"
            " ORDER BY id LIMIT :n FOR UPDATE SKIP LOCKED"
        ),
        {"n": rows},
    ).all()
    if not due:
        return 0
    waiting = hot(db, "waiters", {"due": _once(db, due), "n": frames})
    if waiting:
        queue.answer(db, {r.id: r.job_id for r in waiting})
    full = [no for no, found in Counter(r.due for r in waiting).items() if found == frames]
    for no in full:
        last = max(r.id for r in waiting if r.due == no)
        db.execute(text("UPDATE waiters_due SET after = :after WHERE id = :id"), {"after": last, "id": no})
    done = [d.id for d in due if d.id not in full]
    db.execute(text("DELETE FROM waiters_due WHERE id = ANY (:done)"), {"done": done})
    return len(due)


def _once(db: Session, due: Sequence[Any]) -> list[int]:
    """The rows of accounts that have waiting frames; of several that name all of an account's, one."""
    busy = set(
        db.scalars(
            text(
                "SELECT a FROM unnest(CAST(:accounts AS uuid[])) AS a"
                " WHERE EXISTS (SELECT FROM frames AS f WHERE f.account_id = a AND f.status = 'waiting')"
            ),
            {"accounts": list({d.account_id for d in due})},
        )
    )
    every: Mapping[tuple[UUID, bool], int] = {
        (d.account_id, d.after is None): d.id for d in due if d.every and d.account_id in busy
    }
    return [
        d.id
        for d in due
        if d.account_id in busy and (not d.every or every[d.account_id, d.after is None] == d.id or d.after)
    ]


# ------------------------------------------------------------------------------------------------ of a draft

AT_ONCE = 2000  # frames a submission answers itself; the sweep does more than that


@dataclass(slots=True)
class Matched:
    """What a draft's frames have equals for.

    rates: of reusing an image, by key; None: frames of that key are rendered in any case. prints: every frame's
    fingerprint. waiting: frames that wait, by index; True if the image is known already. at_once: those with a known
    image are answered in this transaction. savings: what the job costs less for that.
    """

    rates: list[pricing.Rate | None]
    prints: list[bytes]
    waiting: dict[int, bool]
    open_keys: set[int]
    at_once: bool
    savings: list[Decimal]


def match(
    db: Session,
    caller: Caller,
    draft: Draft,
    *,
    priority: int,
    wanted: bool,
    prices: Mapping[str, pricing.Rate],
) -> Matched:
    """Find the frames that need not be rendered: their image is known, or an equal frame comes before them.

    wanted: False renders them all. prices: of rendering, by model.
    """
    prints = [f.fingerprint() for f in draft.frames]
    reused = _by_key(db, caller, draft, prices, wanted=wanted)
    keys = {
        no: (prints[no], f.spec.format.value)
        for no, f in enumerate(draft.frames)
        if f.seeded and reused[f.key_no] is not None
    }
    waiting: dict[int, bool] = {}
    if keys:
        found = equals(db, caller.account_id, priority=priority, keys=set(keys.values()))
        for no, key in keys.items():
            if key in found:  # what a proof holds back is not answered yet
                waiting[no] = found[key] and (draft.proof is None or no < draft.proof)
            else:
                found[key] = False  # those that come after it in this job wait for it
    open_keys = {f.key_no for no, f in enumerate(draft.frames) if no not in waiting}
    known = Counter(draft.frames[no].key_no for no, is_known in waiting.items() if is_known)
    at_once = 0 < known.total() <= AT_ONCE
    savings: list[Decimal] = []
    for no, spec, model in draft.keys.values():
        rate, again = prices[model.name], reused[no]
        if at_once and known[no] and again is not None:
            savings += [rate.amount(-known[no] * quantity(spec, rate.method)), again.amount(known[no])]
    return Matched(reused, prints, waiting, open_keys, at_once, savings)


def _by_key(
    db: Session, caller: Caller, draft: Draft, prices: Mapping[str, pricing.Rate], *, wanted: bool
) -> list[pricing.Rate | None]:
    """The price of reusing an image for each key; None where no frame may, or where rendering costs less."""
    seeded = {f.key_no for f in draft.frames if f.seeded} if wanted else set()
    if not seeded:
        return [None] * len(draft.keys)
    names = {model.name for no, _, model in draft.keys.values() if no in seeded}
    free = rates(db, caller.account_id, currency=caller.currency, models=names)
    return [
        free[model.name]
        if no in seeded
        and free[model.name].rate <= prices[model.name].amount(quantity(spec, prices[model.name].method))
        else None
        for no, spec, model in draft.keys.values()
    ]


def answer_known(db: Session, caller: Caller, job_id: UUID, matched: Matched) -> None:
    """Answer at once what is known; what waits is looked at again when this is committed.

    Raises Conflict if an image was deleted in between: the job was quoted with it.
    """
    known = {ids.frame_id(job_id, no): job_id for no, is_known in matched.waiting.items() if is_known}
    if matched.at_once and queue.answer(db, known, at_once=True) < len(known):
        raise Conflict("an image that this job would reuse was deleted just now; send it again")
    left = [
        matched.prints[no] for no, is_known in matched.waiting.items() if not (is_known and matched.at_once)
    ]
    if left:
        look_later(db, caller.account_id, left)
    elif len(known) == len(matched.prints):
        hot(db, "finish", {"jobs": [job_id]})
