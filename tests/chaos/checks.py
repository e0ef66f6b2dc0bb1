"""What must be true of a farm after the chaos: one function, for the product and for what must fail it."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from io import BytesIO
from pathlib import Path
from uuid import UUID

import numpy as np
from PIL import Image
from sqlalchemy import text
from sqlalchemy.orm import Session

from farm import ledger
from farm.spec import Spec
from tests.chaos.engine import picture

FRAMES = """
    SELECT f.id, f.status, f.reason, f.seed, f.spec, j.status AS job, j.ended_at IS NOT NULL AS over,
           (SELECT count(*) FROM usage AS u WHERE u.frame_id = f.id) AS charges,
           (SELECT count(*) FROM events AS e WHERE e.frame_id = f.id)
           + (SELECT count(*) FROM outbox AS o WHERE o.frame_id = f.id) AS told,
           i.key, i.sha256, i.bytes
    FROM frames AS f JOIN jobs AS j ON j.id = f.job_id LEFT JOIN images AS i ON i.id = f.image_id
    ORDER BY f.id
"""
OPEN_PACKS = "SELECT id FROM packs WHERE closed_at IS NULL"


def wrongs(db: Session, *, read: Callable[[str], bytes | None], submitted: Collection[UUID]) -> Counter[str]:
    """Everything that is not as it must be, by kind, with how often; empty if all is well.

    read: the file of a key as the store has it, None if it has none.
    """
    db.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))  # reading all files takes its time
    found: Counter[str] = Counter(v.violation for v in ledger.audit(db))
    frames = db.execute(text(FRAMES)).all()
    found["frame lost"] += len(set(submitted) - {f.id for f in frames})
    found["frame nobody submitted"] += len({f.id for f in frames} - set(submitted))
    found["pack left open"] += len(db.execute(text(OPEN_PACKS)).all())
    for frame in frames:
        found.update(_of_books(frame))
        if frame.status == "done":
            found.update(_of_image(frame, read(frame.key)))
    return +found


def _of_books(frame) -> Iterator[str]:
    ended = ("done", "failed", "cancelled") if frame.job == "cancelled" else ("done", "failed")
    if frame.status not in ended:
        yield f"frame left {frame.status}"
    if frame.status == "failed" and not frame.reason:
        yield "failed without a reason"
    if not frame.over:
        yield "frame of a job that never ended"
    if frame.charges < (frame.status == "done"):
        yield "unbilled"
    if frame.charges > (frame.status == "done"):
        yield "billed twice" if frame.status == "done" else "billed, but not delivered"
    if frame.told != 1 and frame.status != "cancelled":  # the verb told of those, as one
        yield "not told exactly once"


def _of_image(frame, data: bytes | None) -> Iterator[str]:
    if data is None:
        yield "image lost"
        return
    sha256 = hashlib.sha256(data)
    if sha256.digest() != frame.sha256 or len(data) != frame.bytes:
        yield "image ≠ hash"
    if Path(frame.key).stem != sha256.hexdigest():
        yield "image ≠ key"
    pixels = np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    if not np.array_equal(pixels, picture(Spec.from_json(frame.spec), frame.seed)):
        yield "another frame's image"
