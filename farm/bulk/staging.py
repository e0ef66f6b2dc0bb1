"""Staging: the frames of a job that is still being uploaded, stored part by part.

Its job is there from the first part on, as status staged: not runnable, and seen by nobody. Each part adds its frames
to the job's number, price and hold, so that budgets, quotas and the audit are right at any moment.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from farm import budgets, inputs, limits, pricing, reuse
from farm.accounts import Caller
from farm.bulk.lines import KEPT, Row, Template
from farm.catalog import Catalog
from farm.db import copy, together
from farm.errors import Fault, Invalid
from farm.queue import FrameStatus
from farm.spec import quantity, shape_key, work
from farm.tables import Count, Job, JobKey

if TYPE_CHECKING:
    from farm.bulk.uploads import Facts

FRAMES = (
    "COPY frames (id, job_id, index, key_no, account_id, status, seed, work, quantity, price_id, fingerprint, seeded,"
    " spec) FROM STDIN (FORMAT binary)"
)
NAMES = "COPY frame_names (job_id, index, account_id, custom_id) FROM STDIN (FORMAT binary)"
# of COPY's binary format: a signature, rows that begin with their number of fields, fields that begin with their length
START, END = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
MAX_KEYS = 10_000  # of one job: a claim looks through those that are open
HEAD = struct.pack("!hi", 13, 16)
TRUE, FALSE = struct.pack("!i?", 1, True), struct.pack("!i?", 1, False)
INT4, INT8, UUID16 = struct.pack("!i", 4), struct.pack("!i", 8), struct.pack("!i", 16)
STATUS = {s: struct.pack("!i", len(s)) + s.encode() for s in FrameStatus}


@dataclass(slots=True)
class _Key:
    """A distinct key of the job. new: not stored yet; opened: it has got its first queued frame just now."""

    no: int
    is_open: bool
    new: bool = True
    opened: bool = False


@dataclass(slots=True)
class _Placed:
    """What the frames of a template have in common in this job: bytes of their rows, and what they cost."""

    template: Template
    rate: pricing.Rate
    again: pricing.Rate | None
    quantity: int
    keys: dict[bool, tuple[_Key, bytes]]
    tail: bytes
    frames: int = 0


class Stage:
    """A job on its way, as far as one request knows it."""

    def __init__(self, caller: Caller, job_id: UUID, facts: "Facts", models: Catalog) -> None:
        self.facts = facts
        self._caller, self._job_id, self._models = caller, job_id, models
        self._rates: dict[str, pricing.Rate] = {}
        self._reused: dict[str, pricing.Rate] = {}
        self._keys: dict[tuple[str, bool], _Key] | None = None
        self._placed: dict[int, _Placed] = {}
        self._added: list[tuple[Template, _Key, bool]] = []
        self._bound: set[str] = set()

    def put(self, db: Session, rows: Sequence[Row], *, first: int) -> None:
        """Store these as the frames from this index on; the last thing its transaction does.

        Raises QueueFull, BudgetExceeded, Invalid for a model without a price.
        """
        limits.check_queued(db, self._caller, len(rows), before=first)
        self._read_keys(db)
        placed = self._place(db, rows)
        waiting = self._waiting(db, rows, placed)
        frames, names = self._packed(rows, placed, waiting, first)
        costs = pricing.total(p.rate.amount(p.frames * p.quantity) for p in placed.values())
        self._write(db, len(rows), costs)
        copy(db, FRAMES, frames)
        if names:
            copy(db, NAMES, names)
        if waiting:
            db.add(Count(job_id=self._job_id, waiting=len(waiting)))
            db.flush()
        self._bind_inputs(db, rows)
        held = db.scalars(select(Job.quoted).where(Job.id == self._job_id)).one()
        budgets.cap(held, self.facts.budget, self._caller.currency)
        budgets.admit(db, self._caller, held)

    # -------------------------------------------------------------------------------------------- keys and prices

    def _read_keys(self, db: Session) -> None:
        if self._keys is None:
            rows = select(JobKey.call_key, JobKey.rest, JobKey.key_no, JobKey.open).where(
                JobKey.job_id == self._job_id
            )
            self._keys = {(r.call_key, r.rest): _Key(r.key_no, r.open, new=False) for r in db.execute(rows)}

    def _place(self, db: Session, rows: Sequence[Row]) -> dict[int, _Placed]:
        """The templates of these rows by their id, with prices: those of now, frozen in the frames."""
        templates = {id(r.template): r.template for r in rows}
        if len(self._placed) > KEPT:
            self._placed.clear()
        self._read_rates(db, {t.model.name for t in templates.values()})
        found = {}
        for number, template in templates.items():
            known = self._placed.get(number)
            if known is None or known.template is not template:
                known = self._placed_anew(template)
                if template.json:  # others are of one line
                    self._placed[number] = known
            known.frames = 0
            found[number] = known
        return found

    def _placed_anew(self, template: Template) -> _Placed:
        rate = self._rates[template.model.name]
        asked = quantity(template.spec, rate.method)
        tail = struct.pack("!iqiqiii", 8, work(template.spec, template.model), 8, asked, 4, rate.price_id, 32)
        return _Placed(template, rate, self._reused_at(template), asked, {}, tail)

    def _read_rates(self, db: Session, models: set[str]) -> None:
        wanted = models - self._rates.keys()
        if not wanted:
            return
        who = {"account_id": self._caller.account_id, "currency": self._caller.currency}
        methods = {m: self._models[m].price.method for m in wanted}
        self._rates |= pricing.current(db, **who, models=methods)  # type: ignore[arg-type]
        if self.facts.reuse:
            self._reused |= reuse.rates(
                db, self._caller.account_id, currency=self._caller.currency, models=wanted
            )

    # -------------------------------------------------------------------------------------------- frames

    def _waiting(self, db: Session, rows: Sequence[Row], placed: Mapping[int, _Placed]) -> set[int]:
        """Places in rows of frames that wait: their image is known, or an equal one comes before them."""
        keys = {
            n: (r.print, r.template.spec.format.value)
            for n, r in enumerate(rows)
            if r.seeded and placed[id(r.template)].again is not None
        }
        if not keys:
            return set()
        found = reuse.equals(
            db, self._caller.account_id, priority=self.facts.priority, keys=set(keys.values()), within=self._job_id
        )  # fmt: skip
        waiting = set()
        for n, key in keys.items():
            if key in found:
                waiting.add(n)
            else:
                found[key] = False  # those that come after it wait for it
        return waiting

    def _packed(
        self, rows: Sequence[Row], placed: Mapping[int, _Placed], waiting: set[int], first: int
    ) -> tuple[bytes, bytes]:
        """Frames and names as COPY takes them."""
        base, job, account = (
            self._job_id.int + 1,
            UUID16 + self._job_id.bytes,
            UUID16 + self._caller.account_id.bytes,
        )
        proof = self.facts.proof if self.facts.proof is not None else 1 << 30
        most = self.facts.max_parallel if self.facts.max_parallel is not None else 1 << 30
        name_head = struct.pack("!h", 4) + job
        frames, names = [START], [START]
        for n, row in enumerate(rows):
            index = first + n
            at, rest = placed[id(row.template)], index >= proof
            at.frames += 1
            known = at.keys.get(rest)
            if known is None:
                known = at.keys[rest] = self._key(at.template, account, rest=rest)
            key, key_bytes = known
            if n in waiting:
                status = STATUS[FrameStatus.WAITING]
            elif index >= most:
                status = STATUS[FrameStatus.STAGED]
            else:
                status = STATUS[FrameStatus.QUEUED]
                if not key.is_open and not rest:
                    key.is_open = key.opened = True
            number = INT4 + index.to_bytes(4)
            frames += (
                HEAD, (base + index).to_bytes(16), job, number, key_bytes, status, INT8, row.seed.to_bytes(8), at.tail,
                row.print, TRUE if row.seeded else FALSE, (len(row.spec_json) + 1).to_bytes(4), b"\1", row.spec_json,
            )  # fmt: skip
            if row.name is not None:
                name = row.name.encode()
                names += (name_head, number, account, len(name).to_bytes(4), name)
        frames.append(END)
        names.append(END)
        return b"".join(frames), b"".join(names) if len(names) > 2 else b""

    def _key(self, template: Template, account: bytes, *, rest: bool) -> tuple[_Key, bytes]:
        assert self._keys is not None
        key = self._keys.get((template.call_key, rest))
        if key is None:
            if len(self._keys) >= MAX_KEYS:
                allowed = f"allowed are {MAX_KEYS} combinations of model, size, steps and sampler in one job"
                raise Invalid([Fault("line", template.call_key, allowed)])
            key = self._keys[template.call_key, rest] = _Key(len(self._keys), is_open=False)
            self._added.append((template, key, rest))
        return key, INT4 + key.no.to_bytes(4) + account

    # -------------------------------------------------------------------------------------------- the rows

    def _write(self, db: Session, frames: int, costs: Decimal) -> None:
        """The job with this many frames more, and its keys that are new or were closed; the frames come next."""
        added, self._added = self._added, []
        again = [self._reused_at(template) for template, _, _ in added]
        key_columns = {
            "key_nos": [key.no for _, key, _ in added],
            "models": [template.model.name for template, _, _ in added],
            "shape_keys": [shape_key(template.spec, template.model) for template, _, _ in added],
            "call_keys": [template.call_key for template, _, _ in added],
            "pixels": [template.spec.largest_pixels for template, _, _ in added],
            "open": [key.is_open for _, key, _ in added],
            "reuse_price_ids": [rate and rate.price_id for rate in again],
            "rests": [rest for _, _, rest in added],
        }
        opened = [key.no for key in (self._keys or {}).values() if key.opened and not key.new]
        for key in (self._keys or {}).values():
            key.new = key.opened = False
        job = {
            "job_id": self._job_id,
            "account_id": self._caller.account_id,
            "api_key_id": self._caller.key_id,
            "name": self.facts.name,
            "priority": self.facts.priority,
            "frames": frames,
            "currency": self._caller.currency,
            "quoted": costs,
            "proof": self.facts.proof,
        }
        together(db, [("bulk_job", job), ("bulk_keys", {**key_columns, "job_id": self._job_id, "opened": opened,
                                                        "account_id": self._caller.account_id,
                                                        "priority": self.facts.priority})])  # fmt: skip

    def _reused_at(self, template: Template) -> pricing.Rate | None:
        rate, again = self._rates[template.model.name], self._reused.get(template.model.name)
        dear = again is None or again.rate > rate.amount(quantity(template.spec, rate.method))
        return None if dear else again

    def _bind_inputs(self, db: Session, rows: Sequence[Row]) -> None:
        needed = {ref for r in rows if not r.template.json for ref in r.template.spec.inputs}
        if needed - self._bound:
            inputs.bind(db, self._caller.account_id, self._job_id, sorted(needed - self._bound))
            self._bound |= needed
