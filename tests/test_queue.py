"""Claim, settle, give back: what may happen to frames, alone and at once."""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from itertools import pairwise
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from farm import budgets, jobs, ledger, queue, submissions, sweep
from farm.catalog import PackLimit
from farm.db import SQL, sql, transaction
from farm.queue import ClaimedPack, Settled
from farm.settings import settings
from tests.factories import (
    CATALOG,
    FRAME,
    NOTHING,
    account,
    active_lanes,
    ask,
    before,
    claim,
    expire,
    fail,
    lose,
    must_claim,
    one,
    open_places,
    owners,
    pass_time,
    release,
    retire,
    served,
    settle,
    statuses,
    stored,
    submit,
    submit_keys,
    until_blocked,
    view,
)

URGENT, STANDARD, BULK = 9, 5, 1

# ------------------------------------------------------------------------------------------------ claim


def test_no_work_is_no_pack(books: str) -> None:
    assert claim() is None


def test_two_workers_never_claim_the_same_frame(books: str) -> None:
    # given
    submit(account(), 6)

    with ThreadPoolExecutor(1) as thread:
        # when: both charge one lane, so the second waits for the first before it commits
        with transaction() as db:
            first = must_claim("a", db=db)
            second = thread.submit(must_claim, "b")
            until_blocked()

        # then
        assert (len(first.frames), len(second.result().frames)) == (4, 2)
    assert {f.id for f in first.frames}.isdisjoint(f.id for f in second.result().frames)


def test_workers_that_fill_their_packs_from_each_others_lanes_never_claim_the_same_frame(books: str) -> None:
    # given two lanes of one key, each less than a pack
    one_account, other_account = account("one"), account("other")
    submit(one_account, 3)
    submit(other_account, 3)

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            first = must_claim("a", db=db)
            second = thread.submit(must_claim, "b")
            until_blocked()

        # then
        assert (len(first.frames), len(second.result().frames)) == (4, 2)
    assert {f.id for f in first.frames}.isdisjoint(f.id for f in second.result().frames)


def test_workers_of_different_lanes_do_not_wait_for_each_other(books: str) -> None:
    # given
    first_account, second_account = account("first"), account("second")
    submit(first_account, 4, steps=5)
    submit(second_account, 4, steps=6)

    # when
    with transaction() as first_db, transaction() as second_db:
        second_db.execute(text("SET LOCAL lock_timeout = '1ms'"))
        first = must_claim("a", db=first_db)
        second = must_claim("b", db=second_db)

    # then
    assert {first.frames[0].account_id, second.frames[0].account_id} == {
        first_account.account_id,
        second_account.account_id,
    }


def test_a_worker_that_finds_nothing_but_what_another_is_claiming_does_not_wait(books: str) -> None:
    # given
    submit(account(), 4)

    # when
    with transaction() as first_db:
        must_claim("a", db=first_db)
        with transaction() as second_db:
            second_db.execute(text("SET LOCAL lock_timeout = '1ms'"))
            second = claim("b", db=second_db)

    # then
    assert second is None


@pytest.mark.parametrize("analysed", [False, True])
def test_a_claim_keeps_no_frame_from_others_but_those_it_takes(books: str, analysed: bool) -> None:
    # given jobs and keys enough for any sort to read ahead, with and without what the planner knows of them
    caller = account()
    submit_keys(caller, range(4, 44))
    for _ in range(40):
        submit(caller, steps=99)
    for table in ("frames", "job_keys", "job_lanes", "lanes") if analysed else ():
        ask(f"ANALYZE {table}")

    # when
    with transaction() as db:
        must_claim("a", db=db)
        free = one(
            "SELECT count(*) FROM (SELECT FROM frames WHERE status = 'queued' FOR UPDATE SKIP LOCKED) AS f"
        )

    # then
    assert free == 79


def test_a_worker_gets_the_other_keys_of_a_job_that_another_is_claiming(books: str) -> None:
    # given a job of three keys, one frame each
    submit_keys(account(), [4, 5, 6])

    with ThreadPoolExecutor(2) as threads:
        # when
        with transaction() as db:
            first = must_claim("a", db=db)
            later = [threads.submit(claim, worker) for worker in ("b", "c")]
            until_blocked(2)
        packs = [late.result() for late in later]

    # then
    assert first.frames[0].spec.steps == 4
    assert sorted(p.frames[0].spec.steps for p in packs if p is not None) == [5, 6]


def test_a_more_urgent_class_is_served_whatever_it_had_before(books: str) -> None:
    # given
    bulk, urgent = account("bulk"), account("urgent")
    submit(bulk, 4, priority="bulk", steps=5)
    submit(urgent, 12, priority="urgent")

    # when
    order = [must_claim().priority for _ in range(4)]

    # then
    assert order == [URGENT] * 3 + [BULK]


def test_each_of_the_ten_priorities_is_a_class_of_its_own(books: str) -> None:
    # given
    caller = account()
    for priority in (3, 0, 9, 6, 1, 8, 2, 7, 4, 5):
        submit(caller, priority=priority, steps=10 + priority)

    # when
    order = [must_claim().priority for _ in range(10)]

    # then
    assert order == list(range(9, -1, -1))


def test_inside_a_class_the_lane_served_least_is_next(books: str) -> None:
    # given
    first, second = account("first"), account("second")
    submit(first, 12)
    submit(second, 12)

    # when
    order = [must_claim().frames[0].account_id for _ in range(6)]

    # then neither gets two in a row
    assert all(a != b for a, b in pairwise(order))


def test_an_account_of_weight_two_gets_twice_the_work(books: str) -> None:
    # given
    heavy, light = account("heavy", weight=2), account("light")
    submit(heavy, 60)
    submit(light, 60)

    # when
    packs = Counter(must_claim().frames[0].account_id for _ in range(18))

    # then
    assert packs == {heavy.account_id: 12, light.account_id: 6}
    assert served(heavy) == served(light)


def test_what_is_shared_is_work_and_not_a_number_of_frames(books: str) -> None:
    # given frames of one account that are four times the other's
    large, small = account("large"), account("small")
    submit(large, 40, width=1024, height=1024)
    submit(small, 40)

    # when
    packs = Counter(must_claim(frames=1).frames[0].account_id for _ in range(25))

    # then
    assert packs[small.account_id] == 4 * packs[large.account_id]


def test_guided_frames_are_twice_the_work_of_unguided_ones(books: str) -> None:
    guided, unguided = account("guided"), account("unguided")
    submit(guided, guidance=7.5)
    submit(unguided, guidance=1.0)

    must_claim()
    must_claim()

    assert served(guided) == 2 * served(unguided) == 2 * 512 * 512 * 4


