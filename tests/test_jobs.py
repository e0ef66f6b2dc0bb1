"""Jobs: submit, find, list, and the verbs on a whole job."""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest
from pydantic import ValidationError
from sqlalchemy import text

from farm import ids, jobs, queue, submissions, sweep
from farm.db import transaction
from farm.errors import Conflict, Gone, Invalid, NotFound
from farm.queue import FrameStatus
from farm.settings import settings
from farm.spec import MAX_SEED
from tests.factories import (
    CATALOG,
    FRAME,
    account,
    ask,
    claim,
    fail,
    must_claim,
    one,
    settle,
    statuses,
    submission,
    submit,
    submit_keys,
    until_blocked,
    view,
)

EVERYTHING = (
    "SELECT (SELECT count(*) FROM jobs) + (SELECT count(*) FROM frames) + (SELECT count(*) FROM outbox)"
)


def sha(body: str) -> bytes:
    return hashlib.sha256(body.encode()).digest()


def pause(caller: Any, job: UUID) -> None:
    with transaction() as db:
        jobs.pause(db, caller.account_id, job)


def cancel(caller: Any, job: UUID) -> None:
    with transaction() as db:
        jobs.cancel(db, caller.account_id, job)


# ------------------------------------------------------------------------------------------------ submit


def test_a_job_is_stored_with_its_frames_keys_lanes_hold_and_event(books: str) -> None:
    # given
    caller = account()

    # when
    job = submit_keys(caller, [4, 4, 8])

    # then frames 0 and 1 share a key
    assert statuses(job) == ["queued"] * 3
    assert [tuple(r) for r in ask("SELECT index, key_no FROM frames ORDER BY id")] == [(0, 0), (1, 0), (2, 1)]
    assert [r.id for r in ask("SELECT id FROM frames ORDER BY id")] == [
        ids.frame_id(job, k) for k in range(3)
    ]
    shown = view(caller, job)
    assert (shown.status, shown.frames, shown.queued) == ("queued", 3, 3)
    assert shown.quoted == shown.held == 4 * FRAME
    assert [tuple(r) for r in ask("SELECT kind, job_id, data FROM outbox")] == [
        ("job.accepted", job, {"frames": 3, "priority": 5})
    ]


def test_frames_of_a_job_of_several_models_are_claimed_for_each(books: str) -> None:
    caller = account()
    specs = [{"prompt": "x", "model": m} for m in ("alpha", "beta", "alpha")]
    with transaction() as db:
        job, _ = submissions.submit(db, caller, submissions.Submission(specs=specs), models=CATALOG)
        assert jobs.models_of(db, job) == ["alpha", "beta"]

    assert [f.index for f in must_claim(models=["alpha"]).frames] == [0, 2]
    assert [f.index for f in must_claim(models=["beta"]).frames] == [1]


def test_seeds_count_up_from_the_one_asked_for(books: str) -> None:
    submit(account(), 4, seed=41)

    assert [r.seed for r in ask("SELECT seed FROM frames ORDER BY index")] == [41, 42, 43, 44]


def test_seeds_go_round_the_end_to_nought(books: str) -> None:
    submit(account(), 3, seed=MAX_SEED - 1)

    assert [r.seed for r in ask("SELECT seed FROM frames ORDER BY index")] == [2**63 - 2, 2**63 - 1, 0]


def test_a_seed_that_is_left_out_is_drawn_once_a_job(books: str) -> None:
    caller = account()
    jobs_made = [submit(caller, 2, seed=None) for _ in range(3)]

    first = [
        r.seed
        for job in jobs_made
        for r in ask("SELECT min(seed) AS seed FROM frames WHERE job_id = :j", j=job)
    ]
    assert len(set(first)) == 3
    assert one("SELECT bool_and(seed >= 0) FROM frames")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"width": 100}, "spec.width"),
        ({"height": 4096}, "spec.height"),
        ({"steps": 0}, "spec.steps"),
        ({"guidance": 31.0}, "spec.guidance"),
        ({"sampler": "flow-euler"}, "spec.sampler"),
        ({"model": "unknown"}, "spec.model"),
        ({"count": 10_001}, "spec.count"),
        ({"model": "flux", "sampler": "euler", "negative_prompt": "x"}, "spec.negative_prompt"),
    ],
)
def test_a_spec_that_is_not_allowed_is_refused_by_field_and_nothing_is_stored(
    books: str, body: dict[str, Any], field: str
) -> None:
    caller = account()

    with pytest.raises(Invalid) as refusal:
        submit(caller, **body)

    assert [f.field for f in refusal.value.faults] == [field]
    assert one(EVERYTHING) == 0


