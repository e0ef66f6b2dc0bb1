"""Input images: sent by accounts, kept once by their hash, used by jobs, removed when nobody needs them.

A spec names them as sha256:…, which says what it is made from whatever became of the upload; callers may also write
inp_…, a data URL or an https URL. Those are taken in before a job is submitted: farm/api/inputs.py.

A file lies under inputs/{account}/{id}. Its row is made before it and says by stored_at that it is there; a row
that is deleted never comes back, so that its file may go at any time.
"""

import base64
import binascii
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes
from uuid import UUID

from sqlalchemy import Select, func, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from farm import ids, limits, picture
from farm.db import transaction
from farm.errors import Conflict, Fault, Gone, Invalid, NotFound, StorageAway
from farm.features import Given
from farm.picture import Picture
from farm.settings import settings
from farm.spec import CONTENT_TYPE, Format
from farm.storage import Store, delete_some, open_store
from farm.tables import Input, Job, JobInput

TOUCH_S = 3600  # used_at is right within this
PENDING_S = 3600  # a file that was not stored by then never will be
AT_ONCE = 500
ANY_TYPE = ("", "application/octet-stream", "binary/octet-stream")


@dataclass(frozen=True, slots=True)
class InputView:
    """An input and how many open jobs need it."""

    input: Input
    jobs: int


def key_of(account_id: UUID, input_id: UUID) -> str:
    return f"inputs/{account_id.hex}/{input_id.hex}"


# ------------------------------------------------------------------------------------------------ to send


def look_at(data: bytes, content_type: str, *, field: str) -> Picture:
    """Decode what was sent, somewhere harmless, and compare it with what it claims to be.

    Raises Invalid naming the field.
    """
    if not data:
        raise Invalid([Fault(field, None, "it is empty; send a PNG, JPEG or WebP file")])
    if len(data) > settings().input_bytes:
        raise Invalid([Fault(field, f"{len(data)} bytes", f"allowed are {settings().input_bytes} bytes")])
    claimed = content_type.partition(";")[0].strip().lower()
    try:
        found = picture.inspect(data)
    except ValueError as e:
        raise Invalid([Fault(field, claimed or None, str(e))]) from None
    real = CONTENT_TYPE[Format(found.format)]
    if claimed not in (*ANY_TYPE, real):
        raise Invalid([Fault(field, claimed, f"it is {real}, and has to be called so")])
    return found


def keep(account_id: UUID, data: bytes, found: Picture) -> tuple[UUID, bool]:
    """Store a file that was looked at, in transactions of its own. Returns its id, and False if it was there.

    Raises TooLarge if the account keeps as many as it may, StorageAway; the file may then be sent again.
    """
    digest = hashlib.sha256(data).digest()
    with transaction() as db:
        if (there := _touch(db, account_id, digest)) is not None:
            return there, False
        limits.check_input(db, account_id, len(data))
        made = ids.new_id(ids.clock_ms(db))
        db.add(
            Input(
                id=made, account_id=account_id, sha256=digest, format=found.format, bytes=len(data),
                width=found.width, height=found.height,
            )
        )  # fmt: skip
    store = open_store(settings().storage_url.get_secret_value())
    store.put(key_of(account_id, made), data, content_type=CONTENT_TYPE[Format(found.format)])
    try:
        with transaction() as db:
            stored = update(Input).where(Input.id == made, Input.deleted_at.is_(None))
            done = db.execute(stored.values(stored_at=func.clock_timestamp()).returning(Input.id)).all()
    except IntegrityError:  # the same was sent at the same time, and was faster; this row goes with the sweep
        with transaction() as db:
            if (there := _touch(db, account_id, digest)) is not None:
                return there, False
        raise StorageAway("the input was removed meanwhile") from None
    if not done:
        raise StorageAway("storing the input took too long")
    return made, True


def _touch(db: Session, account_id: UUID, digest: bytes) -> UUID | None:
    """The live input of that hash, which is then good for another while."""
    found = db.scalar(_live(account_id).where(Input.sha256 == digest).with_for_update())
    if found is None:
        return None
    found.used_at = db.scalars(select(func.clock_timestamp())).one()
    return found.id


