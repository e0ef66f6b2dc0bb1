"""The shelf: what is rendered is stored and booked beside the device."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from farm import queue
from farm.db import transaction
from farm.queue import Settled, StoredFrame
from farm.settings import settings
from farm.storage import open_store
from tests.factories import account, model, must_claim, one, submit, until_blocked
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
    shelf = Shelf(store, leases, reached=lambda _: None, quit_now=threading.Event())

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
