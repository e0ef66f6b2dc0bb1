"""How images leave the store: past an account's retention, deleted with a job's, or never booked.

A job's images are deleted by a verb on the job (delete_images, or expire past the retention). From then on none is
shown. The sweep goes through the job's frames (clear): an image that no frame of another job needs gets a tombstone,
images.deleted_at. A file nobody booked gets one as well (Orphans). The purge alone deletes files, those with a
tombstone, and then writes purged_at.

Why no file is lost that a frame needs, whoever stalls, and whatever the clocks of workers say:

 1. A file is deleted only while its row is a tombstone without purged_at.
 2. settle.sql books no frame onto a tombstone: `frames` refuses the whole transaction. Two that come at once meet at
    the unique key or at the row, so that one sees what the other did.
 3. The worker then settles through revive(): a tombstone is an image again only if its file was gone (purged_at)
    MARGIN_S before the frame's pack was claimed, and so before the file was stored anew. Otherwise the worker keeps
    the image, asks past_margin() until that much time has passed, stores it anew and settles it as stored since then.
    A worker that drains gives the frame back instead. Settling pays nothing for this while no tombstone is met.
 4. One sweep at a time purges, under a lock that lasts as long as its connection: frozen, it keeps the lock.

What is left is a DELETE that a network delivers MARGIN_S after it was answered or given up, or a purge that was cut
from the database, frozen and woken after another has purged, and a frame rendered in between. Where the store keeps
versions not even that: versions are deleted by their id.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from time import monotonic
from typing import Any
from uuid import UUID

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from farm import events, ids
from farm.db import hot, sql, transaction
from farm.errors import Conflict, FarmError, Fault, Invalid, NotFound
from farm.settings import settings
from farm.spec import Format
from farm.storage import Store, Stored, open_store, read_image_key
from farm.tables import Account, Job

log = logging.getLogger(__name__)

MARGIN_S = 60.0  # longer than a request to the store is under way
MOST_DAYS = 36_500
PAGE = 500  # frames looked at in one transaction
KEYS = 1000  # listed keys looked at in one transaction
DELETERS = 8  # files deleted at the same time
TURN_S = 2.0  # of listing or deleting, before the other chores have their turn


@dataclass(frozen=True, slots=True)
class Revived:
    """What became of tombstones that stored frames met: image ids that live again, keys that may not yet."""

    images: frozenset[int]
    refused: frozenset[str]


def keep_for(account: Account, days: int | None) -> None:
    """Set for how many days after a job's end an account's images are kept; None: for ever.

    Raises Invalid if it is not 1 to 36500.
    """
    if days is not None and not 1 <= days <= MOST_DAYS:
        raise Invalid(
            [Fault("retention_days", days, f"allowed are 1 to {MOST_DAYS}, or null to keep images")]
        )
    account.retention_days = days


def delete_images(db: Session, account_id: UUID, job_id: UUID) -> Job:
    """Delete the images of a job that has ended: from now on none is shown, and the sweep removes the files.

    An image that a frame of another job needs as well stays for that one. Asked again, it changes nothing.
    Raises NotFound if the account has no such job, Conflict if it has not ended.
    """
    wanted = select(Job).where(Job.id == job_id, Job.account_id == account_id)
    job = db.scalar(wanted.with_for_update(key_share=True))
    if job is None:
        raise NotFound(job=ids.public("job", job_id))
    if job.ended_at is None:
        raise Conflict("this job has not ended; cancel it first", job=ids.public("job", job_id))
    if job.images_deleted_at is None:
        job.images_deleted_at = db.scalar(text("SELECT clock_timestamp()"))
        events.record(db, "job.images_deleted", account_id=account_id, job_id=job_id)
    return job


def expire(db: Session, *, limit: int = 1000) -> int:
    """Delete the images of jobs past their account's retention. Returns of how many jobs."""
    rows = hot(db, "expire", {"n": limit})
    for row in rows:
        events.record(db, "job.images_deleted", account_id=row.account_id, job_id=row.id)
    return len(rows)


def clear(db: Session) -> int:
    """Look at the next frames of a job whose images were deleted. Returns how many."""
    job = db.scalar(
        select(Job)
        .where(Job.images_deleted_at.is_not(None), Job.images_cleared < Job.frames)
        .order_by(Job.images_deleted_at)
        .limit(1)
        .with_for_update(skip_locked=True, key_share=True)
    )
    if job is None:
        return 0
    to = min(job.frames, job.images_cleared + PAGE)
    page = {"first": ids.frame_id(job.id, job.images_cleared), "last": ids.frame_id(job.id, to - 1)}
    ((there, free),) = hot(db, "clear_lock", page)
    bury(db, free)
    if there != len(free):  # somebody is about to point to one of them: again, when that is decided
        return 0
    looked_at, job.images_cleared = to - job.images_cleared, to
    return looked_at


def bury(db: Session, images: Iterable[int]) -> int:
    """Make tombstones of those images that no frame needs; their rows are locked already. Returns how many."""
    result = db.execute(sql("bury"), {"images": list(images)})
    return int(getattr(result, "rowcount", 0))