def data_of(url: str, *, field: str) -> tuple[bytes, str]:
    """The bytes of a data URL, and the type it claims.

    Raises Invalid naming the field.
    """
    head, comma, body = url.partition(",")
    kind = head.removeprefix("data:")
    try:
        if not comma:
            raise ValueError
        if kind.endswith(";base64"):
            return base64.b64decode(unquote_to_bytes(body), validate=True), kind.removesuffix(";base64")
        return unquote_to_bytes(body), kind or "text/plain"
    except (ValueError, binascii.Error):
        raise Invalid([Fault(field, head[:60], "allowed is data:image/…;base64,…")]) from None


# ------------------------------------------------------------------------------------------------ to use


def known(db: Session, account_id: UUID, refs: Collection[str]) -> dict[str, Given]:
    """The account's inputs by how specs name them; they stay until this transaction ends.

    Raises NotFound for another account's as for one that does not exist, Gone for one that was removed.
    """
    found = there(db, account_id, refs)
    for ref in refs:
        if ref not in found:
            _miss(db, account_id, ref)
    return found


def there(db: Session, account_id: UUID, refs: Collection[str]) -> dict[str, Given]:
    """Those of the account's inputs that are there, by how specs name them; they stay until this transaction ends."""
    if not refs:
        return {}
    by_id = {ids.parse("inp", ref): ref for ref in refs if ref.startswith("inp_")}
    by_hash = {bytes.fromhex(ref[7:]): ref for ref in refs if ref.startswith("sha256:")}
    rows = db.scalars(
        _live(account_id)
        .where(or_(Input.id.in_(by_id), Input.sha256.in_(by_hash)))
        .order_by(Input.id)
        .with_for_update(read=True)
    ).all()
    found = {}
    for row in rows:
        for ref in (by_id.get(row.id), by_hash.get(row.sha256)):
            if ref is not None:
                found[ref] = Given(row.sha256.hex(), row.width, row.height)
    return found


def _miss(db: Session, account_id: UUID, ref: str) -> None:
    same = (
        Input.id == ids.parse("inp", ref)
        if ref.startswith("inp_")
        else Input.sha256 == bytes.fromhex(ref[7:])
    )
    gone = db.scalar(select(Input).where(Input.account_id == account_id, same, Input.deleted_at.is_not(None)))
    if gone is not None:
        raise Gone("this input was removed; send it again", input=ref)
    raise NotFound("there is no input of that name; send it to /v1/inputs first", input=ref)


def bind(db: Session, account_id: UUID, job_id: UUID, hashes: Iterable[str]) -> None:
    """Keep these inputs, named as sha256:…, while the job is open."""
    wanted = sorted(bytes.fromhex(h.removeprefix("sha256:")) for h in hashes)
    if not wanted:
        return
    rows = db.scalars(_live(account_id).where(Input.sha256.in_(wanted)).order_by(Input.id)).all()
    new = [{"job_id": job_id, "input_id": row.id, "account_id": account_id} for row in rows]
    if new:
        db.execute(
            insert(JobInput).values(new).on_conflict_do_nothing()
        )  # an upload's earlier part may need it too
    old = [r.id for r in rows]
    db.execute(
        text(
            "UPDATE inputs SET used_at = clock_timestamp() WHERE id = ANY (:old)"
            " AND used_at < clock_timestamp() - make_interval(secs => :s)"
        ),
        {"old": old, "s": TOUCH_S},
    )


def files(db: Session, account_id: UUID, hashes: Collection[str]) -> dict[str, str]:
    """Where the files of inputs lie in the store, by their sha256:…; those that were removed are left out."""
    wanted = [bytes.fromhex(h.removeprefix("sha256:")) for h in hashes]
    rows = db.scalars(_live(account_id).where(Input.sha256.in_(wanted)))
    return {f"sha256:{row.sha256.hex()}": key_of(account_id, row.id) for row in rows}


def find(db: Session, account_id: UUID, input_id: UUID) -> InputView:
    """One of the account's inputs.

    Raises NotFound for another account's as for one that does not exist, Gone for one that was removed.
    """
    row = db.scalar(
        select(Input).where(
            Input.id == input_id, Input.account_id == account_id, Input.stored_at.is_not(None)
        )
    )
    name = ids.public("inp", input_id)
    if row is None:
        raise NotFound(input=name)
    if row.deleted_at is not None:
        raise Gone("this input was removed", input=name, deleted_at=row.deleted_at.isoformat())
    return _views(db, [row])[0]


