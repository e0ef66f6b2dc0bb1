"""Images leave when nobody needs them any more, and not sooner; whoever stores the same bytes meanwhile loses none."""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from farm import accounts, ids, ledger, queue, retention, sweep
from farm.accounts import Caller, Role
from farm.api.app import create_app
from farm.db import transaction
from farm.errors import Conflict, FarmError, Invalid, NotFound, StorageAway
from farm.queue import ClaimedPack, StoredFrame
from farm.settings import settings
from farm.storage import Store, image_key, open_store
from farm.storage.local import LocalStore
from farm.tables import Account
from tests.factories import (
    account,
    ask,
    lose,
    must_claim,
    one,
    settle,
    statuses,
    stored,
    submit,
    until_blocked,
    violations,
)
from workers.revived import settle_revived

CHORE = {chore.name: chore for chore in sweep.CHORES}


def do(name: str) -> int:
    return sweep.do(CHORE[name])


def do_all() -> None:
    """Expire, clear and purge until there is nothing left to do."""
    for name in ("expire", "clear", "purge"):
        while do(name):
            pass


@pytest.fixture
def root(store_url: str) -> Path:
    return Path(store_url.removeprefix("file://"))


def put(image: StoredFrame, content: bytes) -> None:
    open_store(settings().storage_url.get_secret_value()).put(image.key, content, content_type="image/png")


def claimed_and_stored(content: bytes) -> tuple[ClaimedPack, StoredFrame]:
    """Claim the one frame there is, and store its image, as a worker does before it settles."""
    pack = must_claim()
    (image,) = stored(pack, content=content)
    put(image, content)
    return pack, image


def rendered(caller: Caller, content: bytes) -> tuple[UUID, StoredFrame]:
    """A job of one frame that is done, with these bytes as its image."""
    job = submit(caller)
    _, image = claimed_and_stored(content)
    book(image)
    return job, image


def book(*images: StoredFrame) -> None:
    with transaction() as db:
        queue.settle(db, images)
    with transaction() as db:
        queue.finish(db, sorted({i.job_id for i in images}))


def delete(caller: Caller, job: UUID) -> None:
    with transaction() as db:
        retention.delete_images(db, caller.account_id, job)


def row(image: StoredFrame) -> Any:
    (found,) = ask("SELECT *, deleted_at IS NOT NULL AS dead FROM images WHERE key = :key", key=image.key)
    return found


def let_margin_pass(*images: StoredFrame) -> None:
    for image in images:
        ask("UPDATE images SET purged_at = purged_at - interval '2 min' WHERE key = :key", key=image.key)


# ------------------------------------------------------------------------------------------------ on request


def test_the_images_of_a_deleted_job_go_and_the_frame_and_its_charge_stay(books: str, root: Path) -> None:
    # given
    caller = account()
    job, image = rendered(caller, b"picture")

    # when
    delete(caller, job)
    do_all()

    # then
    assert not (root / image.key).exists()
    assert statuses(job) == ["done"]
    assert one("SELECT count(*) FROM usage WHERE job_id = :job", job=job) == 1
    assert row(image).dead
    assert row(image).purged_at
    assert row(image).sha256 == image.sha256
    assert one("SELECT count(*) FROM outbox WHERE kind = 'job.images_deleted'") == 1


def test_deleting_again_changes_nothing(books: str) -> None:
    caller = account()
    job, _ = rendered(caller, b"picture")
    delete(caller, job)
    at = one("SELECT images_deleted_at FROM jobs")

    do_all()
    delete(caller, job)

    assert one("SELECT images_deleted_at FROM jobs") == at
    assert one("SELECT images_cleared FROM jobs") == 1
    assert one("SELECT count(*) FROM outbox WHERE kind = 'job.images_deleted'") == 1