def test_the_faults_of_every_spec_are_named_at_once(books: str) -> None:
    specs = [
        {"prompt": "x", "model": "alpha", **bad} for bad in ({"steps": 0, "width": 7}, {}, {"model": "none"})
    ]

    with pytest.raises(Invalid) as refusal, transaction() as db:
        submissions.submit(db, account(), submissions.Submission(specs=specs), models=CATALOG)

    assert [f.field for f in refusal.value.faults] == ["specs[0].width", "specs[0].steps", "specs[2].model"]
    assert one(EVERYTHING) == 0


def test_a_submission_has_no_more_frames_than_allowed_in_all_its_specs(books: str) -> None:
    specs = [{"prompt": "x", "model": "alpha", "count": settings().max_count // 2 + 1}] * 2

    with pytest.raises(Invalid) as refusal, transaction() as db:
        submissions.submit(db, account(), submissions.Submission(specs=specs), models=CATALOG)

    assert [f.field for f in refusal.value.faults] == ["specs[1].count"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"spec": {"prompt": "x"}, "specs": [{"prompt": "x"}]},
        {"specs": []},
        {"spec": {"prompt": "x"}, "priority": 10},
        {"spec": {"prompt": "x"}, "priority": "soon"},
        {"spec": {"prompt": "x"}, "priority": True},
        {"spec": {"prompt": "x"}, "name": ""},
        {"spec": {"prompt": "x"}, "name": "a\x00b"},
        {"spec": {"prompt": "x"}, "unknown": 1},
        {"spec": {"prompt": ""}},
        {"spec": {"prompt": "a\x00b"}},
        {"spec": {"prompt": "x", "seed": -1}},
        {"spec": {"prompt": "x", "seed": 2**63}},
        {"spec": {"prompt": "x", "width": "512"}},
        {"spec": {"prompt": "x", "guidance": float("nan")}},
        {"spec": {"prompt": "x", "count": 0}},
        {"spec": {"prompt": "x", "format": "gif"}},
    ],
)
def test_a_body_that_is_no_submission_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        submissions.Submission.model_validate(body)


@pytest.mark.parametrize(("name", "number"), [("urgent", 9), ("standard", 5), ("bulk", 1), (0, 0), (7, 7)])
def test_a_priority_is_a_name_or_a_number(name: Any, number: int) -> None:
    assert submission(priority=name).priority == number


def test_a_surrogate_or_a_quote_in_a_prompt_is_kept_as_it_came(books: str) -> None:
    prompt = 'héllo \\ "x" \t {} \U0001f600 %s :name'

    submit(account(), prompt=prompt)

    assert must_claim().frames[0].spec.prompt == prompt


# ------------------------------------------------------------------------------------------------ once


def test_the_same_key_and_body_is_the_same_job(books: str) -> None:
    caller = account()
    answers = []
    for _ in range(2):
        with transaction() as db:
            answers.append(
                submissions.submit(
                    db, caller, submission(), idempotency_key="k", body_sha256=sha("a"), models=CATALOG
                )
            )

    assert [accepted for _, accepted in answers] == [True, False]
    assert answers[0][0] == answers[1][0]
    assert one("SELECT count(*) FROM jobs") == 1


def test_the_same_key_with_another_body_is_refused_and_stores_nothing(books: str) -> None:
    caller = account()
    with transaction() as db:
        submissions.submit(
            db, caller, submission(), idempotency_key="k", body_sha256=sha("a"), models=CATALOG
        )

    with pytest.raises(Invalid, match="another body"), transaction() as db:
        submissions.submit(
            db, caller, submission(), idempotency_key="k", body_sha256=sha("b"), models=CATALOG
        )

    assert one("SELECT count(*) FROM jobs") == 1


