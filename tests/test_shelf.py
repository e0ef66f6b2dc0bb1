"""The shelf: what is rendered is stored and booked beside the device."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from sqlalchemy import text

from farm import jobs, queue, retention, sweep
from farm.accounts import Caller
from farm.db import transaction
from farm.queue import ClaimedPack, Settled, StoredFrame
from farm.settings import settings
from farm.storage import open_store
from tests.factories import account, ask, claim, model, must_claim, one, statuses, submit, until_blocked
from workers import revived
from workers.leases import Leases
from workers.shelf import Shelf


@pytest.mark.parametrize(("at_once", "expected"), [(64, [1, 4]), (3, [1, 3, 1])])
def test_what_is_stored_while_others_are_settled_is_settled_with_the_next(
    books: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, expected: list[int]
) -> None:
    # given frames that are settled as soon as they are there, and a lock that holds up the first of them
    monkeypatch.setenv("FARM_SETTLE_FRAMES", "1")
    monkeypatch.setenv("FARM_SETTLE_AT_ONCE", str(at_once))
    settings.cache_clear()
    settled: list[int] = []
    settle = queue.settle

    def counted(db: Any, stored: Sequence[StoredFrame], **how: Any) -> Settled:
        settled.append(len(stored))
        return settle(db, stored, **how)

    monkeypatch.setattr(queue, "settle", counted)
    submit(account(), 5)
    packs = [must_claim(frames=count) for count in (1, 2, 2)]
    leases, store = Leases("a"), open_store(tmp_path.as_uri())
    shelf = Shelf(store, leases, reached=lambda _: None, drain=threading.Event(), quit_now=threading.Event())

    def put(number: int) -> None:
        pack = packs[number]
        pixels = [np.full((f.spec.height, f.spec.width, 3), f.index, np.uint8) for f in pack.frames]
        shelf.put(pack, model("alpha"), pack.frames, pixels, gpu_ms=1)

    # when
    with transaction() as db:
        db.execute(text("SELECT FROM packs WHERE id = :id FOR UPDATE"), {"id": packs[0].id})
        put(0)
        until_blocked()
        put(1)
        put(2)
        deadline = time.monotonic() + 20
        while shelf._stored.qsize() < 4:
            assert time.monotonic() < deadline, "they are not stored"
            time.sleep(0.01)
    shelf.drain()

    # then
    assert settled == expected
    assert shelf.done == one("SELECT count(*) FROM frames WHERE status = 'done'") == 5


# ------------------------------------------------------------------------------------------------ deleted just now


def until(fact: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not fact():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.01)


def picture_of(shelf: Shelf, pack: ClaimedPack, shade: int = 7) -> None:
    pixels = [np.full((f.spec.height, f.spec.width, 3), shade, np.uint8) for f in pack.frames]
    shelf.put(pack, model("alpha"), pack.frames, pixels, gpu_ms=9)


@dataclass
class Farm:
    """A shelf, and an image that a frame had and that was deleted since; its file is about to go."""

    caller: Caller
    shelf: Shelf
    leases: Leases
    drain: threading.Event
    root: Path
    key: str

    def same_again(self) -> tuple[UUID, ClaimedPack]:
        """A frame that is rendered to the deleted image, and met its tombstone."""
        job = submit(self.caller)
        pack = must_claim()
        self.leases.hold(pack.id)
        picture_of(self.shelf, pack)
        self.leases.drop(pack.id)
        until(lambda: self.shelf._waiting._kept)
        return job, pack


@pytest.fixture
def deleted(books: str, store_url: str) -> Farm:
    leases, drain = Leases("a"), threading.Event()
    store = open_store(store_url)
    shelf = Shelf(store, leases, reached=lambda _: None, drain=drain, quit_now=threading.Event())
    caller = account()
    job = submit(caller)
    picture_of(shelf, must_claim())
    shelf.drain()
    with transaction() as db:
        queue.finish(db, [job])
    with transaction() as db:
        retention.delete_images(db, caller.account_id, job)
    do("clear")
    root = Path(store_url.removeprefix("file://"))
    return Farm(caller, shelf, leases, drain, root, str(one("SELECT key FROM images")))


def do(name: str) -> None:
    sweep.do(next(chore for chore in sweep.CHORES if chore.name == name))


def test_an_image_that_was_deleted_just_now_is_rendered_once_and_stored_when_no_delete_can_take_it(
    deleted: Farm,
) -> None:
    # given
    new, pack = deleted.same_again()

    # then it is nobody else's meanwhile, holds up no other and no burst, and its file goes
    assert (statuses(new), claim()) == (["claimed"], None)
    assert not deleted.shelf.is_full(1)
    deleted.shelf.drain()
    other = submit(deleted.caller)
    picture_of(deleted.shelf, must_claim(), shade=8)
    deleted.shelf.drain()
    assert (statuses(other), statuses(new)) == (["done"], ["claimed"])
    do("purge")
    assert not (deleted.root / deleted.key).exists()
    time.sleep(1.5)  # it was looked at meanwhile
    assert statuses(new) == ["claimed"]

    # when
    ask("UPDATE images SET purged_at = purged_at - interval '2 min' WHERE purged_at IS NOT NULL")
    until(lambda: statuses(new) == ["done"])

    # then
    assert (deleted.root / deleted.key).exists()
    assert one("SELECT count(*) FROM usage WHERE job_id = :job", job=new) == 1
    assert one("SELECT gpu_ms FROM packs WHERE id = :pack", pack=pack.id) == 9
    assert one("SELECT count(*) FROM packs") == 3
    until(lambda: not deleted.leases._holds and not deleted.shelf._gpu_ms)


def test_a_drain_gives_back_at_once_what_waits_to_be_stored(deleted: Farm) -> None:
    # given
    new, _ = deleted.same_again()

    # when
    deleted.drain.set()
    deleted.shelf.drain()

    # then without blame
    assert statuses(new) == ["queued"]
    assert ask("SELECT attempts, suspect FROM frames WHERE job_id = :job", job=new) == [(0, False)]
    assert deleted.shelf._kept == 0
    assert not deleted.leases._holds


def test_what_waits_to_be_stored_and_is_cancelled_ends(deleted: Farm) -> None:
    # given
    new, _ = deleted.same_again()

    # when
    with transaction() as db:
        jobs.cancel(db, deleted.caller.account_id, new)

    # then
    until(lambda: statuses(new) == ["cancelled"])
    assert one("SELECT count(*) FROM usage WHERE job_id = :job", job=new) == 0


def test_beyond_what_fits_into_memory_a_frame_goes_back(
    deleted: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revived, "MOST_BYTES", 10)
    new = submit(deleted.caller)
    picture_of(deleted.shelf, must_claim())
    deleted.shelf.drain()

    assert statuses(new) == ["queued"]
    assert deleted.shelf._kept == 0