def test_a_pack_is_filled_from_the_same_account_and_then_from_others(books: str) -> None:
    # given the other's job is older than the second of the head's account
    mine, other = account("mine"), account("other")
    head = submit(mine, 2, priority="urgent")
    theirs = submit(other, 3, priority="urgent")
    kin = submit(mine, 1, priority="urgent")
    ask("UPDATE lanes SET served = 1 WHERE account_id = :other", other=other.account_id)

    # when
    pack = must_claim()

    # then
    assert Counter(f.job_id for f in pack.frames) == {head: 2, kin: 1, theirs: 1}
    assert pack.full


def test_each_frame_of_a_mixed_pack_is_charged_to_its_own_lane(books: str) -> None:
    # given an urgent frame, and others of its key in another class and account
    urgent, bulk = account("urgent"), account("bulk", weight=2)
    submit(urgent, 1, priority="urgent")
    submit(bulk, 8, priority="bulk")

    # when
    pack = must_claim()

    # then
    frame = pack.frames[0].work
    assert Counter(owners(pack)) == {urgent.account_id: 1, bulk.account_id: 3}
    assert served(urgent, priority=URGENT) == frame
    assert served(bulk, priority=BULK) == 3 * frame / 2


@pytest.mark.parametrize(
    "other",
    [{"steps": 5}, {"width": 520}, {"height": 504}, {"sampler": "euler"}, {"guidance": 1.0}],
    ids=lambda o: next(iter(o)),
)
def test_frames_of_different_keys_never_share_a_pack(books: str, other: dict[str, Any]) -> None:
    # given
    caller = account()
    submit(caller, 2)
    submit(caller, 2, **other)

    # when
    packs = [must_claim(), must_claim()]

    # then
    assert [len(p.frames) for p in packs] == [2, 2]
    assert packs[0].call_key != packs[1].call_key
    assert all(len({f.job_id for f in p.frames}) == 1 for p in packs)


def test_prompt_seed_guidance_and_format_may_differ_inside_a_pack(books: str) -> None:
    caller = account()
    submit(caller, prompt="a blue square", guidance=3.0, format="webp", seed=7)
    submit(caller, prompt="a red circle", guidance=9.0)

    assert len(must_claim().frames) == 2


def test_a_pack_holds_no_more_frames_and_pixels_than_the_model_allows(books: str) -> None:
    # given room for 4 frames, and for 4 megapixels
    caller = account()
    submit(caller, 5, width=512)
    submit(caller, 5, width=1536, height=1024)

    # when
    sizes = [len(must_claim().frames) for _ in range(5)]

    # then
    assert sizes == [4, 1, 2, 2, 1]


def test_a_frame_larger_than_a_pack_may_be_is_claimed_alone(books: str) -> None:
    submit(account(), 2, width=2048, height=2048)

    with transaction() as db:
        limits = {"alpha": PackLimit(frames=4, pixels=1 << 20)}
        pack = queue.claim_pack(db, models=["alpha"], worker="a", limits=limits)

    assert pack is not None
    assert len(pack.frames) == 1


def test_the_oldest_job_of_a_lane_is_first_and_its_frames_in_order(books: str) -> None:
    # given
    caller = account()
    submitted = [submit(caller, 2, steps=n) for n in (9, 4, 6)]

    # when
    packs = [must_claim() for _ in range(3)]

    # then
    assert [p.frames[0].job_id for p in packs] == submitted
    assert [[f.index for f in p.frames] for p in packs] == [[0, 1]] * 3


def test_a_claimed_frame_carries_its_own_seed_and_spec(books: str) -> None:
    submit(account(), 2, seed=41, prompt="a green star")

    pack = must_claim()

    assert [f.seed for f in pack.frames] == [41, 42]
    assert {f.spec.prompt for f in pack.frames} == {"a green star"}


def test_suspects_are_claimed_one_at_a_time(books: str) -> None:
    # given a pack that failed, and frames of its key that are not suspected
    caller = account()
    job = submit(caller, 3)
    fail(must_claim(frames=3))
    other = submit(caller, 2)

    # when
    packs = [must_claim() for _ in range(4)]

    # then
    assert [Counter(f.job_id for f in p.frames) for p in packs] == [{job: 1}] * 3 + [{other: 2}]


def test_a_suspect_is_never_fill_for_another_accounts_pack(books: str) -> None:
    # given a suspect of an account that was served more
    first, second = account("first"), account("second")
    submit(first, 2)
    fail(must_claim())
    submit(second, 1, priority="urgent")

    # when
    pack = must_claim()

    # then
    assert owners(pack) == [second.account_id]


@pytest.mark.parametrize("verb", [jobs.pause, jobs.cancel])
def test_frames_of_a_job_that_stopped_are_not_claimed(books: str, verb: Callable[..., None]) -> None:
    # given
    caller, other = account("acme"), account("other")
    job = submit(caller, 3)
    submit(other, 1)
    with transaction() as db:
        verb(db, caller.account_id, job)

    # when
    pack = must_claim()

    # then neither as head nor as fill
    assert owners(pack) == [other.account_id]
    assert claim() is None


def test_a_verb_counts_from_its_commit(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 2)

    # when
    with transaction() as db:
        jobs.pause(db, caller.account_id, job)
        db.flush()
        earlier = must_claim(frames=1)
    later = claim()

    # then
    assert len(earlier.frames) == 1
    assert later is None


