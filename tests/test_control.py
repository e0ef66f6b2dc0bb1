"""When a job is handed out, by when it has to be done, and how much of it at once."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from farm import budgets, control, ids, jobs, pace, queue, submissions, sweep
from farm.accounts import Caller
from farm.db import transaction
from farm.errors import Conflict, Invalid, NotFound
from farm.sweep import CHORES
from farm.tables import Account
from tests.factories import (
    CATALOG,
    FRAME,
    account,
    add_worker,
    ask,
    claim,
    fail,
    lose,
    must_claim,
    one,
    release,
    settle,
    statuses,
    stored,
    submit,
    until_blocked,
    view,
)

CHORE = {chore.name: chore for chore in CHORES}
HOUR = timedelta(hours=1)


def do(*names: str) -> int:
    return sum(sweep.do(CHORE[name]) for name in names)


def now() -> datetime:
    return datetime.now(UTC)


def send(
    caller: Caller, count: int = 1, *, models: tuple[str, ...] = ("alpha",), reuse: bool = False, **how: Any
) -> UUID:
    """Submit a job of so many frames of each of these models."""
    specs = [
        {"prompt": "a red circle", "model": m, "seed": 100 * k, "count": count} for k, m in enumerate(models)
    ]
    with transaction() as db:
        sent = submissions.Submission(specs=how.pop("specs", specs), reuse=reuse, **how)
        return submissions.submit(db, caller, sent, models=CATALOG)[0]


def change(caller: Caller, job: UUID, **changes: Any) -> list[str]:
    with transaction() as db:
        return jobs.change(db, caller.account_id, job, changes)


def verb(do: Callable[..., Any], caller: Caller, job: UUID) -> None:
    with transaction() as db:
        do(db, caller.account_id, job)


def pass_deadline(job: UUID) -> None:
    ask("UPDATE jobs SET deadline = clock_timestamp() - interval '1 s' WHERE id = :job", job=job)


def come(job: UUID) -> None:
    ask("UPDATE jobs SET start_after = clock_timestamp() - interval '1 s' WHERE id = :job", job=job)


def told(job: UUID, kind: str) -> list[Any]:
    query = "SELECT data FROM outbox WHERE job_id = :job AND kind = :kind ORDER BY id"
    return [r.data for r in ask(query, job=job, kind=kind)]


def public(job: UUID) -> str:
    return ids.public("job", job)


# ------------------------------------------------------------------------------------------------ start_after


def test_a_job_is_held_and_handed_out_only_once_its_start_has_come(books: str) -> None:
    # given
    caller = account()
    job = send(caller, 2, start_after=now() + HOUR)

    # then it is accepted, and nobody gets it
    assert (view(caller, job).status, view(caller, job).held) == ("waiting", 2 * FRAME)
    do("release")
    assert claim() is None

    # when
    come(job)

    # then
    assert do("release") == 1
    assert view(caller, job).status == "queued"
    assert [f.job_id for f in must_claim().frames] == [job, job]
    assert told(job, "job.released") == [{}]
    assert do("release") == 0


def test_a_waiting_job_that_is_paused_and_resumed_waits_on(books: str) -> None:
    caller = account()
    job = send(caller, start_after=now() + HOUR)

    verb(jobs.pause, caller, job)
    assert view(caller, job).status == "paused"
    verb(jobs.resume, caller, job)

    assert view(caller, job).status == "waiting"
    assert claim() is None


def test_a_job_whose_start_comes_while_it_is_paused_goes_on_when_it_is_resumed(books: str) -> None:
    caller = account()
    job = send(caller, start_after=now() + HOUR)
    verb(jobs.pause, caller, job)

    come(job)
    do("release")
    assert claim() is None
    verb(jobs.resume, caller, job)

    assert must_claim().frames[0].job_id == job


def test_a_waiting_job_can_be_cancelled(books: str) -> None:
    caller = account()
    job = send(caller, 3, start_after=now() + HOUR)

    verb(jobs.cancel, caller, job)
    do("cancel", "fold")

    assert statuses(job) == ["cancelled"] * 3
    assert (view(caller, job).status, view(caller, job).held) == ("cancelled", 0)


def test_what_a_budget_holds_back_is_not_released(books: str) -> None:
    # given a budget of which half is spent, where it says to drain
    caller = account()
    submit(caller, 2)
    with transaction() as db:
        owner = db.get_one(Account, caller.account_id)
        thresholds = [budgets.Threshold(10, budgets.Action.DRAIN)]
        budgets.put(db, owner, 10 * FRAME, thresholds=thresholds)
    job = send(caller, start_after=now() + HOUR)
    settle(must_claim())
    do("fold", "tallies", "budgets")
    assert view(caller, job).status == "paused"

    # when
    come(job)
    do("release")
    assert claim() is None
    with transaction() as db:
        budgets.put(db, db.get_one(Account, caller.account_id), None)
    do("budgets", "release")

    # then
    assert must_claim().frames[0].job_id == job


def test_start_after_may_be_changed_while_a_job_runs(books: str) -> None:
    # given
    caller = account()
    job = send(caller, 6)
    pack = must_claim()

    # when
    change(caller, job, start_after=now() + HOUR)

    # then what is on a device is finished, and nothing more handed out
    assert claim() is None
    assert view(caller, job).status == "running"
    settle(pack)
    do("release")
    assert view(caller, job).status == "waiting"
    assert claim() is None

    # when it is taken back
    change(caller, job, start_after=None)
    do("release")
    assert len(must_claim().frames) == 2


# ------------------------------------------------------------------------------------------------ after


@pytest.mark.parametrize("ends", ["done", "failed", "cancelled"])
def test_a_job_after_others_is_handed_out_when_all_have_ended_whatever_became_of_them(
    books: str, ends: str
) -> None:
    # given
    caller = account()
    first, second = send(caller), send(caller, models=("beta",))
    job = send(caller, models=("flat",), after=[public(first), public(second)])
    settle(must_claim())
    do("fold", "release")
    assert view(caller, job).status == "waiting"

    # when
    if ends == "done":
        settle(must_claim(models=["beta"]))
    elif ends == "cancelled":
        verb(jobs.cancel, caller, second)
        do("cancel")
    else:
        for _ in range(3):
            fail(must_claim(models=["beta"]))
    do("fold", "release")

    # then
    assert must_claim(models=["flat"]).frames[0].job_id == job
    assert view(caller, job).after == ((first, False), (second, False))


def test_a_job_after_others_that_had_to_be_all_done_is_cancelled_unbilled_if_they_are_not(books: str) -> None:
    # given
    caller = account()
    first = send(caller)
    job = send(caller, 2, models=("beta",), after_ok=[public(first)])
    then = send(caller, models=("flat",), after=[public(job)])

    # when
    verb(jobs.cancel, caller, first)
    do("cancel", "fold", "release", "cancel", "fold", "release")

    # then it never ran, and what only came after it goes on
    assert view(caller, job).status == "cancelled"
    assert told(job, "job.cancelled") == [{"by": "after_ok", "job": public(first)}]
    assert view(caller, job).held == 0
    assert must_claim(models=["flat"]).frames[0].job_id == then


def test_a_job_after_others_that_were_all_done_is_handed_out(books: str) -> None:
    caller = account()
    first = send(caller)
    job = send(caller, models=("beta",), after_ok=[public(first)], start_after=now() - HOUR)

    settle(must_claim())
    do("fold", "release")

    assert must_claim(models=["beta"]).frames[0].job_id == job


def test_a_job_comes_only_after_jobs_of_its_own_account(books: str) -> None:
    theirs = send(account("umbrella"))
    caller = account()

    for wanted in (public(theirs), public(ids.new_id(1)), "last", "job_x"):
        with pytest.raises(NotFound):
            send(caller, after=[wanted])

    assert one("SELECT count(*) FROM jobs") == 1
    with pytest.raises(Exception, match="another account's"), transaction() as db:
        control.bind(db, caller.account_id, send(caller), {theirs: False})


def test_a_waiting_lane_does_not_wake_workers_and_a_released_one_does(books: str) -> None:
    caller = account()
    add_worker("w", "alpha")
    job = send(caller, start_after=now() + HOUR)
    active = "SELECT count(*) FROM lanes WHERE active"
    assert one(active) == 0

    come(job)
    do("release")

    assert one(active) == 1


# ------------------------------------------------------------------------------------------------ deadline


def test_what_is_not_done_by_the_deadline_fails_with_that_reason_and_is_not_billed(books: str) -> None:
    # given two frames done, four on a device, four queued
    caller = account()
    job = send(caller, 10, deadline=now() + HOUR)
    settle(must_claim(frames=2))
    late = must_claim()
    assert do("late") == 0

    # when
    pass_deadline(job)
    assert do("late") == 1
    assert view(caller, job).failed == 8  # at once, whatever its frames say
    assert claim() is None
    do("late packs", "cancel", "fold")

    # then
    assert Counter(statuses(job)) == {"done": 2, "failed": 8}
    reasons = {r.reason for r in ask("SELECT reason FROM frames WHERE status = 'failed'")}
    assert len(reasons) == 1
    assert reasons.pop().startswith("not done by its deadline, 20")
    shown = view(caller, job)
    assert (shown.status, shown.failed, shown.held, shown.charged) == ("finished", 8, 0, 2 * FRAME)
    assert told(job, "job.late")[0]["on_late"] == "fail"
    assert sorted(t["index"] for t in told(job, "frame.failed")) == list(range(2, 10))

    # and whose pack it was books nothing any more
    assert not settle(late).done
    assert one("SELECT count(*) FROM packs WHERE closed_at IS NULL") == 0
    assert do("late", "late packs", "cancel") == 0


def test_neighbours_in_a_pack_of_a_late_job_are_done(books: str) -> None:
    caller = account()
    late, other = send(caller, 2, deadline=now() + HOUR), send(caller, 2)
    pack = must_claim()

    pass_deadline(late)
    do("late", "late packs")
    settled = settle(pack)
    do("cancel", "fold")

    assert {f.job_id for f in pack.frames if f.id in settled.done} == {other}
    assert statuses(late) == ["failed"] * 2
    assert view(caller, other).status == "finished"


def test_frames_settled_while_their_job_runs_late_are_done_and_billed(books: str) -> None:
    # given a settle that has not committed when the deadline passes
    caller = account()
    job = send(caller, deadline=now() + HOUR)
    pack = must_claim()
    pass_deadline(job)

    # when
    with transaction() as db:
        queue.settle(db, stored(pack))
        assert do("late") == 0  # its job is being settled: the next round
    do("fold", "late")

    # then
    assert statuses(job) == ["done"]
    assert view(caller, job).status == "finished"


def test_a_job_that_asks_for_it_goes_on_as_bulk_after_its_deadline(books: str) -> None:
    # given
    caller = account()
    job = send(caller, 2, priority="urgent", deadline=now() + HOUR, on_late="demote")
    other = send(caller)

    # when
    pass_deadline(job)
    assert do("late") == 1

    # then
    assert view(caller, job).priority == 1
    assert view(caller, job).late_at is not None
    assert must_claim(frames=1).frames[0].job_id == other
    assert must_claim().frames[0].job_id == job
    assert told(job, "job.late")[0]["on_late"] == "demote"
    assert do("late") == 0


def test_a_job_that_is_bulk_already_is_not_made_more_urgent_by_being_late(books: str) -> None:
    caller = account()
    job = send(caller, priority=0, deadline=now() + HOUR, on_late="demote")

    pass_deadline(job)
    do("late")

    assert view(caller, job).priority == 0


def test_a_paused_or_waiting_job_is_late_as_well(books: str) -> None:
    caller = account()
    paused = send(caller, deadline=now() + HOUR)
    waiting = send(caller, after=[public(paused)], deadline=now() + HOUR)
    verb(jobs.pause, caller, paused)

    pass_deadline(paused)
    pass_deadline(waiting)
    do("late", "cancel", "fold", "release")

    assert (statuses(paused), statuses(waiting)) == (["failed"], ["failed"])
    assert view(caller, waiting).status == "finished"


def test_a_late_job_takes_no_verbs_and_ends_in_bounded_bites(books: str) -> None:
    caller = account()
    job = send(caller, 6, deadline=now() + HOUR)
    pass_deadline(job)
    do("late")

    with pytest.raises(Conflict):
        verb(jobs.pause, caller, job)
    with pytest.raises(Conflict):
        change(caller, job, deadline=now() + HOUR)
    with transaction() as db:
        assert queue.cancel_queued(db, limit=4) == 4
    assert Counter(statuses(job)) == {"failed": 4, "queued": 2}
    assert view(caller, job).status == "late"


def test_a_deadline_may_be_moved_and_taken_away(books: str) -> None:
    caller = account()
    job = send(caller, deadline=now() + HOUR)
    change(caller, job, deadline=now() + 2 * HOUR, on_late="demote")
    assert view(caller, job).on_late == "demote"
    pass_deadline(job)
    do("late")
    assert view(caller, job).late_at is not None

    change(caller, job, deadline=now() + HOUR)
    assert (view(caller, job).late_at, view(caller, job).on_late) == (None, "demote")
    change(caller, job, deadline=None)

    assert (view(caller, job).deadline, view(caller, job).on_late) == (None, None)


@pytest.mark.parametrize(
    ("how", "field"),
    [
        ({"deadline": datetime(2020, 1, 1, tzinfo=UTC)}, "deadline"),
        ({"on_late": "fail"}, "on_late"),
        (
            {
                "deadline": datetime(2999, 1, 1, tzinfo=UTC),
                "start_after": datetime(2999, 1, 2, tzinfo=UTC),
            },
            "deadline",
        ),
    ],
)
def test_times_that_make_no_sense_are_refused_by_field(books: str, how: dict[str, Any], field: str) -> None:
    caller = account()
    job = send(caller)

    with pytest.raises(Invalid) as refused:
        send(caller, **how)
    assert [f.field for f in refused.value.faults] == [field]
    with pytest.raises(Invalid) as refused:
        change(caller, job, **how)
    assert [f.field for f in refused.value.faults] == [field]

    assert one("SELECT count(*) FROM jobs") == 1


# ------------------------------------------------------------------------------------------------ max_parallel


def in_hand(job: UUID) -> int:
    return int(one("SELECT count(*) FROM frames WHERE job_id = :job AND status = 'claimed'", job=job))


def test_no_more_frames_than_max_parallel_are_handed_out_at_once(books: str) -> None:
    # given
    caller = account()
    job = send(caller, 8, max_parallel=3)
    assert Counter(statuses(job)) == {"queued": 3, "staged": 5}
    assert view(caller, job).queued == 8

    # when
    first = must_claim()
    assert len(first.frames) == 3
    assert claim() is None

    # then whoever settles makes room at once, and as much as that
    settle(first, first.frames[:2])
    assert [f.index for f in must_claim().frames] == [3, 4]
    assert claim() is None
    do("refill")
    assert claim() is None
    settle(first, first.frames[2:])
    assert [f.index for f in must_claim().frames] == [5]


def test_frames_that_come_back_stay_among_those_handed_out(books: str) -> None:
    caller = account()
    job = send(caller, 6, max_parallel=2)

    release(must_claim())
    lose(must_claim())
    do("refill")

    assert Counter(statuses(job)) == {"queued": 2, "staged": 4}


def test_a_job_with_max_parallel_ends(books: str) -> None:
    caller = account()
    job = send(caller, 7, max_parallel=2, models=("alpha", "beta"))

    while (pack := claim(models=["alpha", "beta"])) is not None:
        assert in_hand(job) <= 2
        settle(pack)

    assert statuses(job) == ["done"] * 14
    assert view(caller, job).status == "finished"


def test_the_sweep_makes_room_after_a_worker_that_died_between_settling_and_finishing(books: str) -> None:
    caller = account()
    job = send(caller, 4, max_parallel=1)
    with transaction() as db:
        settle(must_claim(), db=db)
    assert claim() is None

    assert do("refill") == 1

    assert [f.index for f in must_claim().frames] == [1]
    assert do("refill") == 0
    assert in_hand(job) == 1


def test_a_failed_frame_makes_room(books: str) -> None:
    caller = account()
    send(caller, 2, max_parallel=1)
    for _ in range(3):
        fail(must_claim())

    do("refill")

    assert [f.index for f in must_claim().frames] == [1]


@pytest.mark.parametrize("cap", [1, 3, 5])
def test_eight_who_claim_at_once_never_pass_max_parallel(books: str, cap: int) -> None:
    """The job beside it, which has no such limit, does pass it in the same loop."""
    # given a job of two models and keys, beside one that has no limit
    caller = account()
    specs = [
        {"prompt": "x", "model": m, "steps": s, "count": 10, "seed": 0}
        for m in ("alpha", "beta")
        for s in (4, 8)
    ]
    job = send(caller, specs=specs, max_parallel=cap)
    other = send(caller, 40)
    most, lock, over = [0, 0], threading.Lock(), threading.Event()

    def work(number: int) -> None:
        while not over.is_set():
            with transaction() as db:
                pack = claim(f"w{number}", db=db, models=["alpha", "beta"])
            seen, free = in_hand(job), in_hand(other)
            with lock:
                most[0], most[1] = max(most[0], seen), max(most[1], free)
            if pack is not None:
                with transaction() as db:
                    queue.settle(db, stored(pack))
                with transaction() as db:
                    queue.finish(db, sorted({f.job_id for f in pack.frames}))
            elif view(caller, job).ended_at and view(caller, other).ended_at:
                over.set()

    # when
    with ThreadPoolExecutor(9) as threads:
        workers = [threads.submit(work, n) for n in range(8)]
        while not over.is_set() and not any(w.done() for w in workers):
            do("refill", "fold")
        for worker in workers:
            worker.result()

    # then
    assert statuses(job) == ["done"] * 40
    assert 1 <= most[0] <= cap
    assert most[1] > cap


def test_two_who_refill_at_once_do_not_queue_too_many(books: str) -> None:
    # given
    caller = account()
    job = send(caller, 9, max_parallel=2)
    with transaction() as db:
        settle(must_claim(), db=db)

    # when the second comes while the first has not committed, and after it
    with transaction() as db:
        assert queue.refill(db) == 1
        with transaction() as second:
            assert queue.refill(second) == 0
    do("refill")

    # then
    assert Counter(statuses(job)) == {"done": 2, "queued": 2, "staged": 5}


def test_max_parallel_may_be_raised_lowered_and_taken_away_while_a_job_runs(books: str) -> None:
    caller = account()
    job = send(caller, 12, max_parallel=2)
    pack = must_claim()

    # when it is raised
    assert change(caller, job, max_parallel=6) == ["alpha"]
    assert Counter(statuses(job)) == {"claimed": 2, "queued": 4, "staged": 6}

    # when it is lowered, what is on a device is finished, and nothing new comes before there is room
    change(caller, job, max_parallel=1)
    assert Counter(statuses(job)) == {"claimed": 2, "staged": 10}
    assert claim() is None
    settle(pack)
    assert len(must_claim().frames) == 1

    # when there is none any more
    change(caller, job, max_parallel=None)
    assert Counter(statuses(job)) == {"done": 2, "claimed": 1, "queued": 9}
    assert view(caller, job).max_parallel is None


def test_a_job_of_which_much_is_queued_gets_a_max_parallel_and_is_not_handed_out_beyond_it_meanwhile(
    books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given more frames than a verb touches
    monkeypatch.setattr(jobs, "BITE", 3)
    caller = account()
    job = send(caller, 10)

    # when
    change(caller, job, max_parallel=2)

    # then
    assert view(caller, job).status == "waiting"
    assert claim() is None
    do("release")
    assert Counter(statuses(job)) == {"queued": 2, "staged": 8}
    assert [f.index for f in must_claim().frames] == [0, 1]
    assert claim() is None


def test_who_claims_while_max_parallel_is_lowered_gets_no_more_than_before_it(books: str) -> None:
    """A claim that came first keeps what it has; narrowing goes round it."""
    caller = account()
    job = send(caller, 6)
    with transaction() as db:
        must_claim(db=db, frames=2)
        change(caller, job, max_parallel=3)

    assert Counter(statuses(job)) == {"claimed": 2, "queued": 1, "staged": 3}


def test_changing_max_parallel_waits_for_who_refills(books: str) -> None:
    caller = account()
    job = send(caller, 6, max_parallel=2)
    with transaction() as db:
        settle(must_claim(), db=db)

    with ThreadPoolExecutor(1) as thread:
        with transaction() as db:
            queue.refill(db)
            changing = thread.submit(change, caller, job, max_parallel=1)
            until_blocked()
        changing.result()

    assert Counter(statuses(job)) == {"done": 2, "queued": 1, "staged": 3}


def test_staged_frames_of_cancelled_and_late_jobs_end(books: str) -> None:
    caller = account()
    cancelled, late = send(caller, 5, max_parallel=1), send(caller, 5, max_parallel=1, deadline=now() + HOUR)

    verb(jobs.cancel, caller, cancelled)
    pass_deadline(late)
    do("late", "cancel", "fold")

    assert statuses(cancelled) == ["cancelled"] * 5
    assert statuses(late) == ["failed"] * 5
    assert view(caller, cancelled).held == view(caller, late).held == 0


def test_a_paused_job_is_not_refilled_and_goes_on_with_its_window(books: str) -> None:
    caller = account()
    job = send(caller, 4, max_parallel=1)
    pack = must_claim()
    verb(jobs.pause, caller, job)
    settle(pack)
    assert do("refill") == 0

    verb(jobs.resume, caller, job)
    do("refill")

    assert [f.index for f in must_claim().frames] == [1]


def test_equal_frames_of_a_job_with_max_parallel_are_rendered_once(books: str) -> None:
    # given four frames of which two pairs are equal, the second of the first pair within the window
    caller = account()
    pair = [{"prompt": p, "model": "alpha", "seed": 1} for p in ("a", "b")]
    job = send(caller, specs=[*pair, *pair], max_parallel=1, reuse=True)
    assert statuses(job) == ["queued", "staged", "waiting", "waiting"]
    do("answer")
    assert statuses(job) == ["queued", "staged", "waiting", "waiting"]

    # when
    rendered = 0
    while (pack := claim()) is not None:
        rendered += len(pack.frames)
        settle(pack)
        do("answer")

    # then
    assert statuses(job) == ["done"] * 4
    assert rendered == 2


def test_a_waiting_frame_that_must_be_rendered_after_all_keeps_to_max_parallel(books: str) -> None:
    # given two frames that wait for another job's, which is cancelled
    caller = account()
    first = send(caller, 3, reuse=True)
    job = send(caller, 3, max_parallel=1, reuse=True)
    assert statuses(job) == ["waiting"] * 3

    # when
    verb(jobs.cancel, caller, first)
    do("cancel", "answer", "answer", "refill")

    # then
    assert Counter(statuses(job)) == {"queued": 1, "staged": 2}


def test_many_jobs_without_max_parallel_cost_refilling_nothing(books: str) -> None:
    for n in range(5):
        submit(account(f"a{n}"), 3)

    with transaction() as db:
        assert queue.refill(db) == 0
        reads = "SELECT coalesce(sum(idx_tup_fetch + seq_tup_read), 0) FROM pg_stat_xact_user_tables"
        assert db.scalar(text(f"{reads} WHERE relname LIKE 'frames%'")) == 0


# ------------------------------------------------------------------------------------------------ pace


def test_a_running_job_tells_its_pace(books: str) -> None:
    caller = account()
    job = send(caller, 8)
    with transaction() as db:
        assert pace.of(db, [job]) == {}

    settle(must_claim())
    do("relay")
    ask("UPDATE events SET at = at - interval '10 s'")

    with transaction() as db:
        assert pace.of(db, [job])[job].per_s == pytest.approx(0.4, rel=0.1)
    ask("UPDATE events SET at = at - interval '10 min'")
    with transaction() as db:
        assert pace.of(db, [job]) == {}


# ------------------------------------------------------------------------------------------------ with proofs


@pytest.mark.parametrize("cap", [1, 3])
def test_max_parallel_holds_before_and_after_a_proof_is_approved(books: str, cap: int) -> None:
    # given
    caller = account()
    job = send(caller, 6, proof=2, max_parallel=cap)

    # when
    proofs = []
    while (pack := claim()) is not None:
        assert in_hand(job) <= cap
        proofs += [f.index for f in pack.frames]
        settle(pack)
        do("refill")

    # then
    assert proofs == [0, 1]

    # when
    verb(jobs.approve, caller, job)
    while (pack := claim()) is not None:
        assert in_hand(job) <= cap
        settle(pack)
        do("refill")

    # then
    assert statuses(job) == ["done"] * 6
    assert view(caller, job).status == "finished"


def test_a_job_with_a_proof_fails_at_its_deadline_with_what_was_not_approved(books: str) -> None:
    caller = account()
    job = send(caller, 4, proof=1, deadline=now() + HOUR)
    settle(must_claim())

    pass_deadline(job)
    do("late", "cancel", "fold")

    assert statuses(job) == ["done"] + ["failed"] * 3
    assert view(caller, job).status == "finished"
