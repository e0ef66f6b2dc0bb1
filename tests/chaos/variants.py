"""Three ways to make money that lose some: negative controls, which the checks must catch.

Each stands in for one function of the product, in a database without the guards that would not let it commit.
A chaos test that cannot fail proves nothing.
"""

import time
from dataclasses import replace

from sqlalchemy import text

from farm import queue
from farm.db import transaction
from farm.queue import Settled
from workers import shelf

BETWEEN = "between the two transactions"

# what has to be taken from the database before a variant can do wrong
GUARDS = {
    "result, then bill": [
        "ALTER TABLE frames DISABLE TRIGGER frames_agree",
    ],
    "bill without UNIQUE, then result": [
        "ALTER TABLE usage DISABLE TRIGGER usage_agrees",
        "ALTER TABLE frames DISABLE TRIGGER frames_agree",
        "ALTER TABLE usage DROP CONSTRAINT usage_pkey",
    ],
    "key without the hash, prompt reclaim": [
        "ALTER TABLE images DROP CONSTRAINT images_check",
    ],
}

MINE = """
    frames AS f JOIN unnest(CAST(:frames AS uuid[]), CAST(:packs AS bigint[]), CAST(:keys AS text[]))
        AS s (id, pack_id, key) ON s.id = f.id
"""
RESULT = f"""
    WITH mine AS MATERIALIZED (
        SELECT f.id, f.job_id, s.key FROM {MINE}
        WHERE f.status = 'claimed' AND f.pack_id = s.pack_id
        FOR UPDATE OF f
    ), done AS (
        UPDATE frames SET status = 'done', pack_id = NULL, suspect = false, ended_at = clock_timestamp(),
            image_id = (SELECT i.id FROM images AS i JOIN mine AS m USING (key) WHERE m.id = frames.id)
        FROM mine WHERE mine.id = frames.id
    ), counted AS (
        INSERT INTO counts (job_id, done, freed)
        SELECT m.job_id, count(*), sum(f.quantity * p.rate * 0.00000095367431640625)
        FROM mine AS m JOIN frames AS f USING (id) JOIN prices AS p ON p.id = f.price_id
        GROUP BY m.job_id
    ), told AS (
        INSERT INTO outbox (account_id, job_id, frame_id, kind)
        SELECT f.account_id, f.job_id, f.id, 'frame.done' FROM mine JOIN frames AS f USING (id)
    )
    SELECT id FROM mine
"""
BILL = f"""
    INSERT INTO usage
        (frame_id, account_id, job_id, model, method, currency, price_id, rate, quantity, amount)
    SELECT f.id, f.account_id, f.job_id, k.model, p.method, p.currency, p.id, p.rate, f.quantity,
           f.quantity * p.rate * 0.00000095367431640625
    FROM {MINE}
    JOIN prices AS p ON p.id = f.price_id
    JOIN job_keys AS k ON k.job_id = f.job_id AND k.key_no = f.key_no
    WHERE f.status = 'claimed' AND f.pack_id = s.pack_id OR f.id = ANY (CAST(:settled AS uuid[]))
"""
HOLD = "SELECT id FROM packs WHERE id = ANY (CAST(:packs AS bigint[])) ORDER BY id FOR UPDATE"
CLOSE = """
    UPDATE packs SET outcome = 'settled', closed_at = clock_timestamp()
    WHERE id = ANY (CAST(:packs AS bigint[])) AND closed_at IS NULL
      AND NOT EXISTS (SELECT FROM frames AS f WHERE f.pack_id = packs.id)
"""
IMAGES = """
    INSERT INTO images (account_id, key, format, sha256, pixel_sha256, bytes, width, height)
    SELECT f.account_id, :key, :format, :sha256, :pixel_sha256, :bytes, :width, :height
    FROM frames AS f WHERE f.id = :frame
    ON CONFLICT (key) DO NOTHING
"""


def _result(stored) -> list:
    with transaction() as db:
        db.execute(text(HOLD), _arrays(stored))
        for s in stored:
            facts = ("key", "format", "sha256", "pixel_sha256", "bytes", "width", "height")
            db.execute(text(IMAGES), {"frame": s.frame_id, **{name: getattr(s, name) for name in facts}})
        settled = list(db.scalars(text(RESULT), _arrays(stored)))
        db.execute(text(CLOSE), _arrays(stored))
        return settled


def _bill(stored, settled) -> int:
    with transaction() as db:
        db.execute(text(HOLD), _arrays(stored))
        return db.execute(text(BILL), {**_arrays(stored), "settled": settled}).rowcount


def _settled(frames: list) -> Settled:
    return Settled(done=frozenset(frames), cancelled=frozenset(), over=frozenset())


def _arrays(stored) -> dict[str, list]:
    return {
        "frames": [s.frame_id for s in stored],
        "packs": [s.pack_id for s in stored],
        "keys": [s.key for s in stored],
    }


def install(name: str, fate) -> None:
    """Make this process work as the variant does."""

    def result_then_bill(db, stored, *, gpu_ms=None, commit=False) -> Settled:
        settled = _result(stored)
        if settled:
            fate.reached(BETWEEN)
        _bill(stored, settled)
        return _settled(settled)

    def bill_then_result(db, stored, *, gpu_ms=None, commit=False) -> Settled:
        if _bill(stored, []):
            fate.reached(BETWEEN)
        return _settled(_result(stored))

    if name == "result, then bill":
        queue.settle = result_then_bill
    elif name == "bill without UNIQUE, then result":
        queue.settle = bill_then_result
    else:
        _forget_the_hash()


def _forget_the_hash() -> None:
    """Store each frame under its own name; and say in the image when it was made, as many renderers do."""
    keep, provenance = shelf.Shelf._encode_and_put, shelf.provenance

    class Named:
        """The store as one frame sees it: whatever key it is given, it uses the frame's."""

        def __init__(self, store, key: str) -> None:
            self._store, self.key = store, key

        def put(self, key: str, data: bytes, *, content_type: str) -> None:
            self._store.put(self.key, data, content_type=content_type)

    def encode_and_put(self, entry, model, frame, pixels):
        key = f"v1/{frame.account_id.hex}/{frame.id.hex}.png"
        mine = object.__new__(shelf.Shelf)
        mine.__dict__ = {**self.__dict__, "_store": Named(self._store, key)}
        stored, data = keep(mine, entry, model, frame, pixels)
        return replace(stored, key=key), data

    shelf.Shelf._encode_and_put = encode_and_put
    shelf.provenance = lambda *spec, **more: {**provenance(*spec, **more), "made at": str(time.time_ns())}
