"""Proofs: the first images of a job are rendered, the rest waits until somebody has looked at them."""

import time
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.exc import IntegrityError

from farm import jobs, reuse, submissions, sweep
from farm.accounts import Caller
from farm.bulk import uploads
from farm.bulk.parts import Intake
from farm.bulk.uploads import Facts, Form
from farm.db import transaction
from farm.errors import Conflict, NotFound
from farm.queue import FrameStatus
from farm.submissions import Submission
from tests.factories import (
    CATALOG,
    account,
    ask,
    claim,
    must_claim,
    open_places,
    settle,
    statuses,
    submit,
    view,
)
from tests.test_bulk import lines


def proofed(caller: Caller, count: int, proof: int, *, reuse: bool = False, **spec: Any) -> UUID:
    asked = {"prompt": "a red circle", "model": "alpha", "seed": 0, "count": count, **spec}
    with transaction() as db:
        sent = Submission(spec=asked, reuse=reuse, proof=proof)
        return submissions.submit(db, caller, sent, models=CATALOG)[0]


def uploaded(caller: Caller, data: bytes, **facts: Any) -> UUID:
    with transaction() as db:
        upload, _ = uploads.create(db, caller, Facts.model_validate(facts), Form.NDJSON)
    intake = Intake(caller, upload, models=CATALOG)
    intake.take(data, final=True)
    with transaction() as db:
        assert uploads.finish(db, caller, intake.upload_id).upload.status == "accepted"
    return intake.upload_id


def approve(caller: Caller, job: UUID) -> list[str]:
    with transaction() as db:
        return jobs.approve(db, caller.account_id, job)


def shown(job: UUID) -> list[str]:
    with transaction() as db:
        proofs = jobs.withheld(db, [job])
        return [jobs.shown_status(f, False, proofs.get(job)) for f in jobs.frames_of(db, job)]


def listed(job: UUID, status: FrameStatus) -> list[int]:
    with transaction() as db:
        return [f.index for f in jobs.frames_of(db, job, status=status)]


def test_only_the_proof_is_rendered_until_the_job_is_approved(books: str) -> None:
    # given
    caller = account()
    job = proofed(caller, 10, 3)
    assert view(caller, job).status == "queued"

    # when
    pack = must_claim(frames=8)

    # then
    assert [f.index for f in pack.frames] == [0, 1, 2]
    assert claim(frames=8) is None
    assert shown(job) == ["claimed"] * 3 + ["staged"] * 7
    settle(pack)
    made = view(caller, job)
    assert (made.status, made.done, made.queued, made.staged) == ("staged", 3, 7, 7)
    assert made.held == made.quoted - made.charged
    assert listed(job, FrameStatus.STAGED) == [3, 4, 5, 6, 7, 8, 9]
    assert listed(job, FrameStatus.QUEUED) == []
    sweep.tidy()  # closes keys, retires lanes, and opens none
    assert claim(frames=8) is None

    assert approve(caller, job) == ["alpha"]
    assert approve(caller, job) == []
    assert view(caller, job).staged == 0
    pack = must_claim(frames=8)
    assert [f.index for f in pack.frames] == [3, 4, 5, 6, 7, 8, 9]
    settle(pack)
    assert view(caller, job).status == "finished"


def test_a_bulk_upload_has_its_proof_too(books: str) -> None:
    caller = account()
    job = uploaded(caller, lines(0, 40), proof=5)

    settle(must_claim(frames=100))
    assert view(caller, job).status == "staged"
    approve(caller, job)

    assert len(must_claim(frames=100).frames) == 35


def test_who_does_not_like_the_proof_cancels_the_rest(books: str) -> None:
    caller = account()
    job = proofed(caller, 10, 3)
    settle(must_claim(frames=8))

    with transaction() as db:
        jobs.cancel(db, caller.account_id, job)
    sweep.tidy()
    sweep.tidy()

    ended = view(caller, job)
    assert (ended.status, ended.done, ended.cancelled, ended.staged, ended.held) == ("cancelled", 3, 7, 0, 0)
    assert ended.ended_at is not None
    with pytest.raises(Conflict):
        approve(caller, job)


def test_a_job_without_a_proof_has_nothing_to_approve(books: str) -> None:
    caller, other = account(), account("umbrella")
    job = submit(caller, 2)
    for proof in (2, 3):  # all of it is the proof
        whole = proofed(caller, 2, proof)
        assert view(caller, whole).proof is None

    with pytest.raises(Conflict):
        approve(caller, job)
    with pytest.raises(NotFound):
        approve(other, proofed(caller, 5, 1))


