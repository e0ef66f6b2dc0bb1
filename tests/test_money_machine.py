"""Whatever happens in whatever order, the books are right: a state machine on a real Postgres.

After each step the audit is empty and every job's counts and charges are those of its frames. At the end everything
is let go on: then every frame has ended, nobody waits, nothing is held, and a month more can be closed.
"""

from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from farm import jobs, ledger, pricing, queue, statements, submissions, sweep
from farm.accounts import Caller
from farm.catalog import Method
from farm.db import transaction
from farm.errors import Conflict
from farm.queue import ClaimedPack
from farm.tables import Account
from tests.factories import (
    CATALOG,
    account,
    ask,
    back_date,
    claim,
    expire,
    fail,
    one,
    release,
    stored,
    view,
    violations,
)

EXAMPLES, STEPS = 25, 40
MODELS = ("alpha", "flat")
CHORES = {
    c.name: c for c in sweep.CHORES if c.name in ("reclaim", "fold", "cancel", "answer", "retire", "reopen")
}

Verb = Callable[..., Any]


def _empty() -> None:
    """Leave nothing of the example before but the schema."""
    tables = ask(
        "SELECT string_agg(quote_ident(c.relname), ', ') AS names FROM pg_class AS c"
        " WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition"
        " AND c.relname <> 'alembic_version'"
    )
    ask(f"TRUNCATE {tables[0].names} CASCADE")