def every(db: Session, account_id: UUID, *, before: UUID | None = None, limit: int = 100) -> list[InputView]:
    """An account's inputs, newest first; those older than `before`."""
    query = _live(account_id).order_by(Input.id.desc()).limit(limit)
    return _views(db, db.scalars(query if before is None else query.where(Input.id < before)).all())


def remove(db: Session, account_id: UUID, input_id: UUID) -> None:
    """Delete an input now: its file goes with the next sweep.

    Raises NotFound or Gone as find() does, Conflict if an open job needs it.
    """
    find(db, account_id, input_id)
    db.execute(select(Input.id).where(Input.id == input_id).with_for_update())
    if _open_jobs(db, [input_id]):
        raise Conflict("an open job needs this input", input=ids.public("inp", input_id))
    db.execute(update(Input).where(Input.id == input_id).values(deleted_at=func.clock_timestamp()))


def _live(account_id: UUID) -> Select[Input]:
    return select(Input).where(
        Input.account_id == account_id, Input.stored_at.is_not(None), Input.deleted_at.is_(None)
    )


def _views(db: Session, rows: Sequence[Input]) -> list[InputView]:
    jobs = _open_jobs(db, [r.id for r in rows])
    return [InputView(row, jobs.get(row.id, 0)) for row in rows]


def _open_jobs(db: Session, wanted: Sequence[UUID]) -> Mapping[UUID, int]:
    counted = (
        select(JobInput.input_id, func.count())
        .join(Job, Job.id == JobInput.job_id)
        .where(JobInput.input_id.in_(wanted), Job.ended_at.is_(None))
        .group_by(JobInput.input_id)
    )
    return dict(db.execute(counted).tuples().all())


# ------------------------------------------------------------------------------------------------ to forget

OLD = """
SELECT id FROM inputs
WHERE deleted_at IS NULL AND (used_at < clock_timestamp() - make_interval(secs => :keep_s)
      OR (stored_at IS NULL AND used_at < clock_timestamp() - make_interval(secs => :pending_s)))
  AND NOT EXISTS (SELECT FROM job_inputs AS u JOIN jobs AS j ON j.id = u.job_id
                  WHERE u.input_id = inputs.id AND j.ended_at IS NULL)
LIMIT :n FOR UPDATE SKIP LOCKED
"""
# a statement of its own: it sees the jobs that came before the lock
EXPIRE = """
UPDATE inputs SET deleted_at = clock_timestamp()
WHERE id = ANY (:old) AND NOT EXISTS (SELECT FROM job_inputs AS u JOIN jobs AS j ON j.id = u.job_id
                                      WHERE u.input_id = inputs.id AND j.ended_at IS NULL)
"""
DYING = """
SELECT id, account_id FROM inputs WHERE deleted_at IS NOT NULL AND purged_at IS NULL AND id > :after
ORDER BY id LIMIT :n
"""


def expire(db: Session) -> int:
    """Delete inputs that no open job needs and nobody asked for within FARM_INPUT_DAYS. Returns how many."""
    times = {"keep_s": settings().input_days * 86_400, "pending_s": PENDING_S}
    old = db.scalars(text(OLD), {**times, "n": AT_ONCE}).all()
    if not old:
        return 0
    return int(getattr(db.execute(text(EXPIRE), {"old": list(old)}), "rowcount", 0))


def purge() -> int:
    """Delete the files of deleted inputs, and say so. Returns how many. One sweep at a time, please."""
    store: Store = open_store(settings().storage_url.get_secret_value())
    with transaction() as db:
        rows = db.execute(text(DYING), {"after": UUID(int=0), "n": AT_ONCE}).all()
    gone, error = delete_some(store, [key_of(r.account_id, r.id) for r in rows])
    with transaction() as db:
        db.execute(
            update(Input)
            .where(Input.id.in_([r.id for r in rows[:gone]]))
            .values(purged_at=func.clock_timestamp())
        )
    if error is not None:
        raise error
    return gone