@pytest.mark.parametrize("verb", [jobs.pause, jobs.cancel])
def test_a_job_that_stops_in_the_middle_of_a_claim_does_no_harm(
    books: str, verb: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    caller = account()
    job = submit(caller, 2)

    def stop() -> None:
        with transaction() as db:
            verb(db, caller.account_id, job)

    # when
    with before("claim", stop, monkeypatch):
        claim()

    # then
    assert claim() is None


def test_frames_of_a_resumed_job_are_claimed(books: str) -> None:
    # given a job whose lane was retired while it was paused
    caller = account()
    job = submit(caller, 2)
    with transaction() as db:
        jobs.pause(db, caller.account_id, job)
    retire()
    assert active_lanes() == []

    # when
    with transaction() as db:
        woken = jobs.resume(db, caller.account_id, job)

    # then
    assert woken == ["alpha"]
    assert len(must_claim().frames) == 2


def test_a_reprioritised_job_is_claimed_in_its_new_class_next(books: str) -> None:
    # given
    caller, other = account("acme"), account("other")
    job = submit(caller, 2, priority="bulk", steps=7)
    submit(other, 4, priority="standard")

    # when
    with transaction() as db:
        woken = jobs.reprioritise(db, caller.account_id, job, URGENT)
    pack = must_claim()

    # then
    assert woken == ["alpha"]
    assert (pack.priority, pack.frames[0].job_id) == (URGENT, job)
    assert served(caller, priority=URGENT) > 0
    assert served(caller, priority=BULK) == 0


def test_a_job_reprioritised_in_the_middle_of_a_claim_is_charged_to_its_new_class(
    books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = account()
    job = submit(caller, 2, priority="bulk")

    def move() -> None:
        with transaction() as db:
            jobs.reprioritise(db, caller.account_id, job, URGENT)

    with before("claim", move, monkeypatch):
        pack = must_claim()

    assert len(pack.frames) == 2
    assert served(caller, priority=URGENT) > 0


def test_a_worker_takes_the_most_urgent_of_all_its_models(books: str) -> None:
    # given
    caller = account()
    submit(caller, model="alpha", priority="standard")
    submit(caller, model="beta", priority="urgent")
    submit(caller, model="flat", priority="urgent")

    # when: it does not serve flat
    order = [must_claim(models=["alpha", "beta"]).model for _ in range(2)]

    # then
    assert order == ["beta", "alpha"]
    assert claim(models=["alpha", "beta"]) is None


def test_two_models_of_one_worker_share_a_class_also_when_one_is_new_to_it(books: str) -> None:
    # given a model that was served for long, and another that asks for the first time
    old, new = account("old"), account("new")
    submit(old, 30, model="alpha")
    for _ in range(10):
        must_claim(models=["alpha", "beta"], frames=1)
    submit(new, 30, model="beta")

    # when
    packs = Counter(must_claim(models=["alpha", "beta"], frames=1).model for _ in range(8))

    # then
    assert packs == {"alpha": 4, "beta": 4}


def test_a_claim_that_does_not_commit_leaves_nothing_behind(books: str) -> None:
    # given
    job = submit(account(), 2)

    # when
    with transaction() as db:
        must_claim(db=db)
        db.rollback()

    # then
    assert statuses(job) == ["queued", "queued"]
    assert one("SELECT count(*) FROM packs") == 0
    assert open_places(job) == ([True], [True])


# ------------------------------------------------------------------------------------------------ ageing


def test_a_lane_unserved_for_the_ageing_time_gets_the_next_pack_whatever_its_class(books: str) -> None:
    # given
    bulk, urgent = account("bulk"), account("urgent")
    submit(bulk, 8, priority="bulk", steps=5)
    pass_time(settings().ageing_s + 1)
    submit(urgent, 8, priority="urgent")

    # when
    packs = [must_claim() for _ in range(2)]

    # then one pack, and its wait begins anew
    assert [p.priority for p in packs] == [BULK, URGENT]
    assert [p.aged for p in packs] == [True, False]


def test_a_lane_that_waited_less_than_the_ageing_time_stays_in_its_class(books: str) -> None:
    bulk, urgent = account("bulk"), account("urgent")
    submit(bulk, priority="bulk", steps=5)
    pass_time(settings().ageing_s - 5)
    submit(urgent, priority="urgent")

    assert must_claim().priority == URGENT


def test_of_aged_lanes_the_one_that_waited_longest_is_first(books: str) -> None:
    # given
    first, second = account("first"), account("second")
    submit(first, priority="bulk", steps=5)
    pass_time(10)
    submit(second, priority="standard", steps=6)
    pass_time(settings().ageing_s + 1)

    # then
    assert owners(must_claim()) == [first.account_id]


def test_without_ageing_an_aged_lane_stays_in_its_class(books: str) -> None:
    bulk, urgent = account("bulk"), account("urgent")
    submit(bulk, priority="bulk", steps=5)
    pass_time(settings().ageing_s + 1)
    submit(urgent, priority="urgent")

    assert must_claim(ageing=False).priority == URGENT


def test_fill_for_others_packs_counts_as_service(books: str) -> None:
    # given a bulk lane that waited, and was taken along by an urgent pack
    bulk, urgent = account("bulk"), account("urgent")
    submit(bulk, 8, priority="bulk")
    pass_time(settings().ageing_s + 1)
    submit(urgent, 9, priority="urgent")
    for _ in range(3):
        must_claim(ageing=False)

    # then
    assert must_claim().priority == BULK  # it has no other rival now
    assert one("SELECT count(*) FROM packs WHERE priority = 9") == 3


def test_nothing_waits_for_ever_beside_an_endless_urgent_load(books: str) -> None:
    # given a worker whose packs take 10 s, three bulk lanes, and more urgent work than it can do
    pack_s, lanes, rounds = 10.0, 3, 72
    urgent = account("urgent")
    submit(urgent, rounds, priority="urgent")
    bulk = [account(f"bulk{n}") for n in range(lanes)]
    for n, caller in enumerate(bulk):
        submit(caller, rounds, priority="bulk", steps=10 + n)

    # when, as Worker does, never two aged packs in a row
    order: list[UUID] = []
    aged = False
    for _ in range(rounds):
        pack = must_claim(frames=1, ageing=not aged)
        aged = pack.aged
        order.append(pack.frames[0].account_id)
        pass_time(pack_s)

    # then no lane waits for more packs than the ageing time holds, and two for each lane
    bound = int(settings().ageing_s / pack_s) + 2 * lanes + 1
    for caller in bulk:
        turns = [-1, *(n for n, owner in enumerate(order) if owner == caller.account_id), rounds]
        assert max(b - a for a, b in pairwise(turns)) <= bound
    # and the urgent lane never waits for more than one
    turns = [n for n, owner in enumerate(order) if owner == urgent.account_id]
    assert len(turns) >= rounds / 2
    assert max(b - a for a, b in pairwise(turns)) <= 2


def test_many_aged_lanes_never_take_more_than_every_other_pack(books: str) -> None:
    # given more aged lanes than are served within the ageing time
    urgent = account("urgent")
    submit(urgent, 30, priority="urgent")
    for n in range(12):
        submit(account(f"bulk{n}"), 10, priority="bulk", steps=10 + n)

    # when
    classes, aged = [], False
    pass_time(settings().ageing_s)
    ask("UPDATE lanes SET waiting_at = clock_timestamp() WHERE priority = 9")
    for _ in range(24):
        pass_time(10)
        pack = must_claim(frames=1, ageing=not aged)
        aged = pack.aged
        classes.append(pack.priority)

    # then each of the aged lanes had its turn, and the urgent one every other
    assert classes == [BULK, URGENT] * 12
    assert one("SELECT count(*) FROM lanes WHERE priority = 1 AND served > 0") == 12


# ------------------------------------------------------------------------------------------------ lanes


def test_a_lane_that_refills_starts_at_the_lowest_active_share(books: str) -> None:
    # given two busy lanes, and one that asked for nothing meanwhile
    first, second, late = account("first"), account("second"), account("late")
    submit(late)
    must_claim()
    retire()
    submit(first, 40)
    submit(second, 40)
    ask("UPDATE lanes SET served = 1000000000 WHERE account_id = :a", a=first.account_id)
    ask("UPDATE lanes SET served = 2000000000 WHERE account_id = :a", a=second.account_id)

    # when
    submit(late)

    # then it cannot spend what it saved
    assert served(late) == 1_000_000_000


def test_a_lane_that_was_served_more_than_the_others_keeps_that_when_it_refills(books: str) -> None:
    busy, greedy = account("busy"), account("greedy")
    submit(greedy)
    must_claim()
    retire()
    submit(busy, 4)
    ask("UPDATE lanes SET served = 5000000000 WHERE account_id = :a", a=greedy.account_id)

    submit(greedy)

    assert served(greedy) == 5_000_000_000


def test_a_lane_that_is_active_keeps_its_share_when_more_arrives(books: str) -> None:
    first, second = account("first"), account("second")
    submit(first, 40)
    submit(second, 40)
    ask("UPDATE lanes SET served = 1000000000 WHERE account_id = :a", a=second.account_id)

    submit(first, 1)

    assert served(first) == 0


def test_an_empty_lane_is_retired_and_new_work_opens_it(books: str) -> None:
    # given
    caller = account()
    submit(caller, 2)
    must_claim()
    assert active_lanes() == [("alpha", STANDARD, caller.account_id)]

    # when
    assert claim() is None
    retire()

    # then
    assert active_lanes() == []
    submit(caller, 1)
    assert len(must_claim().frames) == 1


def test_a_lane_with_queued_frames_is_not_retired(books: str) -> None:
    caller = account()
    submit(caller, 1)

    retire()

    assert active_lanes() == [("alpha", STANDARD, caller.account_id)]


def test_empty_lanes_are_retired_and_those_with_work_are_kept(books: str) -> None:
    # given two empty lanes, one of a paused job, and one with work
    caller = account()
    submit(caller, priority=9, steps=5)
    submit(caller, priority=8, steps=6)
    must_claim()
    must_claim()
    paused = submit(caller, priority=7)
    with transaction() as db:
        jobs.pause(db, caller.account_id, paused)
    submit(caller, priority=6)

    # when
    tried = retire()

    # then
    assert tried == 3
    assert active_lanes() == [("alpha", 6, caller.account_id)]


def test_a_lane_is_not_retired_while_a_submission_into_it_is_uncommitted(books: str) -> None:
    # given an empty lane that is active still
    caller = account()
    submit(caller)
    must_claim()

    # when
    with transaction() as db:
        submit(caller, db=db)
        retire()

    # then
    assert active_lanes() == [("alpha", STANDARD, caller.account_id)]
    assert len(must_claim().frames) == 1


def test_a_submission_waits_for_who_retires_its_lane_and_opens_it_again(books: str) -> None:
    # given
    caller = account()
    submit(caller)
    must_claim()

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            retire(db=db)
            late = thread.submit(submit, caller)
            until_blocked()
        late.result()

    # then
    assert active_lanes() == [("alpha", STANDARD, caller.account_id)]
    assert len(must_claim().frames) == 1


def test_frames_stored_before_and_a_lane_opened_after_it_was_retired_are_claimed(
    books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a submission whose frames are written but whose lane is not opened yet, when it is retired
    caller = account()
    submit(caller)
    must_claim()
    acts = [retire]
    admit = budgets.admit

    def admit_after_act(*values: Any, **facts: Any) -> None:
        if acts:
            acts.pop()()
        admit(*values, **facts)

    monkeypatch.setattr(budgets, "admit", admit_after_act)

    # when: one that does not go in a single round trip
    with transaction() as session:
        spec = {"prompt": "a red circle", "model": "alpha"}
        sent = submissions.Submission(spec=spec, max_parallel=2)
        submissions.submit(session, caller, sent, models=CATALOG)

    # then
    assert acts == []
    assert len(must_claim().frames) == 1


def test_the_claim_that_empties_a_key_and_a_job_closes_them(books: str) -> None:
    # given
    job = submit_keys(account(), [4, 5])

    # when
    must_claim()
    after_first = open_places(job)
    must_claim()

    # then
    assert after_first == ([False, True], [True])
    assert open_places(job) == ([False, False], [False])


def test_a_claim_that_leaves_frames_closes_nothing(books: str) -> None:
    job = submit(account(), 5)

    must_claim()

    assert open_places(job) == ([True], [True])


BACK = [release, fail, lose]


@pytest.mark.parametrize("give_back", BACK)
def test_frames_that_come_back_open_their_key_their_job_and_their_lane(
    books: str, give_back: Callable[[ClaimedPack], int]
) -> None:
    # given
    caller = account()
    job = submit(caller, 2)
    pack = must_claim()
    retire()
    assert (open_places(job), active_lanes()) == (([False], [False]), [])

    # when
    give_back(pack)

    # then
    assert open_places(job) == ([True], [True])
    assert active_lanes() == [("alpha", STANDARD, caller.account_id)]
    assert must_claim().frames[0].job_id == job


def test_a_key_into_which_frames_come_back_uncommitted_is_not_closed(books: str) -> None:
    # given
    job = submit(account(), 6)
    first = must_claim()

    # when the last queued frames are claimed while the first come back: neither waits for the other
    with transaction() as db:
        release(first, db=db)
        assert len(must_claim("b").frames) == 2

    # then
    assert open_places(job) == ([True], [True])
    assert len(must_claim().frames) == 4


def test_frames_that_come_back_wait_for_who_closes_their_key_and_open_it_again(books: str) -> None:
    # given
    job = submit(account(), 6)
    first = must_claim()

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            must_claim("b", db=db)
            late = thread.submit(release, first)
            until_blocked()
        assert late.result() == 4

    # then
    assert open_places(job) == ([True], [True])
    assert len(must_claim().frames) == 4


@pytest.mark.parametrize("statement", ["open_keys", "open_job_lanes", "open_lanes"])
def test_a_claim_between_any_two_steps_of_giving_back_closes_nothing_for_good(
    books: str, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    job = submit(account(), 6)
    first = must_claim()

    def take_the_rest() -> None:
        must_claim("b")
        retire()

    # when
    with before(statement, take_the_rest, monkeypatch):
        release(first)

    # then
    assert open_places(job) == ([True], [True])
    assert len(must_claim().frames) == 4


@pytest.mark.parametrize("statement", ["close_keys", "close", "close_lanes"])
def test_frames_that_come_back_between_any_two_steps_of_closing_are_claimed(
    books: str, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a job of two keys, one of them closed, the other about to be
    job = submit_keys(account(), [4, 5])
    pack = must_claim()

    with ThreadPoolExecutor(1) as thread:

        def come_back() -> None:
            back = thread.submit(release, pack)
            if statement == "close_lanes":
                until_blocked()  # on the job lane that is about to be closed
            else:
                back.result()

        # when
        with before(statement, come_back, monkeypatch):
            must_claim("b")

    # then
    assert open_places(job) == ([True, False], [True])
    assert len(must_claim().frames) == 1


def test_the_sweep_opens_a_lane_that_holds_work_and_is_not_active(books: str) -> None:
    # given what should never be
    caller = account()
    submit(caller, 1)
    ask("UPDATE lanes SET active = false")
    assert claim() is None

    # when
    with transaction() as db:
        assert queue.reopen_lanes(db) == 1

    # then
    assert len(must_claim().frames) == 1


# ------------------------------------------------------------------------------------------------ extend


def test_extending_moves_the_lease_and_says_what_was_cancelled_and_who_drains(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 1)
    submit(caller, 1)
    pack = must_claim()
    expire(pack)
    with transaction() as db:
        jobs.cancel(db, caller.account_id, job)
    ask(
        "INSERT INTO workers (id, pool, models, device, state) VALUES ('a', 'both', '{alpha}', 'cpu', 'draining')"
    )

    # when
    with transaction() as db:
        answer = queue.extend(db, worker="a", packs=[pack.id])

    # then
    assert answer.packs == {pack.id: {f.id for f in pack.frames if f.job_id == job}}
    assert answer.drain
    assert one("SELECT lease_until > clock_timestamp() FROM packs WHERE id = :p", p=pack.id)


def test_a_pack_that_was_lost_or_is_anothers_is_not_extended(books: str) -> None:
    submit(account(), 2)
    lost, others = must_claim("a", frames=1), must_claim("b", frames=1)
    lose(lost)

    with transaction() as db:
        answer = queue.extend(db, worker="a", packs=[lost.id, others.id])

    assert answer.packs == {}


def test_who_extends_while_the_pack_is_taken_back_has_lost_it(books: str) -> None:
    # given
    submit(account(), 1)
    pack = must_claim()
    expire(pack)

    def extend() -> queue.Extended:
        with transaction() as db:
            return queue.extend(db, worker="a", packs=[pack.id])

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            assert queue.reclaim(db) == 1
            late = thread.submit(extend)
            until_blocked()

        # then
        assert late.result().packs == {}


# ------------------------------------------------------------------------------------------------ settle


def test_settling_writes_frame_image_charge_count_and_event(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 2)
    pack = must_claim()

    # when
    settled = settle(pack)

    # then
    assert settled == Settled(frozenset(f.id for f in pack.frames), frozenset(), frozenset({job}))
    assert statuses(job) == ["done", "done"]
    assert one("SELECT count(*) FROM images WHERE account_id = :a", a=caller.account_id) == 2
    usage = ask("SELECT frame_id, pack_id, quantity, rate, amount, method FROM usage ORDER BY frame_id")
    assert [tuple(u) for u in usage] == [
        (f.id, pack.id, 512 * 512 * 4, Decimal("0.0032"), FRAME, "mpx_step") for f in pack.frames
    ]
    shown = view(caller, job)
    assert (shown.done, shown.charged, shown.held, shown.status) == (2, 2 * FRAME, 0, "finished")
    kinds = [r.kind for r in ask("SELECT kind FROM outbox ORDER BY id")]
    assert kinds == ["job.accepted", "frame.done", "frame.done", "job.finished"]
    assert ask("SELECT outcome, gpu_ms FROM packs") == [("settled", None)]


def test_a_charge_is_exact_whatever_the_size(books: str) -> None:
    # given
    caller = account()
    submit(caller, width=1000, height=520, steps=7)
    submit(caller, model="flat", width=2048, height=2048)

    # when
    settle(must_claim())
    settle(must_claim(models=["flat"]))

    # then
    amounts = [r.amount for r in ask("SELECT amount FROM usage ORDER BY frame_id")]
    assert amounts == [Decimal(1000 * 520 * 7) * Decimal("0.0032") / 2**20, Decimal("0.37")]


def test_settling_is_all_or_nothing(books: str) -> None:
    # given one image whose key is not that of its hash
    job = submit(account(), 3)
    pack = must_claim()
    good = stored(pack)
    bad = [*good[:2], replace(good[2], key=good[2].key.replace(good[2].sha256.hex(), "0" * 64))]

    # when
    with pytest.raises(IntegrityError), transaction() as db:
        queue.settle(db, bad)

    # then
    assert statuses(job) == ["claimed"] * 3
    assert one("SELECT (SELECT count(*) FROM images) + (SELECT count(*) FROM usage)") == 0
    assert settle(pack).done == {f.id for f in pack.frames}


def test_a_worker_that_was_taken_for_lost_books_nothing_and_gets_no_error(books: str) -> None:
    # given
    job = submit(account(), 2)
    late = must_claim("late")
    lose(late)

    # when its frames wait, are somebody else's, and are done
    waiting = settle(late)
    first, second = must_claim("b"), must_claim("b")
    claimed = settle(late)
    settle(first)
    settle(second)
    done = settle(late)

    # then
    assert waiting == claimed == done == NOTHING
    assert one("SELECT count(*) FROM usage") == 2
    assert {r.pack_id for r in ask("SELECT pack_id FROM usage")} == {first.id, second.id}
    assert statuses(job) == ["done", "done"]


def test_of_a_pack_that_lost_some_of_its_frames_the_others_are_booked(books: str) -> None:
    # given
    job = submit(account(), 4)
    pack = must_claim()
    with transaction() as db:
        queue.release(db, [pack.id], frames=[f.id for f in pack.frames[:2]])
    other = must_claim("b")

    # when the worker settles all four nevertheless
    settled = settle(pack)

    # then
    assert settled.done == {f.id for f in pack.frames[2:]}
    assert statuses(job) == ["claimed", "claimed", "done", "done"]
    assert settle(other).done == {f.id for f in pack.frames[:2]}


def test_frames_of_several_packs_are_settled_at_once_each_behind_its_own_fence(books: str) -> None:
    # given
    submit(account(), 8)
    kept, lost = must_claim(), must_claim()
    lose(lost)

    # when
    with transaction() as db:
        settled = queue.settle(db, [*stored(lost), *stored(kept)], gpu_ms={kept.id: 1234})

    # then
    assert settled.done == {f.id for f in kept.frames}
    assert ask("SELECT outcome, gpu_ms FROM packs ORDER BY id") == [("settled", 1234), ("lost", None)]


def test_an_image_of_a_pack_that_gave_its_frame_back_is_not_booked_for_the_pack_that_has_it_now(
    books: str,
) -> None:
    # given a worker that gave one frame back, claimed it again, and still settles what it rendered before
    job = submit(account(), 2)
    before_it = must_claim()
    again, kept = before_it.frames
    with transaction() as db:
        queue.release(db, [before_it.id], frames=[again.id])
    now = must_claim()
    assert [f.id for f in now.frames] == [again.id]

    # when both packs are open and in one settle
    with transaction() as db:
        stale, fresh = stored(before_it, [again]), stored(before_it, [kept])
        settled = queue.settle(db, [*stale, *fresh, *stored(now, [])])
        db.rollback()
    with transaction() as db:
        other = [replace(s, pack_id=now.id) for s in stored(before_it, [kept])]
        both = queue.settle(db, [*stale, *other])

    # then
    assert settled.done == {kept.id}
    assert both == NOTHING
    assert statuses(job) == ["claimed", "claimed"]


def test_a_worker_that_settles_while_its_pack_is_taken_back_books_nothing(books: str) -> None:
    # given
    job = submit(account(), 2)
    pack = must_claim()
    expire(pack)

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            assert queue.reclaim(db) == 1
            late = thread.submit(settle, pack)
            until_blocked()

        # then
        assert late.result() == NOTHING
    assert statuses(job) == ["queued", "queued"]


def test_a_pack_that_is_being_settled_is_not_taken_back(books: str) -> None:
    # given
    job = submit(account(), 2)
    pack = must_claim()
    expire(pack)

    # when
    with transaction() as db:
        settle(pack, db=db)
        with transaction() as other:
            assert queue.reclaim(other) == 0

    # then
    assert statuses(job) == ["done", "done"]


def test_settling_twice_books_once(books: str) -> None:
    caller = account()
    job = submit(caller, 2)
    pack = must_claim()

    assert len(settle(pack).done) == 2
    assert settle(pack) == NOTHING

    assert view(caller, job).charged == 2 * FRAME
    assert one("SELECT count(*) FROM usage") == 2


def test_a_pack_of_which_two_settle_parts_at_once_is_closed(books: str) -> None:
    # given
    submit(account(), 2)
    pack = must_claim()

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            settle(pack, pack.frames[:1], db=db)
            late = thread.submit(settle, pack, pack.frames[1:])
            until_blocked()
        assert len(late.result().done) == 1

    # then: or its worker would count as busy until the lease runs out
    assert one("SELECT outcome FROM packs") == "settled"


def test_a_pack_settled_while_its_other_frames_come_back_is_closed(books: str) -> None:
    # given
    submit(account(), 2)
    pack = must_claim()

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            queue.fail(db, pack.id, "not this one", frames=[pack.frames[0].id])
            late = thread.submit(settle, pack, pack.frames[1:])
            until_blocked()
        assert len(late.result().done) == 1

    # then
    assert one("SELECT outcome FROM packs") == "settled"


def test_settling_the_same_frames_twice_at_once_books_once(books: str) -> None:
    # given
    submit(account(), 2)
    pack = must_claim()

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            first = settle(pack, db=db)
            second = thread.submit(settle, pack)
            until_blocked()

        # then
        assert (len(first.done), len(second.result().done)) == (2, 0)


def test_a_pack_is_open_until_its_last_frame_is_settled(books: str) -> None:
    # given
    submit(account(), 3)
    pack = must_claim()

    # then
    settle(pack, pack.frames[:1])
    assert one("SELECT closed_at IS NULL FROM packs")
    settle(pack, pack.frames[1:])
    assert one("SELECT closed_at IS NOT NULL FROM packs")


def test_frames_with_equal_bytes_share_one_image_inside_an_account(books: str) -> None:
    # given
    first, second = account("first"), account("second")
    submit(first, 2)
    submit(second, 2)
    pack = must_claim()
    assert len(pack.frames) == 4

    # when
    with transaction() as db:
        settled = queue.settle(db, stored(pack, content=b"the same bytes"))

    # then
    assert len(settled.done) == 4
    images = ask("SELECT account_id, count(DISTINCT image_id), count(*) FROM frames GROUP BY account_id")
    assert sorted(tuple(r)[1:] for r in images) == [(1, 2), (1, 2)]
    assert one("SELECT count(*) FROM images") == 2
    assert one("SELECT count(*) FROM usage") == 4


def test_two_that_settle_equal_bytes_at_once_share_the_image(books: str) -> None:
    # given
    submit(account(), 2)
    first, second = must_claim(frames=1), must_claim(frames=1)

    def settle_second() -> Settled:
        with transaction() as db:
            return queue.settle(db, stored(second, content=b"the same bytes"))

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            queue.settle(db, stored(first, content=b"the same bytes"))
            late = thread.submit(settle_second)
            until_blocked()

        # then
        assert len(late.result().done) == 1
    assert one("SELECT count(*) FROM images") == 1


def test_a_cancel_that_comes_while_frames_are_settled_comes_too_late_for_them(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 3)
    pack = must_claim(frames=2)

    def cancel() -> None:
        with transaction() as db:
            jobs.cancel(db, caller.account_id, job)

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            settled = settle(pack, db=db)
            late = thread.submit(cancel)
            until_blocked()
        late.result()

    # then
    shown = view(caller, job)
    assert len(settled.done) == 2
    assert (shown.status, shown.done, shown.cancelled, shown.charged) == ("cancelled", 2, 1, 2 * FRAME)


def test_frames_settled_while_their_job_is_cancelled_wait_for_it_and_are_not_billed(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 2)
    pack = must_claim()

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            jobs.cancel(db, caller.account_id, job)
            db.flush()
            late = thread.submit(settle, pack)
            until_blocked()

        # then
        assert late.result() == Settled(frozenset(), frozenset(f.id for f in pack.frames), frozenset({job}))
    assert statuses(job) == ["cancelled", "cancelled"]
    assert one("SELECT count(*) FROM usage") == 0
    assert one("SELECT count(*) FROM images") == 0
    shown = view(caller, job)
    assert (shown.charged, shown.held, shown.cancelled) == (0, 0, 2)
    assert shown.ended_at is not None


def test_a_cancelled_frame_and_a_done_one_of_equal_bytes_are_kept_apart(books: str) -> None:
    # given two jobs in one pack, one of them cancelled
    caller = account()
    kept, gone = submit(caller), submit(caller)
    pack = must_claim()
    with transaction() as db:
        jobs.cancel(db, caller.account_id, gone)

    # when
    with transaction() as db:
        queue.settle(db, stored(pack, content=b"the same bytes"))

    # then
    assert (statuses(kept), statuses(gone)) == (["done"], ["cancelled"])
    assert one("SELECT count(*) FROM usage") == 1


def test_the_last_of_two_that_settle_at_once_finishes_the_job(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 2)
    first, second = must_claim(frames=1), must_claim(frames=1)

    # when
    with transaction() as one_db, transaction() as other_db:
        settle(first, db=one_db)
        settle(second, db=other_db)
    for pack in (first, second):
        with transaction() as db:
            queue.finish(db, [f.job_id for f in pack.frames])

    # then once
    assert view(caller, job).status == "finished"
    assert one("SELECT count(*) FROM outbox WHERE kind = 'job.finished'") == 1


def test_a_paused_job_finishes_when_what_was_on_a_device_was_all_of_it(books: str) -> None:
    caller = account()
    job = submit(caller, 2)
    pack = must_claim()
    with transaction() as db:
        jobs.pause(db, caller.account_id, job)

    settle(pack)

    assert view(caller, job).status == "finished"


def test_settling_nothing_is_nothing(books: str) -> None:
    with transaction() as db:
        assert queue.settle(db, []) == NOTHING


# ------------------------------------------------------------------------------------------------ come back


def test_a_frame_is_blamed_only_when_it_took_its_pack_down_alone(books: str) -> None:
    # given
    job = submit(account(), 3)

    # when three fail together, and then one of them alone
    assert fail(must_claim()) == 3
    together = ask("SELECT attempts, suspect FROM frames WHERE job_id = :j ORDER BY id", j=job)
    fail(must_claim())
    alone = ask("SELECT attempts, suspect FROM frames WHERE job_id = :j ORDER BY id", j=job)

    # then
    assert together == [(0, True)] * 3
    assert alone == [(1, True), (0, True), (0, True)]


@pytest.mark.parametrize("take_down", [fail, lose])
def test_a_frame_that_took_three_packs_down_alone_fails_with_the_reason(
    books: str, take_down: Callable[[ClaimedPack], int]
) -> None:
    # given
    caller = account()
    job = submit(caller, 1)

    # when
    for _ in range(3):
        assert statuses(job) == ["queued"]
        take_down(must_claim())
    with transaction() as db:
        queue.finish(db, [job])

    # then
    assert statuses(job) == ["failed"]
    reason = (
        "it would not render"
        if take_down is fail
        else "the worker was lost while it rendered this frame alone"
    )
    assert one("SELECT reason FROM frames") == reason
    shown = view(caller, job)
    assert (shown.status, shown.failed, shown.charged, shown.held) == ("finished", 1, 0, 0)
    event = ask("SELECT data FROM outbox WHERE kind = 'frame.failed'")
    assert [r.data for r in event] == [{"index": 0, "reason": reason}]
    assert claim() is None


def test_a_frame_whose_worker_could_not_reach_a_restarted_database_is_not_blamed(books: str) -> None:
    # given
    submit(account(), 1)
    pack = must_claim()
    ask("UPDATE packs SET claimed_at = pg_postmaster_start_time() - interval '1 second'")

    # when
    lose(pack)

    # then
    assert ask("SELECT attempts, suspect, status FROM frames") == [(0, True, "queued")]


def test_a_key_that_two_claims_left_open_is_closed_by_the_next_that_finds_nothing(books: str) -> None:
    # given what two claims leave that take a key's last frames at the same moment
    job = submit(account(), 1)
    pack = must_claim()
    ask("UPDATE job_keys SET open = true")
    ask("UPDATE job_lanes SET open = true")

    # when
    assert claim() is None

    # then
    assert ask("SELECT open FROM job_keys UNION ALL SELECT open FROM job_lanes") == [(False,), (False,)]
    fail(pack)
    assert must_claim().frames[0].job_id == job


def test_one_bad_frame_fails_alone_and_its_neighbours_are_done_without_blame(books: str) -> None:
    # given the frame of index 2 takes down every pack it is in
    caller = account()
    job = submit(caller, 4)

    # when
    packs = 0
    while (pack := claim()) is not None:
        packs += 1
        assert packs < 20
        if any(f.index == 2 for f in pack.frames):
            fail(pack)
        else:
            settle(pack)

    # then
    assert statuses(job) == ["done", "done", "failed", "done"]
    assert [r.attempts for r in ask("SELECT attempts FROM frames ORDER BY id")] == [0, 0, 3, 0]
    assert view(caller, job).charged == 3 * FRAME


def test_a_released_frame_carries_no_blame_and_is_no_suspect(books: str) -> None:
    # given
    job = submit(account(), 1)

    # when more often than a frame may fail
    for _ in range(5):
        assert release(must_claim()) == 1

    # then
    assert ask("SELECT status, attempts, suspect FROM frames WHERE job_id = :j", j=job) == [
        ("queued", 0, False)
    ]


def test_a_suspect_that_is_released_stays_one(books: str) -> None:
    submit(account(), 2)
    fail(must_claim())

    release(must_claim())

    assert len(must_claim().frames) == 1
    assert one("SELECT sum(attempts) FROM frames") == 0


def test_frames_named_in_a_failure_come_back_and_the_others_are_kept(books: str) -> None:
    # given
    job = submit(account(), 3)
    pack = must_claim()

    # when
    with transaction() as db:
        queue.fail(db, pack.id, "not this one", frames=[pack.frames[1].id])

    # then
    assert statuses(job) == ["claimed", "queued", "claimed"]
    assert one("SELECT attempts FROM frames WHERE index = 1") == 0
    settle(pack)
    assert statuses(job) == ["done", "queued", "done"]


def test_the_last_frame_left_of_a_larger_pack_is_not_blamed_for_it(books: str) -> None:
    # given it was rendered together with others
    submit(account(), 2)
    pack = must_claim()
    settle(pack, pack.frames[:1])

    # when
    lose(pack)

    # then
    assert one("SELECT attempts FROM frames WHERE status = 'queued'") == 0


def test_failing_or_releasing_too_late_is_left_out(books: str) -> None:
    # given
    job = submit(account(), 1)
    late = must_claim("late")
    lose(late)
    pack = must_claim("b")

    # when
    came_back = (fail(late), release(late))

    # then
    assert came_back == (0, 0)
    assert statuses(job) == ["claimed"]
    assert one("SELECT attempts FROM frames") == 1
    assert len(settle(pack).done) == 1


def test_a_lease_that_has_not_run_out_is_not_taken_back(books: str) -> None:
    submit(account(), 1)
    must_claim()

    with transaction() as db:
        assert queue.reclaim(db) == 0


@pytest.mark.parametrize("give_back", BACK)
def test_frames_of_a_cancelled_job_that_come_back_end_as_cancelled(
    books: str, give_back: Callable[[ClaimedPack], int]
) -> None:
    # given
    caller = account()
    job = submit(caller, 2)
    pack = must_claim()
    with transaction() as db:
        jobs.cancel(db, caller.account_id, job)

    # when
    give_back(pack)
    sweep.tidy()

    # then
    assert statuses(job) == ["cancelled", "cancelled"]
    shown = view(caller, job)
    assert (shown.cancelled, shown.charged, shown.held) == (2, 0, 0)
    assert shown.ended_at is not None
    assert one("SELECT count(*) FROM packs WHERE closed_at IS NULL") == 0


def test_a_job_cancelled_while_its_frames_come_back_has_none_left(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 2)
    pack = must_claim()

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            jobs.cancel(db, caller.account_id, job)
            db.flush()
            late = thread.submit(release, pack)
            until_blocked()
        late.result()

    # then
    assert statuses(job) == ["cancelled", "cancelled"]


def test_frames_of_a_paused_job_that_come_back_wait_for_it_to_be_resumed(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 2)
    pack = must_claim()
    with transaction() as db:
        jobs.pause(db, caller.account_id, job)
    release(pack)
    assert claim() is None
    retire()

    # when
    with transaction() as db:
        jobs.resume(db, caller.account_id, job)

    # then
    assert len(must_claim().frames) == 2


def test_a_job_resumed_while_its_frames_come_back_is_claimed(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 2)
    pack = must_claim()
    with transaction() as db:
        jobs.pause(db, caller.account_id, job)
    retire()

    def resume() -> None:
        with transaction() as db:
            jobs.resume(db, caller.account_id, job)

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            release(pack, db=db)
            late = thread.submit(resume)
            until_blocked()
        late.result()

    # then
    assert len(must_claim().frames) == 2


def test_frames_that_come_back_while_their_job_is_resumed_are_claimed(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 2)
    pack = must_claim()
    with transaction() as db:
        jobs.pause(db, caller.account_id, job)
    retire()

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            jobs.resume(db, caller.account_id, job)
            late = thread.submit(release, pack)
            until_blocked()
        late.result()

    # then
    assert len(must_claim().frames) == 2


# ------------------------------------------------------------------------------------------------ many


def test_workers_that_claim_settle_and_fail_at_once_leave_the_books_right(books: str) -> None:
    # given three accounts whose frames share keys, and workers that do not behave
    callers = [account(f"acme{n}", weight=n + 1) for n in range(3)]
    made = [submit(c, 20, steps=4 + n % 2, priority=p) for c in callers for n, p in enumerate((1, 5, 9))]

    def work(number: int) -> int:
        turns = 0
        while (pack := claim(f"worker{number}")) is not None:
            turns += 1
            assert turns < 500
            if turns % 5 == number:
                release(pack)
            elif turns % 7 == number:
                fail(pack)
            else:
                settle(pack)
        return turns

    # when: a deadlock would be raised here
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, n) for n in range(4)]:
            done.result()
    while (pack := claim()) is not None:
        settle(pack)
    for _ in range(2):
        sweep.tidy()

    # then
    ended = Counter(r.status for r in ask("SELECT status FROM frames"))
    assert ended["done"] + ended["failed"] == 20 * len(made)
    assert one("SELECT count(*) FROM jobs WHERE ended_at IS NULL") == 0
    assert active_lanes() == []
    asking = [caller for caller in callers for _ in range(3)]
    charged = sum(view(caller, job).charged for caller, job in zip(asking, made, strict=True))
    with transaction() as db:
        billed = sum(line.amount for c in callers for line in ledger.usage_lines(db, c.account_id))
    assert charged == billed == one("SELECT sum(amount) FROM usage")


# ------------------------------------------------------------------------------------------------ plans


def _scans(plan: dict[str, Any]) -> list[tuple[str, str, str, float]]:
    """Of a plan's nodes that ran: kind, table, index and loops."""
    mine = [
        (plan["Node Type"], plan.get("Relation Name", ""), plan.get("Index Name", ""), plan["Actual Loops"])
    ]
    return mine + [scan for child in plan.get("Plans", []) for scan in _scans(child)]


@pytest.fixture
def crowd(books: str) -> None:
    """50,000 queued frames: 25 accounts, 2,000 each, in 25 keys."""
    for n in range(25):
        submit(account(f"crowd{n}"), steps=4 + n, priority=(1, 5, 9)[n % 3])
    ask(
        "INSERT INTO frames (id, job_id, index, key_no, account_id, status, seed, work, quantity, price_id,"
        " fingerprint, spec) SELECT (left(id::text, 30) || lpad(to_hex(n + 1), 6, '0'))::uuid, job_id, n, key_no,"
        " account_id, status, n, work, quantity, price_id, fingerprint, spec"
        " FROM frames, generate_series(1, 1999) AS n"
    )
    ask("UPDATE jobs SET frames = 2000, quoted = 2000 * quoted, held = 2000 * held")
    for table in ("frames", "jobs", "job_keys", "job_lanes", "lanes", "packs", "prices", "accounts"):
        ask(f"ANALYZE {table}")


def test_claiming_of_many_frames_reads_the_indexes_it_names_and_one_partition(crowd: None) -> None:
    # given
    month = one("SELECT to_char(now(), '\"frames_\"YYYY_MM')")
    values: dict[str, Any] = {
        "models": ["alpha"],
        "ageing": True,
        "ageing_s": 60.0,
        "above": -1,
        "warm": None,
        "suspects": True,
        "lanes": queue.NEAREST,
    }
    rest = {"alone": False, "frames": 8, "worker": "a", "lease_s": 60.0, "engine": None, "shared": False}

    def plan(name: str, values: dict[str, Any]) -> list[tuple[str, str, str, float]]:
        """The plan as it ran, rolled back."""
        with transaction() as db:
            explain = text(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, FORMAT JSON) {sql(name).text}")
            ((found,),) = db.execute(explain, values).tuples().all()
            db.rollback()
        return _scans((json.loads(found) if isinstance(found, str) else found)[0]["Plan"])

    with transaction() as db:
        head = db.execute(sql("head"), values).one()
        db.rollback()
    facts = head._asdict()
    claiming = {k: facts[k] for k in ("model", "priority", "account_id", "call_key", "frame_id", "work")}

    # when
    plans = {
        "head": plan("head", values),
        "claim": plan("claim", {**claiming, **rest, "above": -1}),
    }

    # then
    for name, nodes in plans.items():
        on_frames = [n for n in nodes if n[1].startswith("frames") and n[3] > 0]
        assert not [n for n in on_frames if n[0] == "Seq Scan"], name
        assert {n[1] for n in on_frames if n[0] != "ModifyTable"} == {month}, name
        queued_idx = f"{month}_job_id_key_no_id_idx"  # frames_queued_idx, as the partition calls it
        assert queued_idx in {n[2] for n in nodes if n[3] > 0}, name
        assert "frames_queued_idx" in (SQL / f"{name}.sql").read_text()


def test_claiming_and_settling_over_and_over_never_reads_a_whole_table(crowd: None) -> None:
    # given statements run often enough to be planned without their values
    read = (
        "SELECT coalesce(sum(seq_tup_read), 0) AS by_scan, coalesce(sum(idx_tup_fetch), 0) AS by_index"
        " FROM pg_stat_xact_user_tables WHERE relname LIKE 'frames%'"
    )

    # when
    rounds = 15
    with transaction() as db:
        for n in range(rounds):
            settle(must_claim(f"worker{n}", db=db), db=db)
        found = db.execute(text(read)).one()
        db.rollback()

    # then
    assert found.by_scan == 0
    assert found.by_index < rounds * 400  # 4 frames a round, and their triggers