def test_an_image_that_another_job_shows_stays_for_that_one_and_goes_with_it(books: str, root: Path) -> None:
    # given two jobs whose frames have the same bytes
    caller = account()
    first, image = rendered(caller, b"same")
    second, again = rendered(caller, b"same")
    assert image.key == again.key

    # when
    delete(caller, first)
    do_all()
    assert (root / image.key).exists()
    assert not row(image).dead
    delete(caller, second)
    do_all()

    # then
    assert not (root / image.key).exists()
    assert row(image).dead


def test_a_job_that_has_not_ended_keeps_its_images(books: str) -> None:
    caller = account()
    job = submit(caller)

    with pytest.raises(Conflict, match="not ended"):
        delete(caller, job)


def test_another_accounts_job_is_not_found(books: str) -> None:
    job, _ = rendered(account(), b"picture")

    with pytest.raises(NotFound):
        delete(account("umbrella"), job)

    assert one("SELECT images_deleted_at FROM jobs") is None


def test_a_job_of_many_frames_is_cleared_page_by_page(
    books: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "PAGE", 3)
    caller = account()
    job = submit(caller, 8)
    images = []
    while len(images) < 8:
        pack = must_claim()
        for frame, image in zip(pack.frames, stored(pack), strict=True):
            put(image, frame.id.bytes)
            images.append(image)
        settle(pack)
    delete(caller, job)

    assert [do("clear") for _ in range(4)] == [3, 3, 2, 0]
    assert do("purge") == 8

    assert not any((root / image.key).exists() for image in images)


def test_a_frame_that_is_about_to_show_an_image_keeps_it_from_being_cleared(books: str, root: Path) -> None:
    # given a deleted job's image, which another frame is just being given
    caller = account()
    job, image = rendered(caller, b"same")
    submit(caller)
    pack, again = claimed_and_stored(b"same")
    delete(caller, job)

    with transaction() as db:
        queue.settle(db, [again])
        assert do("clear") == 0  # it is locked: looked at again later

    # then
    do_all()
    assert not row(image).dead
    assert (root / image.key).exists()
    assert one("SELECT images_cleared FROM jobs WHERE id = :job", job=job) == 1
    assert pack.frames


# ------------------------------------------------------------------------------------------------ retention


def keep(caller: Caller, days: int | None) -> None:
    with transaction() as db:
        retention.keep_for(db.get_one(Account, caller.account_id), days)


def ended(job: UUID, days_ago: float) -> None:
    ask(
        "UPDATE jobs SET ended_at = now() - make_interval(secs => :s) WHERE id = :job",
        job=job,
        s=86400 * days_ago,
    )


def test_images_go_when_their_job_ended_longer_ago_than_the_account_keeps_them(
    books: str, root: Path
) -> None:
    # given
    acme, umbrella = account(), account("umbrella")
    old, gone = rendered(acme, b"old")
    young, kept = rendered(acme, b"young")
    others, theirs = rendered(umbrella, b"theirs")
    ended(old, 30.1)
    ended(young, 29.9)
    ended(others, 3000)
    keep(acme, 30)

    # when
    do_all()

    # then
    assert not (root / gone.key).exists()
    assert (root / kept.key).exists()
    assert (root / theirs.key).exists()
    assert do("expire") == 0


def test_an_old_job_does_not_take_the_image_of_a_younger_one(books: str, root: Path) -> None:
    caller = account()
    old, image = rendered(caller, b"same")
    young, _ = rendered(caller, b"same")
    keep(caller, 30)
    ended(old, 31)

    do_all()
    assert (root / image.key).exists()

    ended(young, 31)
    do_all()
    assert not (root / image.key).exists()


def test_who_keeps_images_for_ever_again_loses_no_more(books: str, root: Path) -> None:
    caller = account()
    job, image = rendered(caller, b"picture")
    ended(job, 400)
    keep(caller, 30)
    keep(caller, None)

    do_all()

    assert (root / image.key).exists()


@pytest.mark.parametrize("days", [0, -1, 36_501])
def test_a_retention_that_is_not_allowed_names_field_and_value(books: str, days: int) -> None:
    caller = account()

    with pytest.raises(Invalid, match=f"retention_days: {days} .*1 to 36500"):
        keep(caller, days)


