"""Files that accounts send under an id of their own: requests of a batch, and what other APIs call a file.

A file lies under files/{account}/{id}. As with inputs its row is made before it and says by stored_at that it is
there, and a row that is deleted never comes back, so that the file may go at any time.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Select, func, select, text, update
from sqlalchemy.orm import Session

from farm import ids
from farm.db import transaction
from farm.errors import Gone, NotFound, StorageAway, TooLarge
from farm.settings import settings
from farm.storage import delete_some, open_store
from farm.tables import File

ID = re.compile(r"file-([0-9a-f]{32})")
AT_ONCE = 500
PENDING_S = 3600  # a file that was not stored by then never will be
OLD = """
UPDATE files SET deleted_at = clock_timestamp()
WHERE id = ANY (ARRAY (
    SELECT id FROM files
    WHERE deleted_at IS NULL AND (created_at < clock_timestamp() - make_interval(secs => :keep_s)
          OR (stored_at IS NULL AND created_at < clock_timestamp() - make_interval(secs => :pending_s)))
    LIMIT :n FOR UPDATE SKIP LOCKED))
"""
DYING = """
SELECT id, account_id FROM files WHERE deleted_at IS NOT NULL AND purged_at IS NULL ORDER BY id LIMIT :n
"""


def public(file_id: UUID) -> str:
    """`file-0192…`, as OpenAI writes it."""
    return f"file-{file_id.hex}"


def parse(shown: str) -> UUID:
    """Raises NotFound if it is no file's id."""
    match = ID.fullmatch(shown)
    if match is None:
        raise NotFound(file=shown[:100])
    return UUID(hex=match[1])


def key_of(account_id: UUID, file_id: UUID) -> str:
    return f"files/{account_id.hex}/{file_id.hex}"


def put(
    account_id: UUID,
    data: bytes,
    *,
    purpose: str,
    filename: str,
    content_type: str,
    labels: dict[str, Any] | None = None,
) -> UUID:
    """Store a file's bytes, in a transaction of its own. It is there once finish() says so.

    Raises TooLarge if the account's files take as much as they may, StorageAway; the file may then be sent again.
    """
    with transaction() as db:
        _check_room(db, account_id, len(data))
        made = File(
            id=ids.new_id(ids.clock_ms(db)), account_id=account_id, purpose=purpose, filename=filename,
            content_type=content_type, bytes=len(data), sha256=hashlib.sha256(data).digest(), labels=labels,
        )  # fmt: skip
        db.add(made)
    store = open_store(settings().storage_url.get_secret_value())
    store.put(key_of(account_id, made.id), data, content_type=content_type)
    return made.id


def finish(db: Session, file_id: UUID) -> File:
    """Say that a file is there. Raises StorageAway if storing it took too long."""
    stored = update(File).where(File.id == file_id, File.deleted_at.is_(None))
    row: File | None = db.scalar(stored.values(stored_at=func.clock_timestamp()).returning(File))
    if row is None:
        raise StorageAway("storing the file took too long")
    return row


def drop(db: Session, file_id: UUID) -> None:
    """Let go of a file that was put, and is not wanted after all."""
    db.execute(update(File).where(File.id == file_id).values(deleted_at=func.clock_timestamp()))


def _check_room(db: Session, account_id: UUID, size: int) -> None:
    kept = select(func.count(), func.coalesce(func.sum(File.bytes), 0))
    count, used = db.execute(kept.where(File.account_id == account_id, File.deleted_at.is_(None))).one()
    if count >= settings().max_files:
        raise TooLarge(f"the account keeps {count} files, and may keep {settings().max_files}; delete some")
    if used + size > settings().max_files_bytes:
        allowed = settings().max_files_bytes
        raise TooLarge(
            f"the account's files take {used} bytes, and may take {allowed}; this one has {size}",
            used_bytes=int(used), allowed_bytes=allowed, needed_bytes=size,
        )  # fmt: skip


def find(db: Session, account_id: UUID, file_id: UUID) -> File:
    """One of the account's files.

    Raises NotFound for another account's as for one that does not exist, Gone for one that was deleted.
    """
    row = db.scalar(
        select(File).where(File.id == file_id, File.account_id == account_id, File.stored_at.is_not(None))
    )
    if row is None:
        raise NotFound(file=public(file_id))
    if row.deleted_at is not None:
        raise Gone("this file was deleted", file=public(file_id))
    return row


def content(row: File) -> bytes:
    """Raises Gone if it was deleted meanwhile, StorageAway."""
    try:
        return open_store(settings().storage_url.get_secret_value()).get(key_of(row.account_id, row.id))
    except NotFound:
        raise Gone("this file was deleted", file=public(row.id)) from None


def every(
    db: Session,
    account_id: UUID,
    *,
    after: UUID | None = None,
    purpose: str | None = None,
    limit: int = 100,
    oldest_first: bool = False,
) -> Sequence[File]:
    """An account's files; those that come after one."""
    query = _live(account_id)
    if after is not None:
        query = query.where(File.id > after if oldest_first else File.id < after)
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    return db.scalars(query.order_by(File.id if oldest_first else File.id.desc()).limit(limit)).all()


def remove(db: Session, account_id: UUID, file_id: UUID) -> None:
    """Delete a file now; its bytes go with the next sweep. What was made from it stays.

    Raises NotFound or Gone as find() does.
    """
    find(db, account_id, file_id)
    drop(db, file_id)


def _live(account_id: UUID) -> Select[File]:
    return select(File).where(
        File.account_id == account_id, File.stored_at.is_not(None), File.deleted_at.is_(None)
    )


# ------------------------------------------------------------------------------------------------ to forget


def expire(db: Session) -> int:
    """Delete files after FARM_FILE_DAYS. Returns how many."""
    times = {"keep_s": settings().file_days * 86_400, "pending_s": PENDING_S, "n": AT_ONCE}
    return int(getattr(db.execute(text(OLD), times), "rowcount", 0))


def purge() -> int:
    """Remove the bytes of deleted files, and say so. Returns how many. One sweep at a time, please."""
    store = open_store(settings().storage_url.get_secret_value())
    with transaction() as db:
        rows = db.execute(text(DYING), {"n": AT_ONCE}).all()
    gone, error = delete_some(store, [key_of(r.account_id, r.id) for r in rows])
    with transaction() as db:
        db.execute(
            update(File)
            .where(File.id.in_([r.id for r in rows[:gone]]))
            .values(purged_at=func.clock_timestamp())
        )
    if error is not None:
        raise error
    return gone