def test_accounts_do_not_share_idempotency_keys(books: str) -> None:
    for caller in (account("one"), account("other")):
        with transaction() as db:
            submissions.submit(
                db, caller, submission(), idempotency_key="k", body_sha256=sha("a"), models=CATALOG
            )

    assert one("SELECT count(*) FROM jobs") == 2


def test_a_refused_submission_does_not_use_up_its_key(books: str) -> None:
    caller = account()
    with pytest.raises(Invalid), transaction() as db:
        submissions.submit(
            db, caller, submission(steps=0), idempotency_key="k", body_sha256=sha("a"), models=CATALOG
        )

    with transaction() as db:
        _, accepted = submissions.submit(
            db, caller, submission(), idempotency_key="k", body_sha256=sha("b"), models=CATALOG
        )

    assert accepted


def test_fifty_at_once_with_one_key_make_one_job_and_get_equal_answers(
    books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    caller = account()

    def post(_: int) -> tuple[UUID, bool]:
        with transaction() as db:
            return submissions.submit(
                db, caller, submission(count=3), idempotency_key="k", body_sha256=sha("a"), models=CATALOG
            )

    # when: ten at a time, as many as the process has connections
    with ThreadPoolExecutor(settings().pool_size) as threads:
        answers = list(threads.map(post, range(50)))

    # then
    assert len({job for job, _ in answers}) == 1
    assert sum(accepted for _, accepted in answers) == 1
    assert one("SELECT count(*) FROM frames") == 3


def test_a_key_that_is_being_used_just_now_is_a_conflict(books: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # given a wait shorter than in earnest
    caller = account()
    monkeypatch.setattr(submissions, "text", lambda s: text(s.replace("'5s'", "'20ms'")))

    with transaction() as db:
        submissions.submit(
            db, caller, submission(), idempotency_key="k", body_sha256=sha("a"), models=CATALOG
        )
        with pytest.raises(Conflict, match="being worked on"), transaction() as other:
            submissions.submit(
                other, caller, submission(), idempotency_key="k", body_sha256=sha("a"), models=CATALOG
            )


# ------------------------------------------------------------------------------------------------ look


def facts(caller: Any, job: UUID) -> tuple[Any, ...]:
    v = view(caller, job)
    return v.status, v.queued, v.running, v.done, v.failed, v.cancelled, v.charged / FRAME, v.held / FRAME


@pytest.mark.parametrize("tidy", [False, True], ids=["before the sweep", "after it"])
def test_a_job_shows_its_counts_charges_and_hold_at_each_stage(books: str, tidy: bool) -> None:
    # given
    caller = account()
    job = submit(caller, 6)

    def shown() -> tuple[Any, ...]:
        if tidy:
            sweep.tidy()
        return facts(caller, job)

    # then: status, queued, running, done, failed, cancelled, charged, held
    assert shown() == ("queued", 6, 0, 0, 0, 0, 0, 6)
    pack = must_claim()
    assert shown() == ("running", 2, 4, 0, 0, 0, 0, 6)
    settle(pack, pack.frames[:3])
    assert shown() == ("running", 2, 1, 3, 0, 0, 3, 3)
    fail(pack)
    assert shown() == ("running", 3, 0, 3, 0, 0, 3, 3)
    pause(caller, job)
    assert shown() == ("paused", 3, 0, 3, 0, 0, 3, 3)
    with transaction() as db:
        jobs.resume(db, caller.account_id, job)
    for _ in range(3):
        bad = must_claim(frames=1)
        while bad.frames[0].index != 3:
            settle(bad)
            bad = must_claim(frames=1)
        fail(bad)
    assert facts(caller, job)[4] == 1
    while (rest := claim()) is not None:
        settle(rest)
    assert shown()[1:] == (0, 0, 5, 1, 0, 5, 0)
    sweep.tidy()
    assert shown() == ("finished", 0, 0, 5, 1, 0, 5, 0)


def test_a_cancelled_job_shows_its_frames_as_cancelled_before_they_are(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 5)
    pack = must_claim(frames=3)
    settle(pack, pack.frames[:1])

    # when
    cancel(caller, job)

    # then
    assert facts(caller, job) == ("cancelled", 0, 0, 1, 0, 4, 1, 4)
    with transaction() as db:
        shown = [jobs.shown_status(f, True) for f in jobs.frames_of(db, job)]
    assert shown == ["done"] + ["cancelled"] * 4

    # and after the sweep the same, with the hold of what was queued lowered
    sweep.tidy()
    assert facts(caller, job) == ("cancelled", 0, 0, 1, 0, 4, 1, 2)
    settle(pack)
    sweep.tidy()
    assert facts(caller, job) == ("cancelled", 0, 0, 1, 0, 4, 1, 0)
    assert view(caller, job).ended_at is not None


def test_another_accounts_job_is_not_found_by_any_verb(books: str) -> None:
    # given
    mine, other = account("mine"), account("other")
    job = submit(mine)
    verbs: list[Callable[[Any, UUID], object]] = [
        lambda db, a: jobs.find(db, a, job),
        lambda db, a: jobs.cancel(db, a, job),
        lambda db, a: jobs.pause(db, a, job),
        lambda db, a: jobs.resume(db, a, job),
        lambda db, a: jobs.reprioritise(db, a, job, 9),
        lambda db, a: jobs.find_frame(db, a, ids.frame_id(job, 0)),
    ]

    # then it answers like one that does not exist
    for verb in verbs:
        with pytest.raises(NotFound), transaction() as db:
            verb(db, other.account_id)
    with transaction() as db:
        assert jobs.every(db, other.account_id) == []
        assert jobs.every(db, other.account_id, key="k") == []
    with pytest.raises(NotFound), transaction() as db:
        jobs.find(db, mine.account_id, ids.new_id(0))
    assert view(mine, job).status == "queued"


def test_jobs_are_listed_newest_first_in_pages(books: str) -> None:
    caller = account()
    made = [submit(caller) for _ in range(5)]

    with transaction() as db:
        first = jobs.every(db, caller.account_id, limit=2)
        rest = jobs.every(db, caller.account_id, before=first[-1].id)

    assert [j.id for j in [*first, *rest]] == made[::-1]


def test_a_job_is_found_by_its_idempotency_key(books: str) -> None:
    caller = account()
    submit(caller)
    with transaction() as db:
        job, _ = submissions.submit(
            db, caller, submission(), idempotency_key="k", body_sha256=sha("a"), models=CATALOG
        )

    with transaction() as db:
        assert [j.id for j in jobs.every(db, caller.account_id, key="k")] == [job]


def test_frames_are_listed_in_order_from_an_index_and_by_status(books: str) -> None:
    caller = account()
    job = submit(caller, 6)
    submit(caller, 3)
    settle(must_claim())

    with transaction() as db:
        later = jobs.frames_of(db, job, first=2, limit=3)
        queued = jobs.frames_of(db, job, status=FrameStatus.QUEUED)

    assert [f.index for f in later] == [2, 3, 4]
    assert [f.index for f in queued] == [4, 5]


def test_an_image_is_there_when_its_frame_is_done(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 2)
    settle(must_claim(frames=1))

    with transaction() as db:
        done, queued = jobs.frames_of(db, job)

        # then
        assert jobs.image_of(db, done).account_id == caller.account_id
        with pytest.raises(Conflict, match="it is queued"):
            jobs.image_of(db, queued)


def test_a_frame_that_ended_without_an_image_is_gone(books: str) -> None:
    caller = account()
    job = submit(caller)
    cancel(caller, job)
    sweep.tidy()

    with transaction() as db, pytest.raises(Gone, match="ended as cancelled"):
        jobs.image_of(db, jobs.frames_of(db, job)[0])


# ------------------------------------------------------------------------------------------------ verbs


def test_verbs_on_a_finished_job_are_a_conflict(books: str) -> None:
    caller = account()
    job = submit(caller)
    settle(must_claim())
    verbs: list[Callable[..., object]] = [jobs.cancel, jobs.pause, jobs.resume]

    for verb in verbs:
        with pytest.raises(Conflict, match="finished"), transaction() as db:
            verb(db, caller.account_id, job)
    with pytest.raises(Conflict, match="finished"), transaction() as db:
        jobs.reprioritise(db, caller.account_id, job, 9)


def test_verbs_on_a_cancelled_job_are_a_conflict_but_cancelling_it_again_is_not(books: str) -> None:
    caller = account()
    job = submit(caller)
    cancel(caller, job)
    verbs: list[Callable[..., object]] = [jobs.pause, jobs.resume]

    for verb in verbs:
        with pytest.raises(Conflict, match="cancelled"), transaction() as db:
            verb(db, caller.account_id, job)
    cancel(caller, job)

    assert one("SELECT count(*) FROM outbox WHERE kind = 'job.cancelled'") == 1


def test_a_verb_that_changes_nothing_tells_nothing(books: str) -> None:
    caller = account()
    job = submit(caller)
    pause(caller, job)
    pause(caller, job)
    with transaction() as db:
        assert jobs.resume(db, caller.account_id, job) == ["alpha"]
    with transaction() as db:
        assert jobs.resume(db, caller.account_id, job) == []
        assert jobs.reprioritise(db, caller.account_id, job, 5) == []

    kinds = [r.kind for r in ask("SELECT kind FROM outbox ORDER BY id")]
    assert kinds == ["job.accepted", "job.paused", "job.resumed"]


def test_a_paused_job_that_is_reprioritised_wakes_nobody_until_it_is_resumed(books: str) -> None:
    caller = account()
    job = submit(caller, priority="bulk")
    pause(caller, job)

    with transaction() as db:
        assert jobs.reprioritise(db, caller.account_id, job, 9) == []
    with transaction() as db:
        assert jobs.resume(db, caller.account_id, job) == ["alpha"]

    assert must_claim().priority == 9


def test_a_verb_on_a_job_of_many_frames_takes_less_than_50_ms_and_touches_no_frame(books: str) -> None:
    # given
    caller = account()
    job = submit(caller, 10_000)
    touched = "SELECT sum(n_tup_upd) FROM pg_stat_xact_user_tables WHERE relname LIKE 'frames%'"
    verbs: list[Callable[[Any], object]] = [
        *[
            lambda db: jobs.pause(db, caller.account_id, job),
            lambda db: jobs.resume(db, caller.account_id, job),
        ]
        * 10,
        lambda db: jobs.reprioritise(db, caller.account_id, job, 9),
        lambda db: jobs.cancel(db, caller.account_id, job),
    ]

    # when
    spent = []
    for verb in verbs:
        with transaction() as db:
            began = time.monotonic()
            verb(db)
            db.flush()
            spent.append(time.monotonic() - began)
            assert db.scalar(text(touched)) == 0

    # then: the best of them, as other work may be at this machine
    assert min(spent) < 0.05


def test_cancelling_twice_at_once_is_told_once(books: str) -> None:
    caller = account()
    job = submit(caller)
    with ThreadPoolExecutor(1) as thread:
        with transaction() as db:
            jobs.cancel(db, caller.account_id, job)
            db.flush()
            late = thread.submit(cancel, caller, job)
            until_blocked()
        late.result()

    assert one("SELECT count(*) FROM outbox WHERE kind = 'job.cancelled'") == 1


def test_a_job_that_finishes_while_it_is_paused_stays_finished(books: str) -> None:
    # given all frames done, and the end not written yet
    caller = account()
    job = submit(caller)
    with transaction() as db:
        settle(must_claim(), db=db)

    with ThreadPoolExecutor(1) as thread:
        # when
        with transaction() as db:
            queue.finish(db, [job])
            late = thread.submit(pause, caller, job)
            until_blocked()

        # then
        with pytest.raises(Conflict, match="finished"):
            late.result()