# ------------------------------------------------------------------------------------------------ orphans


def orphan(account_id: UUID, content: bytes, *, old: bool, root: Path) -> str:
    """Store a file that nobody books, and let it be older than the grace, or younger."""
    key = image_key(account_id, hashlib.sha256(content).digest(), "png")
    open_store(settings().storage_url.get_secret_value()).put(key, content, content_type="image/png")
    make_old(root / key, 1.1 if old else 0.9)
    return key


def make_old(path: Path, graces: float = 1.1) -> None:
    at = time.time() - settings().orphan_grace_s * graces
    os.utime(path, (at, at))


def test_a_file_without_a_row_goes_after_the_grace_and_not_before(books: str, root: Path) -> None:
    caller = account()
    old = orphan(caller.account_id, b"old", old=True, root=root)
    young = orphan(caller.account_id, b"young", old=False, root=root)

    assert do("orphans") == 1
    assert do("purge") == 1

    assert not (root / old).exists()
    assert (root / young).exists()


def test_a_file_with_a_row_never_goes(books: str, root: Path) -> None:
    caller = account()
    images = [rendered(caller, content)[1] for content in (b"1", b"2", b"3")]
    for image in images:
        make_old(root / image.key)

    assert (do("orphans"), do("purge")) == (0, 0)
    assert all((root / image.key).exists() for image in images)


def test_what_is_no_image_of_an_account_of_ours_is_left_alone(books: str, root: Path) -> None:
    stranger = orphan(ids.new_id(1), b"of another farm in this bucket", old=True, root=root)
    for other in ("v1/other.txt", "v2/x", f"v1/{account().account_id.hex}/{'a' * 64}.gif"):
        (root / other).parent.mkdir(parents=True, exist_ok=True)
        (root / other).write_bytes(b"x")
        os.utime(root / other, (0, 0))

    assert (do("orphans"), do("purge")) == (0, 0)
    assert (root / stranger).exists()
    assert (root / "v1/other.txt").exists()


