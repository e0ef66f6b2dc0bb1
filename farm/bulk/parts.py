"""Parts of a bulk upload: read, sorted into frames and errors, and stored, each in one transaction.

The frames, their names, the errors and the offset up to which the file is in are one step. The offset is the fence: who
comes with another one is told where the upload is by now.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from farm import control, ids, inputs
from farm.accounts import Caller
from farm.bulk.lines import Error, Read, Reader, Row
from farm.bulk.staging import Stage
from farm.bulk.uploads import Form, Mode, Status, facts_of, find
from farm.catalog import Catalog, catalog
from farm.db import transaction
from farm.errors import Conflict, Fault, Invalid
from farm.faults import shortened
from farm.features import refs_of
from farm.settings import settings
from farm.tables import BulkChunk, BulkError, BulkUpload

KEPT_ERRORS = 100_000  # of one upload; more are counted


class Part(NamedTuple):
    """A part of a file that was read. sha256: of its bytes; empty of a matrix."""

    read: Read
    sha256: bytes
    columns: Sequence[str] | None


class Intake:
    """Takes in the parts of one upload, in order, each in a transaction of its own.

    A part is read, and then stored; the next one may be read meanwhile, by another thread.
    """

    def __init__(self, caller: Caller, upload: BulkUpload, *, models: Catalog | None = None) -> None:
        self.upload_id, self.received = upload.id, upload.received
        self.lines = upload.lines  # that were read
        self.caller, self._form = caller, Form(upload.format)
        self._stage = Stage(caller, upload.id, facts_of(upload), models or catalog())
        self._reader = Reader(models or catalog(), self._stage.facts.defaults(), columns=upload.columns)

    def read(self, data: bytes, *, final: bool = False) -> Part:
        """Read the whole lines at the start of this. final: the last one may lack its end.

        Raises Invalid if it is not a file of this kind.
        """
        reader = self._reader.csv if self._form is Form.CSV else self._reader.ndjson
        read = reader(data, line=self.lines, final=final)
        self.lines += read.lines
        return Part(read, hashlib.sha256(data[: read.used]).digest(), self._reader.columns)

    def take(self, data: bytes, *, final: bool = False) -> int:
        """Read and store the whole lines at the start of this. Returns the bytes used."""
        part = self.read(data, final=final)
        self.store(part)
        return part.read.used

    def rows(self, rows: list[Row]) -> None:
        """Store frames that were made otherwise, places of a matrix: bytes and lines are their number."""
        self.store(Part(Read(len(rows), len(rows), rows), b"", None))

    def store(self, part: Part) -> None:
        """Take in a part that was read.

        Raises Conflict if the upload is elsewhere by now, BudgetExceeded, QueueFull, Invalid if it has too many lines;
        what came before is in, and the upload goes on from there.
        """
        read = part.read
        if not read.used:
            return
        with transaction() as db:
            upload = _fenced(db, self.caller, self.upload_id, self.received)
            good, bad = _sorted_out(db, upload, read, self._reader)
            doomed = upload.mode == Mode.ALL_OR_NOTHING and (upload.bad or bad)
            if upload.good + len(good) > settings().max_bulk:
                allowed = f"allowed are {settings().max_bulk} lines in one upload"
                raise Invalid([Fault("line", upload.good + len(good), allowed)])
            _keep_errors(db, upload, bad)
            now = control.now(db)
            bad_lines = len({e.line for e in bad})
            if part.sha256:
                db.add(BulkChunk(upload_id=upload.id, account_id=upload.account_id, upto=upload.received + read.used,
                                 sha256=part.sha256))  # fmt: skip
            upload.touched_at = now
            upload.columns = list(part.columns) if part.columns else None
            upload.received += read.used
            upload.lines += read.lines
            upload.bad += bad_lines
            first, upload.good = upload.good, upload.good + len(good)
            if good and not doomed:
                upload.stored += len(good)
            db.flush()
            if good and not doomed:
                self._stage.put(
                    db, good, first=first
                )  # last: of an account with a budget one is let in at a time
        self.received += read.used


def _fenced(db: Session, caller: Caller, upload_id: UUID, received: int) -> BulkUpload:
    """The upload, locked, if it is open and still there where the caller goes on from."""
    upload = find(db, caller.account_id, upload_id, lock=True)
    if upload.status != Status.OPEN:
        raise Conflict(
            f"this upload is {upload.status}", upload=ids.public("blk", upload_id), status=upload.status
        )
    if upload.received != received:
        raise Conflict(
            f"this upload has {upload.received} bytes by now; go on from there",
            upload=ids.public("blk", upload_id), offset=upload.received,
        )  # fmt: skip
    return upload


def _sorted_out(db: Session, upload: BulkUpload, read: Read, reader: Reader) -> tuple[list[Row], list[Error]]:
    """The lines that are frames, in order, and what is wrong with the others: also with those whose name is taken."""
    rows, errors = read.rows, read.errors
    if read.unresolved:
        rows, more = _with_inputs(db, upload, read, reader)
        errors = [*errors, *more]
    names = [r.name for r in rows if r.name is not None]
    if not names:
        return rows, errors
    taken: set[str | None] = set(
        db.scalars(
            text("SELECT custom_id FROM frame_names WHERE job_id = :job AND custom_id = ANY (:names)"),
            {"job": upload.id, "names": names},
        )
    )
    if not taken and len(set(names)) == len(names):
        return rows, errors
    good, bad = [], []
    for row in rows:
        if row.name in taken:
            bad.append(Error(row.line, row.name, Fault("custom_id", row.name, TAKEN)))
        else:
            taken.add(row.name)
            good.append(row)
    return good, [*errors, *bad]


TAKEN = "it is there on an earlier line, which stays; each has to be unique in the upload"
AWAY = "there is no input of that name; send it to /v1/inputs first"


def _with_inputs(
    db: Session, upload: BulkUpload, read: Read, reader: Reader
) -> tuple[list[Row], list[Error]]:
    asked = {ref for one in read.unresolved for _, ref in refs_of(one.asked)}
    given = inputs.there(db, upload.account_id, asked)
    rows, errors = list(read.rows), list[Error]()
    for one in read.unresolved:
        faults = [Fault(at, ref, AWAY) for at, ref in refs_of(one.asked) if ref not in given]
        found = faults or reader.resolved(one.line, one.asked, one.name, given)
        if isinstance(found, Row):
            rows.append(found)
        else:
            errors.extend(Error(one.line, one.name, f) for f in found)
    rows.sort(key=lambda r: r.line)
    return rows, errors


def _keep_errors(db: Session, upload: BulkUpload, errors: Sequence[Error]) -> None:
    if not errors or upload.bad >= KEPT_ERRORS:
        return
    counted: dict[int, int] = {}
    rows = []
    for error in sorted(errors, key=lambda e: e.line):
        no = counted.get(error.line, 0)
        counted[error.line] = no + 1
        rows.append({
            "upload_id": upload.id, "account_id": upload.account_id, "line": error.line, "no": no,
            "custom_id": error.name and clean(error.name), "field": clean(error.fault.field),
            "value": shortened(error.fault.value), "allowed": clean(error.fault.allowed, longest=1000),
        })  # fmt: skip
    db.execute(insert(BulkError), rows)


def clean(text_: str, *, longest: int = 255) -> str:
    """Text as Postgres can keep it, cut when long."""
    kept = text_.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
    return kept if len(kept) <= longest else kept[: longest - 1] + "…"