class Money(RuleBasedStateMachine):
    """Accounts that submit, workers that come and go, an admin who changes prices, and a sweep."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[tuple[Caller, UUID]] = []
        self.packs: list[ClaimedPack] = []  # also those that are nobody's any more
        self.months = iter((year, month) for year in (2024, 2025) for month in range(1, 13))

    @initialize()
    def accounts(self) -> None:
        _empty()
        with transaction() as db:
            pricing.sync(db, CATALOG)
        self.callers = [account("one"), account("two")]

    # -------------------------------------------------------------------------------------------- customers

    @rule(
        who=st.integers(0, 1),
        seeds=st.lists(st.sampled_from([0, 0, 1, 2, None]), min_size=1, max_size=3),
        count=st.integers(1, 2),
        priority=st.sampled_from([1, 5, 5, 9]),
        model=st.sampled_from(["alpha", "alpha", "flat"]),
        reuse=st.sampled_from([True, True, True, False]),
    )
    def submit(
        self, *, who: int, seeds: list[int | None], count: int, priority: int, model: str, reuse: bool
    ) -> None:
        specs = [{"prompt": "x", "model": model, "seed": s, "count": count} for s in seeds]
        sent = submissions.Submission(specs=specs, priority=priority, reuse=reuse)
        with transaction() as db:
            made, _ = submissions.submit(db, self.callers[who], sent, models=CATALOG)
        self.jobs.append((self.callers[who], made))

    def _verb(self, data: st.DataObject, do: Verb, *args: Any) -> None:
        caller, job = data.draw(st.sampled_from(self.jobs))
        try:
            with transaction() as db:
                do(db, caller.account_id, job, *args)
        except Conflict:  # it has ended
            assert view(caller, job).status in ("finished", "cancelled")

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._verb(data, jobs.cancel)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        self._verb(data, jobs.pause)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        self._verb(data, jobs.resume)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), priority=st.sampled_from([0, 5, 9]))
    def reprioritise(self, data: st.DataObject, priority: int) -> None:
        self._verb(data, jobs.reprioritise, priority)

    # -------------------------------------------------------------------------------------------- workers

    @rule(frames=st.integers(1, 4))
    def claim(self, frames: int) -> None:
        if (pack := claim(models=MODELS, frames=frames)) is not None:
            self.packs.append(pack)

    @precondition(lambda self: self.packs)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        """Any pack that ever was, wholly or in part: late, twice, or in time."""
        pack = data.draw(st.sampled_from(self.packs[-4:]))
        some = data.draw(st.lists(st.sampled_from(pack.frames), min_size=1, unique=True))
        with transaction() as db:
            settled = queue.settle(db, stored(pack, some), gpu_ms={pack.id: 10})
        with transaction() as db:
            queue.finish(db, sorted(settled.over))

    @precondition(lambda self: self.packs)
    @rule(data=st.data(), how=st.sampled_from(["fail", "release", "lose"]))
    def give_back(self, data: st.DataObject, how: str) -> None:
        pack = data.draw(st.sampled_from(self.packs[-4:]))
        match how:
            case "fail":
                fail(pack)
            case "release":
                release(pack)
            case _:
                expire(pack)
                sweep.do(CHORES["reclaim"])

    # -------------------------------------------------------------------------------------------- the farm

    @rule(chore=st.sampled_from(sorted(CHORES)))
    def sweep(self, chore: str) -> None:
        sweep.do(CHORES[chore])

    @rule(
        model=st.sampled_from(MODELS),
        rate=st.sampled_from(["0", "0.001", "0.0033", "0.4"]),
        method=st.sampled_from(Method),
        own=st.booleans(),
    )
    def change_price(self, *, model: str, rate: str, method: Method, own: bool) -> None:
        with transaction() as db:
            owner = db.get_one(Account, self.callers[0].account_id) if own else None
            pricing.set_price(db, CATALOG, account=owner, model=model, rate=Decimal(rate), method=method)

    @rule(which=st.integers(0, 7))
    def reverse(self, which: int) -> None:
        charged = ask("SELECT frame_id FROM usage WHERE entry = 0 ORDER BY frame_id LIMIT 8")
        if which < len(charged):
            try:
                with transaction() as db:
                    ledger.reverse(db, charged[which].frame_id, reason="it was ugly")
            except Conflict:
                assert one("SELECT count(*) FROM usage WHERE frame_id = :f", f=charged[which].frame_id) == 2

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), rows=st.integers(1, 3))
    def close_month(self, data: st.DataObject, rows: int) -> None:
        """What a job used so far was used in a month that is over; close that, a few rows at a time."""
        caller, job = data.draw(st.sampled_from(self.jobs))
        year, month = next(self.months)
        back_date(datetime(year, month, 15, tzinfo=UTC), job=job)
        for who in {caller, *self.callers}:
            closed = False
            while not closed:
                with transaction() as db:
                    owner = db.get_one(Account, who.account_id)
                    closed = statements.close_further(db, owner, date(year, month, 1), rows=rows)

    # -------------------------------------------------------------------------------------------- what holds

    @invariant()
    def the_books_are_right(self) -> None:
        assert violations() == []

    @invariant()
    def counts_and_charges_are_those_of_the_frames(self) -> None:
        for caller, job in self.jobs:
            shown = view(caller, job)
            assert shown.queued + shown.running + shown.done + shown.failed + shown.cancelled == shown.frames
            assert min(shown.queued, shown.running, shown.held) >= 0
            charged = one("SELECT coalesce(sum(amount), 0) FROM usage WHERE job_id = :j", j=job)
            assert shown.charged == charged <= shown.quoted

    def teardown(self) -> None:
        """Let everything go on until nothing is left to do."""
        if not self.jobs:
            return
        for pack in self.packs:
            release(pack)
        for caller, job in self.jobs:
            if view(caller, job).status == "paused":
                with transaction() as db:
                    jobs.resume(db, caller.account_id, job)
        for _ in range(200):
            for chore in CHORES.values():
                sweep.do(chore)
            if (pack := claim(models=MODELS, frames=4)) is not None:
                with transaction() as db:
                    queue.settle(db, stored(pack))
            elif not one("SELECT count(*) FROM jobs WHERE ended_at IS NULL"):
                break
        left = ask("SELECT status, count(*) FROM frames WHERE ended_at IS NULL GROUP BY status")
        assert left == []
        assert one("SELECT sum(held) FROM jobs") == 0
        assert one("SELECT count(*) FROM packs WHERE closed_at IS NULL") == 0
        self.the_books_are_right()
        self.counts_and_charges_are_those_of_the_frames()


@pytest.mark.usefixtures("database")
def test_whatever_happens_the_books_are_right() -> None:
    run_state_machine_as_test(
        Money,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