def test_a_store_of_many_files_is_gone_through_in_turns(
    books: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = account()
    for number in range(10):
        orphan(caller.account_id, bytes([number]), old=True, root=root)
    monkeypatch.setattr(retention, "KEYS", 4)
    monkeypatch.setattr(retention, "TURN_S", 0.0)
    orphans = retention.Orphans()

    turns = []
    while not turns or orphans.unfinished:
        turns.append(orphans.turn())

    assert [n for n in turns if n] == [4, 4, 2]


def test_no_transaction_is_open_while_the_store_lists(
    books: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphan(account().account_id, b"old", old=True, root=root)
    states: list[list[str]] = []
    listed = LocalStore.list

    def watched(self: LocalStore, prefix: str = "") -> Iterator[Any]:
        for found in listed(self, prefix):
            others = "datname = current_database() AND pid <> pg_backend_pid()"
            states.append([r.state for r in ask(f"SELECT state FROM pg_stat_activity WHERE {others}")])
            yield found

    monkeypatch.setattr(LocalStore, "list", watched)
    do("orphans")

    assert states
    assert not any("idle in transaction" in seen for seen in states)


def test_a_tombstone_of_what_nobody_booked_is_forgotten_after_a_day(books: str, root: Path) -> None:
    orphan(account().account_id, b"old", old=True, root=root)
    job, image = rendered(account("umbrella"), b"booked once")
    do("orphans")
    do("purge")

    assert do("forget tombstones") == 0
    ask("UPDATE images SET purged_at = purged_at - interval '25 h' WHERE purged_at IS NOT NULL")
    assert do("forget tombstones") == 1

    assert one("SELECT key FROM images") == image.key
    assert statuses(job) == ["done"]


# ------------------------------------------------------------------------------------------------ the same again


def again(caller: Caller, content: bytes) -> tuple[UUID, StoredFrame]:
    """A frame that is rendered to the same bytes, stored, and not booked yet."""
    job = submit(caller)
    _, image = claimed_and_stored(content)
    return job, image


def settle_again(image: StoredFrame) -> queue.Settled:
    """As the shelf of a worker does that drains."""
    try:
        with transaction() as db:
            return queue.settle(db, [image])
    except IntegrityError:
        with transaction() as db:
            settled, refused = settle_revived(db, [image], gpu_ms={})
            if refused:
                queue.release(db, [image.pack_id], frames=[image.frame_id])
            return settled


def test_an_image_that_was_deleted_comes_back_when_its_bytes_are_rendered_anew(
    books: str, root: Path
) -> None:
    # given
    caller = account()
    job, image = rendered(caller, b"picture")
    delete(caller, job)
    do_all()
    let_margin_pass(image)

    # when
    new, same = again(caller, b"picture")
    assert len(settle_again(same).done) == 1
    do_all()

    # then the new frame has it; it is still deleted for the old one
    assert not row(image).dead
    assert (root / image.key).exists()
    assert statuses(new) == ["done"]
    assert one("SELECT count(*) FROM images") == 1
    assert one("SELECT images_deleted_at IS NOT NULL FROM jobs WHERE id = :job", job=job)


@pytest.mark.parametrize(
    "when", ["before the purge", "before the claim's margin", "claimed before the purge"]
)
def test_a_frame_whose_file_the_purge_may_take_is_given_back_and_not_billed(
    books: str, root: Path, when: str
) -> None:
    # given bytes stored again around the moment in which their file goes
    caller = account()
    job, image = rendered(caller, b"picture")
    delete(caller, job)
    do("clear")
    if when == "before the claim's margin":
        do("purge")
    new, same = again(caller, b"picture")
    if when == "claimed before the purge":
        do("purge")

    # when
    settled = settle_again(same)

    # then
    assert settled.done == frozenset()
    assert statuses(new) == ["queued"]
    assert row(image).dead
    assert one("SELECT count(*) FROM usage WHERE job_id = :job", job=new) == 0

    # and rendered again, it has its image
    do("purge")
    let_margin_pass(image)
    _, third = claimed_and_stored(b"picture")
    assert len(settle_again(third).done) == 1
    do_all()
    assert (root / image.key).exists()


def test_the_frames_beside_one_that_may_not_be_booked_yet_are_booked(books: str, root: Path) -> None:
    caller = account()
    job, _ = rendered(caller, b"picture")
    delete(caller, job)
    do("clear")
    new = submit(caller, 2)
    pack = must_claim()
    first, second = pack.frames
    pair = [*stored(pack, [first], content=b"picture"), *stored(pack, [second])]

    with transaction() as db:
        settled, refused = settle_revived(db, pair, gpu_ms={})

    assert (settled.done, refused) == ({second.id}, {pair[0].key})
    assert statuses(new) == ["claimed", "done"]
    assert one("SELECT count(*) FROM usage WHERE job_id = :job", job=new) == 1


@pytest.mark.parametrize(
    ("revives", "wrong"), [("as the product", []), ("at once", ["image is not in the store"])]
)
def test_without_the_rule_for_tombstones_a_frame_is_billed_whose_file_the_purge_takes(
    books: str, root: Path, monkeypatch: pytest.MonkeyPatch, revives: str, wrong: list[str]
) -> None:
    """A negative control: a settle that just takes a tombstone off loses the file, and the audit of images says so."""
    # given bytes stored again, and booked when the purge has listed their tombstone and not yet deleted the file
    caller = account()
    job, _ = rendered(caller, b"picture")
    delete(caller, job)
    do("clear")
    new, same = again(caller, b"picture")
    really = retention._delete

    def book_first(store: Store, key: str) -> FarmError | None:
        settle_naively(same) if revives == "at once" else settle_again(same)
        return really(store, key)

    monkeypatch.setattr(retention, "_delete", book_first)

    # when
    do("purge")

    # then
    with transaction() as db:
        images = ledger.images_after(db, 0, limit=10)
    found = ledger.audit_images(images, open_store(settings().storage_url.get_secret_value()))
    assert [v.violation for v in found] == wrong
    assert statuses(new) == ["done" if wrong else "queued"]


def settle_naively(image: StoredFrame) -> None:
    with transaction() as db:
        db.execute(text("ALTER TABLE images DISABLE TRIGGER images_revived"))
        db.execute(
            text("UPDATE images SET deleted_at = NULL, purged_at = NULL WHERE key = :key"), {"key": image.key}
        )
        queue.settle(db, [image])


def test_an_orphan_that_is_condemned_while_it_is_stored_again_does_not_take_the_frames_image(
    books: str, root: Path
) -> None:
    # given an old file that nobody booked, and a worker that has just stored the same bytes
    caller = account()
    key = orphan(caller.account_id, b"picture", old=True, root=root)
    listing = retention.Orphans()
    job = submit(caller)
    pack = must_claim()
    (image,) = stored(pack, content=b"picture")
    assert listing.turn() == 1  # it was listed before the worker stored it
    put(image, b"picture")

    # when it settles before the purge, which takes its file
    assert settle_again(image).done == frozenset()
    do("purge")

    # then the frame is not done without a file: it is rendered again
    assert statuses(job) == ["queued"]
    ask("UPDATE images SET purged_at = purged_at - interval '2 min'")
    _, third = claimed_and_stored(b"picture")
    assert len(settle_again(third).done) == 1
    assert (root / key).exists()
    assert row(third).pixel_sha256 == third.pixel_sha256


def test_of_a_condemnation_and_a_settle_at_once_the_second_sees_the_first(books: str, root: Path) -> None:
    # given an old orphan whose frame settles while the sweep condemns it
    caller = account()
    key = orphan(caller.account_id, b"picture", old=True, root=root)
    job = submit(caller)
    pack = must_claim()
    (image,) = stored(pack, content=b"picture")

    with ThreadPoolExecutor(1) as thread:
        with transaction() as db:
            queue.settle(db, [image])
            late = thread.submit(retention.Orphans().turn)
            until_blocked()

        assert late.result() == 0

    assert do("purge") == 0
    assert (root / key).exists()
    assert statuses(job) == ["done"]


def test_what_lives_again_for_a_frame_that_was_lost_is_buried_again(books: str, root: Path) -> None:
    # given
    caller = account()
    job, image = rendered(caller, b"picture")
    delete(caller, job)
    do_all()
    let_margin_pass(image)
    _, same = again(caller, b"picture")
    ask("UPDATE frames SET suspect = false")

    # when the frame is somebody else's by now
    pack_id = one("SELECT id FROM packs WHERE closed_at IS NULL")
    ask("UPDATE packs SET lease_until = clock_timestamp() - interval '1 s' WHERE id = :pack", pack=pack_id)
    with transaction() as db:
        queue.reclaim(db)
    with transaction() as db:
        settled, _ = settle_revived(db, [same], gpu_ms={})

    # then
    assert settled.done == frozenset()
    assert row(image).dead
    do("purge")
    assert not (root / image.key).exists()


def test_the_database_refuses_to_revive_what_is_being_purged(books: str) -> None:
    caller = account()
    job, _ = rendered(caller, b"picture")
    delete(caller, job)
    do("clear")

    with pytest.raises(IntegrityError, match="being deleted"):
        ask("UPDATE images SET deleted_at = NULL")


def test_the_audit_finds_a_deleted_image_that_a_frame_still_shows(database: str) -> None:
    from farm import pricing
    from tests.factories import CATALOG

    with transaction() as db:
        pricing.sync(db, CATALOG)
    rendered(account(), b"picture")
    ask("UPDATE images SET deleted_at = now()")

    assert [v.violation for v in violations()] == ["deleted image of a frame that keeps its own"]


# ------------------------------------------------------------------------------------------------ the purge


def test_a_file_that_the_store_does_not_delete_is_tried_again(
    books: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    caller = account()
    images = []
    for content in (b"1", b"2", b"3"):
        job, image = rendered(caller, content)
        delete(caller, job)
        images.append(image)
    while do("clear"):
        pass
    deleted = LocalStore.delete

    def refused(self: LocalStore, key: str) -> None:
        if key == images[1].key:
            raise StorageAway
        deleted(self, key)

    # when
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "delete", refused)
        with pytest.raises(StorageAway):
            do("purge")

    # then what was deleted is written down, and the rest comes next
    assert [row(i).purged_at is not None for i in images] == [True, False, True]
    assert do("purge") == 1
    assert not (root / images[1].key).exists()


def test_one_sweep_at_a_time_purges_and_its_lock_is_no_transaction(
    books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a purge that is stuck in the store
    caller = account()
    job, _ = rendered(caller, b"picture")
    delete(caller, job)
    do("clear")
    in_store, go_on = threading.Event(), threading.Event()

    def stuck(self: LocalStore, key: str) -> None:
        in_store.set()
        go_on.wait(20)

    monkeypatch.setattr(LocalStore, "delete", stuck)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(do, "purge")
        in_store.wait(20)

        # then
        try:
            assert do("purge") == 0
            assert one("SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'") == 0
        finally:
            go_on.set()
        assert first.result() == 1


# ------------------------------------------------------------------------------------------------ over HTTP


@pytest.fixture
def keys(books: str) -> dict[str, str]:
    with transaction() as db:
        acme, umbrella = accounts.create(db, "acme"), accounts.create(db, "umbrella")
        return {
            "acme": accounts.issue_key(db, acme)[1],
            "reader": accounts.issue_key(db, acme, role=Role.READ)[1],
            "admin": accounts.issue_key(db, acme, role=Role.ADMIN)[1],
            "umbrella": accounts.issue_key(db, umbrella)[1],
        }


@pytest.fixture
def api(keys: dict[str, str]) -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {keys['acme']}"
        yield client


@pytest.fixture
def done(keys: dict[str, str]) -> tuple[str, bytes]:
    """A job of acme's with an image, by its public id."""
    with transaction() as db:
        caller = accounts.authenticate(db, keys["acme"])
    job, _ = rendered(caller, b"picture")
    return ids.public("job", job), b"picture"


def as_(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def path_of(url: str) -> str:
    return httpx.URL(url).raw_path.decode()


def test_a_link_gives_the_image_without_a_key_until_it_expires(
    api: TestClient, done: tuple[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, data = done

    link = api.get(f"/v1/jobs/{job}/frames/0/image-url").json()
    found = api.get(path_of(link["url"]), headers={"Authorization": ""})

    assert (found.status_code, found.content, found.headers["content-type"]) == (200, data, "image/png")
    now = time.time()
    monkeypatch.setattr("farm.links.datetime", At(now + 599 - 5))
    assert api.get(path_of(link["url"])).status_code == 200
    monkeypatch.setattr("farm.links.datetime", At(now + 601))
    assert api.get(path_of(link["url"])).status_code == 410


class At:
    """A clock that stands."""

    def __init__(self, at: float) -> None:
        self._at = at

    def now(self, _: object) -> "At":
        return self

    def timestamp(self) -> float:
        return self._at


def test_the_image_may_be_asked_for_as_a_redirect(api: TestClient, done: tuple[str, bytes]) -> None:
    job, data = done

    answer = api.get(f"/v1/jobs/{job}/frames/0/image?redirect=1", follow_redirects=False)

    assert answer.status_code == 307
    assert api.get(path_of(answer.headers["location"])).content == data


def test_a_link_that_was_changed_in_any_place_is_not_found(api: TestClient, done: tuple[str, bytes]) -> None:
    token = api.get(f"/v1/jobs/{done[0]}/frames/0/image-url").json()["url"].rpartition("/")[2]

    for at in range(0, len(token), 7):
        changed = token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]
        assert api.get(f"/v1/files/{changed}").status_code == 404
    for other in ("x", "x.y", token[:-1], token + "A", token + "=", token.replace(".", ""), "%2e%2e"):
        assert api.get(f"/v1/files/{other}").status_code == 404
    assert api.get(f"/v1/files/{token}").status_code == 200


def test_a_link_is_for_whom_the_image_belongs_to(
    api: TestClient, keys: dict[str, str], done: tuple[str, bytes]
) -> None:
    url = f"/v1/jobs/{done[0]}/frames/0/image-url"

    assert api.get(url, headers=as_(keys["umbrella"])).status_code == 404
    assert api.get(url, headers={"Authorization": ""}).status_code == 401
    assert api.get(f"/v1/jobs/{done[0]}/frames/1/image-url").status_code == 404


def test_deleted_images_answer_410_and_are_in_no_listing(
    api: TestClient, keys: dict[str, str], done: tuple[str, bytes]
) -> None:
    job, _ = done
    link = path_of(api.get(f"/v1/jobs/{job}/frames/0/image-url").json()["url"])
    assert api.delete(f"/v1/jobs/{job}/images", headers=as_(keys["umbrella"])).status_code == 404
    assert api.delete(f"/v1/jobs/{job}/images", headers=as_(keys["reader"])).status_code == 403

    answer = api.delete(f"/v1/jobs/{job}/images")

    assert answer.status_code == 200, answer.text
    assert answer.json()["frames"] == 1
    for way in ("image", "image?redirect=1", "image-url"):
        gone = api.get(f"/v1/jobs/{job}/frames/0/{way}")
        assert (gone.status_code, gone.json()["detail"]) == (410, "the image was deleted")
    frame = api.get(f"/v1/jobs/{job}/frames/0").json()
    assert (frame["status"], frame["image"]) == ("done", None)
    assert api.get(f"/v1/jobs/{job}/sheet").status_code == 200
    do_all()
    assert api.get(link).status_code == 410


def test_the_images_of_a_job_that_runs_are_not_deleted(api: TestClient, keys: dict[str, str]) -> None:
    with transaction() as db:
        job = ids.public("job", submit(accounts.authenticate(db, keys["acme"]), db=db))

    assert api.delete(f"/v1/jobs/{job}/images").status_code == 409


def test_admins_say_for_how_long_an_accounts_images_are_kept(api: TestClient, keys: dict[str, str]) -> None:
    admin = as_(keys["admin"])

    answer = api.patch("/v1/accounts/umbrella", json={"retention_days": 90}, headers=admin)

    assert (answer.status_code, answer.json()["retention_days"]) == (200, 90)
    assert api.patch("/v1/accounts/umbrella", json={"retention_days": 9}).status_code == 403
    assert api.patch("/v1/accounts/nobody", json={"retention_days": 9}, headers=admin).status_code == 404
    for wrong in ({"retention_days": 0}, {"retention_days": "9"}, {"retention_days": 9, "x": 1}, {}):
        refused = api.patch("/v1/accounts/umbrella", json=wrong, headers=admin)
        assert refused.status_code == 422, wrong
    assert {
        a["name"]: a["retention_days"] for a in api.get("/v1/accounts", headers=admin).json()["accounts"]
    } == {
        "acme": None,
        "umbrella": 90,
    }
    assert api.patch("/v1/accounts/umbrella", json={"retention_days": None}, headers=admin).status_code == 200


def test_the_api_says_how_the_store_was_when_it_began(api: TestClient) -> None:
    deadline = time.monotonic() + 20
    while api.get("/health/ready").json()["store"] == "unknown" and time.monotonic() < deadline:
        pass

    assert api.get("/health/ready").json()["store"] == "up"


def test_a_lost_frame_is_rendered_again_and_its_first_file_is_the_same(books: str, root: Path) -> None:
    caller = account()
    job = submit(caller)
    pack, image = claimed_and_stored(b"picture")
    lose(pack)

    _, same = claimed_and_stored(b"picture")
    book(same)

    assert same.key == image.key
    assert statuses(job) == ["done"]
