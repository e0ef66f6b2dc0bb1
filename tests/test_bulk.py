"""Bulk uploads: lines into frames, once each, whatever is cut, repeated or sent twice."""

import io
import json
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from PIL import Image
from sqlalchemy.exc import IntegrityError

from farm import budgets, ids, inputs, jobs, pricing, sweep
from farm.accounts import Caller
from farm.bulk import staging, uploads
from farm.bulk.parts import Intake
from farm.bulk.uploads import Facts, Form
from farm.catalog import Catalog
from farm.db import transaction
from farm.errors import BudgetExceeded, Conflict, Invalid, NotFound, QueueFull
from farm.settings import settings
from farm.tables import Account
from tests.factories import (
    CATALOG,
    FRAME,
    account,
    ask,
    claim,
    model,
    must_claim,
    one,
    settle,
    statuses,
    submit,
    view,
    violations,
)


def lines(first: int, count: int, **more: Any) -> bytes:
    said = (
        {"custom_id": f"sku-{n}", "prompt": f"picture {n}", "model": "alpha", **more}
        for n in range(first, first + count)
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in said)


def started(caller: Caller, form: Form = Form.NDJSON, **facts: Any) -> Intake:
    with transaction() as db:
        upload, _ = uploads.create(db, caller, Facts.model_validate(facts), form)
    return Intake(caller, upload, models=CATALOG)


def finished(caller: Caller, intake: Intake) -> uploads.Ended:
    with transaction() as db:
        return uploads.finish(db, caller, intake.upload_id)


def sent(caller: Caller, data: bytes, form: Form = Form.NDJSON, **facts: Any) -> uploads.Ended:
    intake = started(caller, form, **facts)
    assert intake.take(data, final=True) == len(data)
    return finished(caller, intake)


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (512, 512), "red").save(file, "PNG")
    return file.getvalue()


def errors(upload: UUID) -> list[tuple[int, str | None, str, Any, str]]:
    with transaction() as db:
        return [(e.line, e.custom_id, e.field, e.value, e.allowed) for e in uploads.errors_of(db, upload)]


def names(job: UUID) -> list[str]:
    return [
        r.custom_id
        for r in ask("SELECT custom_id FROM frame_names WHERE job_id = :job ORDER BY index", job=job)
    ]


def test_a_file_of_lines_becomes_a_job_in_one_step(books: str) -> None:
    caller = account()
    intake = started(caller, name="spring", priority="standard")

    intake.take(lines(0, 3, seed=7))

    # then nothing of it can be seen or claimed
    with pytest.raises(NotFound), transaction() as db:
        jobs.find(db, caller.account_id, intake.upload_id)
    ended = finished(caller, intake)
    assert (ended.upload.status, ended.models) == ("accepted", ["alpha"])
    job = intake.upload_id
    shown = view(caller, job)
    assert (shown.status, shown.frames, shown.queued, shown.name, shown.priority) == (
        "queued",
        3,
        3,
        "spring",
        5,
    )
    assert shown.quoted == shown.held == 3 * FRAME
    assert names(job) == ["sku-0", "sku-1", "sku-2"]
    pack = must_claim()
    assert [f.spec.prompt for f in pack.frames] == ["picture 0", "picture 1", "picture 2"]
    settle(pack)
    assert view(caller, job).status == "finished"


def test_keys_lanes_and_prices_grow_with_the_file(books: str) -> None:
    caller = account()
    intake = started(caller, mode="accept_good")

    intake.take(lines(0, 2) + lines(2, 1, steps=8) + lines(3, 1, model="flat"))
    intake.take(lines(4, 1) + lines(5, 1, model="flux") + lines(6, 1, width=65))
    finished(caller, intake)

    job = intake.upload_id
    keys = ask("SELECT key_no, model, open FROM job_keys WHERE job_id = :job ORDER BY key_no", job=job)
    assert [tuple(r) for r in keys] == [
        (0, "alpha", True),
        (1, "alpha", True),
        (2, "flat", True),
        (3, "flux", True),
    ]
    assert [r.key_no for r in ask("SELECT key_no FROM frames ORDER BY id")] == [0, 0, 1, 2, 0, 3]
    assert view(caller, job).quoted == 3 * FRAME + 2 * FRAME + Decimal("0.37") + FRAME
    assert errors(job) == [(7, "sku-6", "width", 65, "allowed are multiples of 8 from 64 to 2048")]