def test_a_proof_of_a_paused_job_is_approved_and_goes_on_when_it_is_resumed(books: str) -> None:
    caller = account()
    job = proofed(caller, 6, 2)
    with transaction() as db:
        jobs.pause(db, caller.account_id, job)

    approve(caller, job)
    assert claim(frames=8) is None
    with transaction() as db:
        jobs.resume(db, caller.account_id, job)

    assert len(must_claim(frames=8).frames) == 6


def test_the_database_refuses_to_open_what_was_not_approved(books: str) -> None:
    caller = account()
    job = proofed(caller, 4, 1)
    assert open_places(job) == ([True, False], [True])

    with pytest.raises(IntegrityError):
        ask("UPDATE job_keys SET open = true WHERE job_id = :job", job=job)


def test_nobody_waits_for_a_frame_behind_a_proof(books: str) -> None:
    # given a frame with seed 3 behind a proof
    caller = account()
    first = proofed(caller, 5, 1, reuse=True)

    # when another job asks for the same image
    other = submit(caller, 1, reuse=True, seed=3)

    # then it renders that itself, and what is behind the proof takes it once it is approved
    assert statuses(other) == ["queued"]
    while (pack := claim(frames=8)) is not None:
        settle(pack)
    approve(caller, first)
    sweep.tidy()
    assert view(caller, other).status == "finished"


def test_what_is_known_already_is_not_taken_before_it_is_approved(books: str) -> None:
    caller = account()
    submit(caller, 4, reuse=True)
    settle(must_claim(frames=8))

    job = proofed(caller, 4, 2, reuse=True)

    # the proof is answered at once, the rest waits though its images are known
    assert statuses(job) == ["done", "done", "waiting", "waiting"]
    sweep.tidy()
    assert statuses(job) == ["done", "done", "waiting", "waiting"]
    made = view(caller, job)
    assert (made.done, made.staged, made.status) == (2, 2, "staged")
    approve(caller, job)
    sweep.tidy()
    assert (view(caller, job).status, view(caller, job).reused) == ("finished", 4)


def test_an_upload_reuses_what_is_known_but_not_before_it_is_accepted(books: str) -> None:
    caller = account()
    same = [{"custom_id": "x", "prompt": "p", "model": "alpha", "seed": 1}]
    uploaded(caller, lines(0, 1, prompt="p", seed=1))
    settle(must_claim())

    with transaction() as db:
        upload, _ = uploads.create(db, caller, Facts(), Form.NDJSON)
    intake = Intake(caller, upload, models=CATALOG)
    intake.take(lines(0, 2, prompt="p", seed=1) + lines(2, 2, prompt="q", seed=1))
    intake.take(lines(4, 1, prompt="q", seed=1))
    with transaction() as db:
        reuse.look_later(
            db, caller.account_id, [r.fingerprint for r in ask("SELECT fingerprint FROM frames")]
        )
    sweep.tidy()

    assert statuses(upload.id) == ["waiting", "waiting", "queued", "waiting", "waiting"]
    with transaction() as db:
        uploads.finish(db, caller, upload.id)
    sweep.tidy()
    assert statuses(upload.id) == ["done", "done", "queued", "waiting", "waiting"]
    settle(must_claim())
    sweep.tidy()
    assert statuses(upload.id) == ["done"] * 5
    assert same


def test_approving_many_frames_takes_no_longer_than_a_few(books: str) -> None:
    caller = account()
    job = uploaded(caller, lines(0, 30_000), proof=10)

    started = time.monotonic()
    approve(caller, job)
    took_s = time.monotonic() - started

    assert took_s < 1  # on frames it would be many; on a quiet machine it is some milliseconds
    assert view(caller, job).staged == 0
    assert len(must_claim(frames=50).frames) > 0


def test_a_proof_and_a_limit_of_frames_at_once_go_together(books: str) -> None:
    caller = account()
    asked = {"prompt": "a", "model": "alpha", "seed": 0, "count": 9}
    with transaction() as db:
        sent = Submission(spec=asked, reuse=False, proof=4, max_parallel=2)
        job = submissions.submit(db, caller, sent, models=CATALOG)[0]

    rendered: list[int] = []
    for _ in range(3):
        while (pack := claim(frames=8)) is not None:
            assert len(pack.frames) <= 2
            rendered += [f.index for f in pack.frames]
            settle(pack)
            sweep.tidy()
        if view(caller, job).status == "staged":
            assert rendered == [0, 1, 2, 3]
            approve(caller, job)
            sweep.tidy()

    assert sorted(rendered) == list(range(9))
    assert view(caller, job).status == "finished"