def revive(db: Session, stored: Sequence[dict[str, Any]]) -> Revived:
    """Make images of those tombstones whose files were certainly stored anew.

    stored: key, pack_id, pixel_sha256 in hex, bytes, width, height and since of each frame. Settle in the same
    transaction, leave out the refused keys, and bury() what lives again: no frame may have come to need it.
    """
    rows = db.execute(sql("revive"), {"stored": json.dumps(list(stored)), "margin_s": MARGIN_S}).all()
    return Revived(frozenset(r.id for r in rows if r.alive), frozenset(r.key for r in rows if not r.alive))


PAST_MARGIN = """
    SELECT now.at, ARRAY (
        SELECT k.key FROM unnest(CAST(:keys AS text[])) AS k (key)
        WHERE NOT EXISTS (
            SELECT FROM images AS i
            WHERE i.key = k.key AND i.deleted_at IS NOT NULL
              AND (i.purged_at IS NULL OR i.purged_at + make_interval(secs => :margin_s) >= now.at)
        )
    ) AS ready
    FROM (SELECT clock_timestamp() AS at OFFSET 0) AS now
"""


def past_margin(db: Session, keys: Sequence[str]) -> tuple[datetime, frozenset[str]]:
    """The time, and which of these keys revive() takes if they are stored from now on."""
    row = db.execute(text(PAST_MARGIN), {"keys": list(keys), "margin_s": MARGIN_S}).one()
    return row.at, frozenset(row.ready)


# ------------------------------------------------------------------------------------------------ files


def _store() -> Store:
    return open_store(settings().storage_url.get_secret_value())


class Orphans:
    """Goes through the store again and again, and condemns the files that no image has, after a grace.

    A file is stored before its row commits: a young one may be about to get its row.
    """

    def __init__(self) -> None:
        self._listing: Iterator[Stored] | None = None
        self._of = ""

    @property
    def unfinished(self) -> bool:
        """Whether the next turn goes on where this one stopped."""
        return self._listing is not None

    def turn(self) -> int:
        """Look at some pages, in a transaction each. Returns how many files were condemned."""
        url = settings().storage_url.get_secret_value()
        if self._listing is None or self._of != url:
            store = open_store(url)
            store.clear_leftovers()
            self._listing, self._of = store.list("v1/"), url
        listing, self._listing = self._listing, None  # an error begins anew
        condemned, until = 0, monotonic() + TURN_S
        while page := list(islice(listing, KEYS)):
            condemned += _condemn(page)
            if monotonic() > until:
                self._listing = listing
                break
        return condemned


def _condemn(page: Sequence[Stored]) -> int:
    with transaction() as db:  # whatever this machine's clock says
        now = db.scalars(select(func.clock_timestamp())).one()
    old = now - timedelta(seconds=settings().orphan_grace_s)
    found = [(s.key, k) for s in page if s.modified < old and (k := read_image_key(s.key)) is not None]
    known = [(key, k) for key, k in found if k.format in list(Format)]
    if not known:
        return 0
    with transaction() as db:
        condemned = db.scalars(
            sql("condemn"),
            {
                "keys": [key for key, _ in known],
                "accounts": [k.account_id for _, k in known],
                "formats": [k.format for _, k in known],
                "hashes": [k.sha256 for _, k in known],
            },
        ).all()
    for key in condemned:
        log.info("nobody booked %s: it goes", key)
    return len(condemned)


DYING = """
    SELECT id, key FROM images WHERE deleted_at IS NOT NULL AND purged_at IS NULL AND id > :after ORDER BY id LIMIT :n
"""
PURGED = """
    UPDATE images SET purged_at = clock_timestamp()
    WHERE id = ANY (CAST(:images AS bigint[])) AND deleted_at IS NOT NULL AND purged_at IS NULL
"""
# a day is longer than any pack is rendered: nobody meets it any more
FORGET = """
    DELETE FROM images WHERE id = ANY (ARRAY (
        SELECT id FROM images WHERE pixel_sha256 IS NULL AND purged_at < clock_timestamp() - interval '1 day' LIMIT 1000
    ))
"""


def purge() -> int:
    """Delete the files of tombstones, with every version the store keeps, and say so. Returns how many.

    One sweep at a time, please. Raises what the store raises, after what was deleted is written down.
    """
    purged, after, until = 0, 0, monotonic() + TURN_S
    store = _store()
    with ThreadPoolExecutor(DELETERS, thread_name_prefix="purge") as deleters:
        while monotonic() < until:
            with transaction() as db:
                rows = db.execute(text(DYING), {"after": after, "n": 25 * DELETERS}).all()
            if not rows:
                break
            errors = list(deleters.map(lambda row: _delete(store, row.key), rows))
            gone = [row.id for row, error in zip(rows, errors, strict=True) if error is None]
            with transaction() as db:
                db.execute(text(PURGED), {"images": gone})
            purged, after = purged + len(gone), rows[-1].id
            if error := next((e for e in errors if e is not None), None):
                raise error
    return purged


def _delete(store: Store, key: str) -> FarmError | None:
    try:
        store.delete(key)
    except FarmError as e:
        return e
    return None


def forget(db: Session) -> int:
    """Drop tombstones of files that no frame ever had, a day after they went."""
    return int(getattr(db.execute(text(FORGET)), "rowcount", 0))