def test_a_file_the_budget_does_not_cover_is_told_so_on_the_way_and_goes_on_when_it_does(books: str) -> None:
    caller = account()
    with transaction() as db:
        budgets.put(db, db.get_one(Account, caller.account_id), 5 * FRAME)
    intake = started(caller)
    intake.take(lines(0, 4))

    with pytest.raises(BudgetExceeded) as refused:
        intake.take(lines(4, 4))

    assert refused.value.facts["needed"] == str(8 * FRAME)
    with transaction() as db:
        upload = uploads.find(db, caller.account_id, intake.upload_id)
        budgets.put(db, db.get_one(Account, caller.account_id), 8 * FRAME)
    again = Intake(caller, upload, models=CATALOG)
    again.take(lines(4, 4))
    assert finished(caller, again).upload.status == "accepted"
    assert names(intake.upload_id) == [f"sku-{n}" for n in range(8)]


def test_a_job_s_own_budget_holds_for_a_file(books: str) -> None:
    caller = account()
    intake = started(caller, budget=str(2 * FRAME))

    with pytest.raises(BudgetExceeded):
        intake.take(lines(0, 3))

    assert one("SELECT count(*) FROM frames") == 0


def test_frames_of_an_upload_count_towards_what_may_be_open(
    books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_MAX_OPEN_FRAMES", "5")
    settings.cache_clear()
    caller = account()
    intake = started(caller)
    intake.take(lines(0, 4))

    with pytest.raises(QueueFull):
        started(caller).take(lines(4, 4))
    with pytest.raises(Invalid, match="may have 5 frames"):  # its own four never make room
        intake.take(lines(4, 4))

    with transaction() as db:
        uploads.discard(db, caller.account_id, intake.upload_id)
    sweep.tidy()
    sweep.tidy()
    started(caller).take(lines(4, 4))  # there is room again


def test_a_file_says_when_it_runs_and_how_much_of_it_at_once(books: str) -> None:
    caller = account()
    first = sent(caller, lines(0, 1)).upload.id
    job = sent(caller, lines(1, 5), after=[ids.public("job", first)], max_parallel=2).upload.id
    assert (view(caller, job).status, statuses(job)) == ("waiting", ["queued"] * 2 + ["staged"] * 3)

    settle(must_claim(frames=8))
    sweep.tidy()

    rendered = []
    while (pack := claim(frames=8)) is not None:
        rendered.append([f.index for f in pack.frames])
        settle(pack)
        sweep.tidy()
    assert (rendered, view(caller, job).status) == ([[0, 1], [2, 3], [4]], "finished")


def test_a_job_has_only_so_many_keys(books: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MAX_KEYS", 2)
    caller = account()
    intake = started(caller)
    intake.take(lines(0, 1, steps=3) + lines(1, 1, steps=4))

    with pytest.raises(Invalid) as refused:
        intake.take(lines(2, 1, steps=5))

    assert "allowed are 2 combinations" in refused.value.faults[0].allowed
    assert one("SELECT count(*) FROM frames") == 2


def test_a_job_to_come_after_that_is_not_there_is_said_before_anything_is_sent(books: str) -> None:
    with pytest.raises(NotFound):
        started(account(), after=[ids.public("job", UUID(int=0))])


def test_a_line_names_images_the_account_has(books: str) -> None:
    caller, other = account(), account("umbrella")
    mine, theirs = (
        ids.public("inp", inputs.keep(c.account_id, data, inputs.look_at(data, "", field="file"))[0])
        for c in (caller, other)
        if (data := picture())
    )
    photo = model("photo", takes=("image",), engine="step", packs_by="shape")
    models = Catalog([photo])
    with transaction() as db:
        pricing.sync(db, models)
        upload, _ = uploads.create(db, caller, Facts(mode="accept_good"), Form.NDJSON)
    intake = Intake(caller, upload, models=models)

    intake.take(
        lines(0, 1, model="photo", image=mine)
        + lines(1, 1, model="photo", image=theirs)
        + lines(2, 1, model="photo")
        + lines(3, 1, model="photo", image=mine, strength=0.5)
    )
    ended = finished(caller, intake)

    assert (ended.upload.good, names(upload.id)) == (3, ["sku-0", "sku-2", "sku-3"])
    [(line, _, field, value, allowed)] = errors(upload.id)
    assert (line, field, value) == (2, "image", theirs)
    assert "/v1/inputs" in allowed
    assert one("SELECT count(*) FROM job_inputs WHERE job_id = :job", job=upload.id) == 1


def test_uploads_stand_behind_nobody_and_hold_up_nobody(books: str) -> None:
    # given an upload that is being stored, its transaction open
    caller, other = account(), account("umbrella")
    intake = started(caller)
    intake.take(lines(0, 3))
    with transaction() as db:
        uploads.find(db, caller.account_id, intake.upload_id, lock=True)

        # then everybody else submits, claims and settles
        job = submit(other, 1)
        own = submit(caller, 1)
        settle(must_claim())
        assert view(other, job).status == view(caller, own).status == "finished"
    assert claim() is None


def test_a_discarded_upload_goes_bit_by_bit_and_the_books_are_right_at_any_moment(
    books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "REMOVED", 3)
    caller = account()
    intake = started(caller)
    intake.take(lines(0, 4, seed=1, prompt="p") + lines(4, 4))
    with transaction() as db:
        uploads.discard(db, caller.account_id, intake.upload_id)

    left = []
    while True:
        with transaction() as db:
            if not uploads.clear(db):
                break
        left.append(one("SELECT count(*) FROM frames"))
        assert violations() == []

    assert left == [5, 2, 0]
    assert one("SELECT (SELECT count(*) FROM jobs) + (SELECT count(*) FROM frame_names)") == 0


def test_an_upload_that_went_elsewhere_meanwhile_is_not_gone_on_with(books: str) -> None:
    caller = account()
    intake = started(caller)
    with transaction() as db:
        late = Intake(caller, uploads.find(db, caller.account_id, intake.upload_id), models=CATALOG)
    intake.take(lines(0, 2))

    with pytest.raises(Conflict) as conflict:
        late.take(lines(0, 2))

    assert conflict.value.facts["offset"] == intake.received
    with pytest.raises(Conflict), transaction() as db:
        uploads.finish(db, caller, intake.upload_id, received=1)


def test_the_names_of_frames_agree_with_their_job(books: str) -> None:
    caller, other = account(), account("umbrella")
    job = submit(caller, 1)

    for account_id in (other.account_id, UUID(int=1)):
        with pytest.raises(IntegrityError):
            ask("INSERT INTO frame_names VALUES (:job, 0, :account, 'x')", job=job, account=account_id)


def test_ended_uploads_are_forgotten_after_a_while(books: str) -> None:
    caller = account()
    sent(caller, lines(0, 2))
    ask("UPDATE bulk_uploads SET ended_at = now() - interval '3 days'")
    with transaction() as db:
        uploads.forget(db)
    assert [one(f"SELECT count(*) FROM {t}") for t in ("bulk_chunks", "bulk_uploads")] == [0, 1]

    ask("UPDATE bulk_uploads SET ended_at = now() - interval '31 days'")
    with transaction() as db:
        uploads.forget(db)

    assert one("SELECT count(*) FROM bulk_uploads") == 0
    assert one("SELECT count(*) FROM frame_names") == 2  # they are the job's
