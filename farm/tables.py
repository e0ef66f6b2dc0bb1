"""The job database's columns and keys, for the ORM. Checks and triggers stand in migrations/."""

from datetime import date, datetime
from decimal import Decimal
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    Date,
    DateTime,
    FetchedValue,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, TSTZRANGE, ExcludeConstraint, Range
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NOW = func.now()


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "uq": "%(table_name)s_%(column_0_N_name)s_key",
            "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        bool: Boolean,
        bytes: LargeBinary,
        datetime: DateTime(timezone=True),
        Decimal: Numeric,
        dict[str, Any]: JSONB,
        int: Integer,
        list[str]: ARRAY(Text),
        str: Text,
        UUID: Uuid,
    }


class Account(Base):
    """Who pays."""

    __tablename__ = "accounts"
    __table_args__ = (UniqueConstraint("id", "currency"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    currency: Mapped[str]
    weight: Mapped[int] = mapped_column(server_default=text("1"))
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    retention_days: Mapped[int | None]
    prompt_in_images: Mapped[bool] = mapped_column(server_default=text("false"))


class ApiKey(Base):
    """How an account proves itself; the secret is computed, not stored."""

    __tablename__ = "api_keys"
    __table_args__ = (Index("api_keys_account_idx", "account_id"), UniqueConstraint("id", "account_id"))

    id: Mapped[UUID] = mapped_column(primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"))
    role: Mapped[str]
    version: Mapped[int] = mapped_column(server_default=text("1"))
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    revoked_at: Mapped[datetime | None]
    name: Mapped[str | None]
    scopes: Mapped[list[str] | None]
    expires_at: Mapped[datetime | None]
    previous_until: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class Limit(Base):
    """What an account, or one of its keys, may do at most; NULL: what the settings say."""

    __tablename__ = "limits"
    __table_args__ = (
        ForeignKeyConstraint(["api_key_id", "account_id"], ["api_keys.id", "api_keys.account_id"]),
        UniqueConstraint("account_id", "api_key_id", postgresql_nulls_not_distinct=True),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"))
    api_key_id: Mapped[UUID | None]
    reads_per_s: Mapped[float | None]
    writes_per_s: Mapped[float | None]
    submissions_per_s: Mapped[float | None]
    open_frames: Mapped[int | None] = mapped_column(BigInteger)
    inputs: Mapped[int | None]
    input_bytes: Mapped[int | None] = mapped_column(BigInteger)
    set_at: Mapped[datetime] = mapped_column(server_default=NOW)


class KeptAnswer(Base):
    """What a request that created something was answered, for who sends it again."""

    __tablename__ = "kept_answers"
    __table_args__ = (Index("kept_answers_created_idx", "created_at"),)

    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"), primary_key=True)
    operation: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[bytes]
    status: Mapped[int] = mapped_column(SmallInteger)
    headers: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    answer: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class PriceBook(Base):
    """Prices of one model by one method in one currency: one account's, or everybody's."""

    __tablename__ = "price_books"
    __table_args__ = (
        UniqueConstraint("account_id", "model", "method", "currency", postgresql_nulls_not_distinct=True),
        UniqueConstraint("id", "method", "currency"),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    account_id: Mapped[UUID | None] = mapped_column(ForeignKey("accounts.id"))
    model: Mapped[str]
    method: Mapped[str]
    currency: Mapped[str]


class PriceRow(Base):
    """A dated rate; it never changes."""

    __tablename__ = "prices"
    __table_args__ = (
        ForeignKeyConstraint(
            ["book_id", "method", "currency"],
            ["price_books.id", "price_books.method", "price_books.currency"],
        ),
        UniqueConstraint("id", "method", "currency", "rate"),
        ExcludeConstraint(
            (text("int4range(book_id, book_id, '[]')"), "&&"),
            ("valid", "&&"),
            name="prices_int4range_valid_excl",
        ),
        Index("prices_book_idx", "book_id"),
        Index("prices_set_by_idx", "set_by", postgresql_where=text("set_by IS NOT NULL")),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    book_id: Mapped[int]
    method: Mapped[str]
    currency: Mapped[str]
    rate: Mapped[Decimal]
    valid: Mapped[Range[datetime]] = mapped_column(TSTZRANGE)
    source: Mapped[str] = mapped_column(server_default=text("'catalog'"))
    set_by: Mapped[UUID | None] = mapped_column(ForeignKey("api_keys.id"))
    set_at: Mapped[datetime] = mapped_column(server_default=NOW)


class Job(Base):
    """One submission: its priority, its pause and its cancel; its frames follow."""

    __tablename__ = "jobs"
    __table_args__ = (
        ForeignKeyConstraint(["account_id", "currency"], ["accounts.id", "accounts.currency"]),
        UniqueConstraint("id", "account_id", "priority", "runnable"),
        Index("jobs_account_idx", "account_id", "id"),
        Index("jobs_open_idx", "id", postgresql_where=text("ended_at IS NULL")),
        Index(
            "jobs_kept_idx",
            "account_id",
            "ended_at",
            postgresql_where=text("ended_at IS NOT NULL AND images_deleted_at IS NULL"),
        ),
        Index(
            "jobs_uncleared_idx",
            "images_deleted_at",
            postgresql_where=text("images_deleted_at IS NOT NULL AND images_cleared < frames"),
        ),
        Index("jobs_waits_idx", "id", postgresql_where=text("waits AND ended_at IS NULL")),
        Index(
            "jobs_deadline_idx",
            "deadline",
            postgresql_where=text("deadline IS NOT NULL AND late_at IS NULL AND ended_at IS NULL"),
        ),
        Index("jobs_late_idx", "id", postgresql_where=text("status = 'late' AND ended_at IS NULL")),
        Index(
            "jobs_capped_idx", "id", postgresql_where=text("max_parallel IS NOT NULL AND ended_at IS NULL")
        ),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    account_id: Mapped[UUID]
    api_key_id: Mapped[UUID | None] = mapped_column(ForeignKey("api_keys.id"))
    name: Mapped[str | None]
    status: Mapped[str]
    priority: Mapped[int] = mapped_column(SmallInteger)
    runnable: Mapped[bool]
    frames: Mapped[int]
    currency: Mapped[str]
    quoted: Mapped[Decimal]
    held: Mapped[Decimal]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    ended_at: Mapped[datetime | None]
    rerender_of: Mapped[UUID | None]
    images_deleted_at: Mapped[datetime | None]
    images_cleared: Mapped[int] = mapped_column(server_default=text("0"))
    proof: Mapped[int | None]
    approved_at: Mapped[datetime | None]
    start_after: Mapped[datetime | None]
    deadline: Mapped[datetime | None]
    on_late: Mapped[str | None]
    late_at: Mapped[datetime | None]
    max_parallel: Mapped[int | None]
    waits: Mapped[bool] = mapped_column(server_default=text("false"))
    follows: Mapped[bool] = mapped_column(server_default=text("false"))


class JobAfter(Base):
    """A job that has to end before another is handed out; ok: with every frame done."""

    __tablename__ = "job_after"
    __table_args__ = (Index("job_after_after_idx", "after_id"),)

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    after_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"))
    ok: Mapped[bool]


class JobLane(Base):
    """A job's place in a lane, one for each of its models."""

    __tablename__ = "job_lanes"
    __table_args__ = (
        ForeignKeyConstraint(
            ["job_id", "account_id", "priority", "runnable"],
            ["jobs.id", "jobs.account_id", "jobs.priority", "jobs.runnable"],
            onupdate="CASCADE",
            ondelete="CASCADE",
        ),
        UniqueConstraint("job_id", "model", "account_id"),
        Index(
            "job_lanes_head_idx",
            "model", "priority", "account_id", "job_id",
            postgresql_where=text("runnable AND open"),
        ),
    )  # fmt: skip

    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    account_id: Mapped[UUID]
    priority: Mapped[int] = mapped_column(SmallInteger)
    runnable: Mapped[bool]
    open: Mapped[bool] = mapped_column(server_default=text("true"))


class JobKey(Base):
    """One distinct key of a job's frames."""

    __tablename__ = "job_keys"
    __table_args__ = (
        ForeignKeyConstraint(
            ["job_id", "model", "account_id"],
            ["job_lanes.job_id", "job_lanes.model", "job_lanes.account_id"],
            ondelete="CASCADE",
        ),
        UniqueConstraint("job_id", "key_no", "account_id"),
        UniqueConstraint("job_id", "call_key", "rest"),
        Index("job_keys_open_idx", "job_id", "model", "key_no", postgresql_where=text("open")),
        Index("job_keys_call_idx", "call_key", "job_id", "key_no", postgresql_where=text("open")),
        Index("job_keys_shape_idx", "shape_key", "job_id", "key_no", postgresql_where=text("open")),
    )

    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    key_no: Mapped[int] = mapped_column(primary_key=True)
    model: Mapped[str]
    account_id: Mapped[UUID]
    shape_key: Mapped[str]
    call_key: Mapped[str]
    pixels: Mapped[int]
    open: Mapped[bool] = mapped_column(server_default=text("true"))
    reuse_price_id: Mapped[int | None] = mapped_column(ForeignKey("prices.id"))
    rest: Mapped[bool] = mapped_column(server_default=text("false"))


class BulkUpload(Base):
    """A file of lines on its way to be a job, under the id the job has."""

    __tablename__ = "bulk_uploads"
    __table_args__ = (
        ForeignKeyConstraint(["account_id", "currency"], ["accounts.id", "accounts.currency"]),
        UniqueConstraint("id", "account_id"),
        Index("bulk_uploads_account_idx", "account_id", "id"),
        Index("bulk_uploads_open_idx", "touched_at", postgresql_where=text("status = 'open'")),
        Index(
            "bulk_uploads_left_idx",
            "id",
            postgresql_where=text("status IN ('refused', 'discarded') AND stored > 0"),
        ),
        Index(
            "bulk_uploads_once_key",
            "account_id",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key IS NOT NULL"),
        ),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    account_id: Mapped[UUID]
    currency: Mapped[str]
    api_key_id: Mapped[UUID | None] = mapped_column(ForeignKey("api_keys.id"))
    idempotency_key: Mapped[str | None]
    asked_sha256: Mapped[bytes | None]
    status: Mapped[str] = mapped_column(server_default=text("'open'"))
    mode: Mapped[str]
    format: Mapped[str]
    facts: Mapped[dict[str, Any]]
    columns: Mapped[list[str] | None]
    received: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    lines: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    good: Mapped[int] = mapped_column(server_default=text("0"))
    bad: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    stored: Mapped[int] = mapped_column(server_default=text("0"))
    problem: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    touched_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    ended_at: Mapped[datetime | None]


class BulkChunk(Base):
    """A part of an upload that was taken in: up to which byte, and its hash."""

    __tablename__ = "bulk_chunks"
    __table_args__ = (
        ForeignKeyConstraint(
            ["upload_id", "account_id"], ["bulk_uploads.id", "bulk_uploads.account_id"], ondelete="CASCADE"
        ),
    )

    upload_id: Mapped[UUID] = mapped_column(primary_key=True)
    account_id: Mapped[UUID]
    upto: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    sha256: Mapped[bytes]


class BulkError(Base):
    """What is wrong with a field of a line."""

    __tablename__ = "bulk_errors"
    __table_args__ = (
        ForeignKeyConstraint(
            ["upload_id", "account_id"], ["bulk_uploads.id", "bulk_uploads.account_id"], ondelete="CASCADE"
        ),
    )

    upload_id: Mapped[UUID] = mapped_column(primary_key=True)
    account_id: Mapped[UUID]
    line: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    no: Mapped[int] = mapped_column(primary_key=True)
    custom_id: Mapped[str | None]
    field: Mapped[str]
    value: Mapped[Any | None] = mapped_column(JSON(none_as_null=True))
    allowed: Mapped[str]


class FrameName(Base):
    """What the account calls a frame of a job: of the frame with this index, whose id is the job's + 1 + index."""

    __tablename__ = "frame_names"
    __table_args__ = (
        UniqueConstraint("job_id", "custom_id"),
        {"postgresql_partition_by": "RANGE (job_id)"},
    )

    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    index: Mapped[int] = mapped_column(primary_key=True)
    account_id: Mapped[UUID]
    custom_id: Mapped[str]


class IdempotencyKey(Base):
    """The job a submission was answered with."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        Index("idempotency_keys_created_idx", "created_at"),
        Index("idempotency_keys_job_idx", "job_id"),
    )

    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[bytes]
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)


class Quote(Base):
    """What a job of these specs costs at most, until it expires."""

    __tablename__ = "quotes"
    __table_args__ = (
        ForeignKeyConstraint(["account_id", "currency"], ["accounts.id", "accounts.currency"]),
        UniqueConstraint("id", "account_id", "currency"),
        Index("quotes_expired_idx", "expires_at", postgresql_where=text("job_id IS NULL")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    account_id: Mapped[UUID]
    api_key_id: Mapped[UUID | None] = mapped_column(ForeignKey("api_keys.id"))
    specs_sha256: Mapped[bytes]
    frames: Mapped[int]
    currency: Mapped[str]
    amount: Mapped[Decimal]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    expires_at: Mapped[datetime]
    job_id: Mapped[UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), unique=True)


class QuotePrice(Base):
    """The price a quote was made at, for one of its models."""

    __tablename__ = "quote_prices"
    __table_args__ = (
        ForeignKeyConstraint(
            ["quote_id", "account_id", "currency"],
            ["quotes.id", "quotes.account_id", "quotes.currency"],
            ondelete="CASCADE",
        ),
        ForeignKeyConstraint(
            ["price_id", "method", "currency", "rate"],
            ["prices.id", "prices.method", "prices.currency", "prices.rate"],
        ),
    )

    quote_id: Mapped[UUID] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    method: Mapped[str] = mapped_column(primary_key=True)
    account_id: Mapped[UUID]
    price_id: Mapped[int]
    currency: Mapped[str]
    rate: Mapped[Decimal]


class Budget(Base):
    """What an account, or one of its keys, may spend."""

    __tablename__ = "budgets"
    __table_args__ = (
        ForeignKeyConstraint(["account_id", "currency"], ["accounts.id", "accounts.currency"]),
        ForeignKeyConstraint(["api_key_id", "account_id"], ["api_keys.id", "api_keys.account_id"]),
        UniqueConstraint("account_id", "api_key_id", "period", postgresql_nulls_not_distinct=True),
        UniqueConstraint("id", "account_id"),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    account_id: Mapped[UUID]
    api_key_id: Mapped[UUID | None]
    period: Mapped[str]
    currency: Mapped[str]
    amount: Mapped[Decimal]
    set_at: Mapped[datetime] = mapped_column(server_default=NOW)


class BudgetThreshold(Base):
    """What happens once that much of a budget was charged."""

    __tablename__ = "budget_thresholds"
    __table_args__ = (
        ForeignKeyConstraint(
            ["budget_id", "account_id"], ["budgets.id", "budgets.account_id"], ondelete="CASCADE"
        ),
    )

    budget_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    percent: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    action: Mapped[str] = mapped_column(primary_key=True)
    account_id: Mapped[UUID]
    reached_at: Mapped[datetime | None]
    month: Mapped[date | None] = mapped_column(Date)


class BudgetPause(Base):
    """A job that a budget paused, not a person."""

    __tablename__ = "budget_pauses"
    __table_args__ = (Index("budget_pauses_account_idx", "account_id"),)

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"))
    at: Mapped[datetime] = mapped_column(server_default=NOW)


class Tally(Base):
    """What an account's keys hold, and were charged in a month, as deltas: their sum is what counts."""

    __tablename__ = "tallies"
    __table_args__ = (
        Index("tallies_account_idx", "account_id", "api_key_id"),
        Index("tallies_unfolded_idx", "account_id", postgresql_where=text("NOT folded")),
        Index(
            "tallies_open_idx",
            "account_id",
            postgresql_include=["open_frames"],
            postgresql_where=text("open_frames <> 0"),
        ),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"))
    api_key_id: Mapped[UUID | None] = mapped_column(ForeignKey("api_keys.id"))
    month: Mapped[date | None] = mapped_column(Date)
    held: Mapped[Decimal] = mapped_column(server_default=text("0"))
    spent: Mapped[Decimal] = mapped_column(server_default=text("0"))
    folded: Mapped[bool] = mapped_column(server_default=text("false"))
    open_frames: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))


class Count(Base):
    """Frames that ended, and that wait, as deltas; their sum is a job's counts."""

    __tablename__ = "counts"
    __table_args__ = (
        Index("counts_job_idx", "job_id"),
        Index("counts_unfolded_idx", "id", postgresql_where=text("NOT folded")),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    done: Mapped[int] = mapped_column(server_default=text("0"))
    failed: Mapped[int] = mapped_column(server_default=text("0"))
    cancelled: Mapped[int] = mapped_column(server_default=text("0"))
    charged: Mapped[Decimal] = mapped_column(server_default=text("0"))
    freed: Mapped[Decimal] = mapped_column(server_default=text("0"))
    folded: Mapped[bool] = mapped_column(server_default=text("false"))
    at: Mapped[datetime] = mapped_column(server_default=NOW)
    reused: Mapped[int] = mapped_column(server_default=text("0"))
    waiting: Mapped[int] = mapped_column(server_default=text("0"))


class Delivered(Base):
    """Images delivered, by model, up to DeliveredUpto."""

    __tablename__ = "delivered"

    model: Mapped[str] = mapped_column(primary_key=True)
    images: Mapped[int] = mapped_column(BigInteger)


class DeliveredUpto(Base):
    """The last event that was looked at for that."""

    __tablename__ = "delivered_upto"

    one: Mapped[bool] = mapped_column(primary_key=True, server_default=text("true"))
    number: Mapped[int] = mapped_column(BigInteger)


class Lane(Base):
    """(model, priority, account), and the work it was served."""

    __tablename__ = "lanes"
    __table_args__ = (Index("lanes_active_idx", "model", "priority", postgresql_where=text("active")),)

    model: Mapped[str] = mapped_column(primary_key=True)
    priority: Mapped[int] = mapped_column(SmallInteger, primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"), primary_key=True)
    served: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    active: Mapped[bool]
    waiting_at: Mapped[datetime] = mapped_column(server_default=NOW)


class Worker(Base):
    """One process on one GPU."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    pool: Mapped[str]
    models: Mapped[list[str]]
    device: Mapped[str]
    state: Mapped[str]
    started_at: Mapped[datetime] = mapped_column(server_default=NOW)
    seen_at: Mapped[datetime] = mapped_column(server_default=NOW)


class Measurement(Base):
    """What one frame of a size took of a device, and two; as `farm models verify` measured last."""

    __tablename__ = "measurements"

    model: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[str] = mapped_column(primary_key=True)
    precision: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(primary_key=True)
    width: Mapped[int] = mapped_column(primary_key=True)
    height: Mapped[int] = mapped_column(primary_key=True)
    steps: Mapped[int]
    load_s: Mapped[float]
    seconds: Mapped[float]
    resident_bytes: Mapped[int] = mapped_column(BigInteger)
    peak_bytes: Mapped[int] = mapped_column(BigInteger)
    peak_two_bytes: Mapped[int | None] = mapped_column(BigInteger)
    measured_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class Ailment(Base):
    """What a worker does not claim for a while, and why; model '' is its device, and so every model."""

    __tablename__ = "ailments"

    worker: Mapped[str] = mapped_column(ForeignKey("workers.id", ondelete="CASCADE"), primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    reason: Mapped[str]
    times: Mapped[int]
    since: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    until: Mapped[datetime]


class Pack(Base):
    """Frames claimed together: fence and lease."""

    __tablename__ = "packs"
    __table_args__ = (
        Index("packs_open_idx", "lease_until", postgresql_where=text("closed_at IS NULL")),
        Index("packs_worker_idx", "worker", postgresql_where=text("closed_at IS NULL")),
    )

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, server_default=FetchedValue())
    worker: Mapped[str]
    model: Mapped[str]
    call_key: Mapped[str]
    priority: Mapped[int] = mapped_column(SmallInteger)
    frames: Mapped[int]
    work: Mapped[int] = mapped_column(BigInteger)
    claimed_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    lease_until: Mapped[datetime]
    gpu_ms: Mapped[int | None]
    outcome: Mapped[str | None]
    closed_at: Mapped[datetime | None]
    engine: Mapped[dict[str, Any] | None]
    shared: Mapped[bool] = mapped_column(server_default=text("false"))


class Image(Base):
    """The stored file; with deleted_at, what is left of it: a frame must not come to point to that one.

    Who makes a frame point to an image that is there already locks its row FOR KEY SHARE WHERE deleted_at IS NULL.
    """

    __tablename__ = "images"
    __table_args__ = (
        Index(
            "images_dying_idx",
            "id",
            postgresql_where=text("deleted_at IS NOT NULL AND purged_at IS NULL"),
        ),
        Index("images_unknown_idx", "purged_at", postgresql_where=text("pixel_sha256 IS NULL")),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    account_id: Mapped[UUID]
    key: Mapped[str] = mapped_column(unique=True)
    format: Mapped[str]
    sha256: Mapped[bytes]
    # NULL only where a file that no frame ever had was deleted
    pixel_sha256: Mapped[bytes] = mapped_column(nullable=True)
    bytes: Mapped[int] = mapped_column(nullable=True)
    width: Mapped[int] = mapped_column(nullable=True)
    height: Mapped[int] = mapped_column(nullable=True)
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    deleted_at: Mapped[datetime | None]
    pack_id: Mapped[int | None] = mapped_column(BigInteger)
    purged_at: Mapped[datetime | None]


class Frame(Base):
    """One image of a job: the unit of retry and of billing. Only queue.py writes its status."""

    __tablename__ = "frames"
    __table_args__ = (
        ForeignKeyConstraint(
            ["job_id", "key_no", "account_id"], ["job_keys.job_id", "job_keys.key_no", "job_keys.account_id"]
        ),
        Index("frames_queued_idx", "job_id", "key_no", "id", postgresql_where=text("status = 'queued'")),
        Index("frames_pack_idx", "pack_id", postgresql_where=text("pack_id IS NOT NULL")),
        Index(
            "frames_equal_idx",
            "account_id",
            "fingerprint",
            postgresql_where=text("seeded AND status IN ('waiting', 'queued', 'claimed')"),
        ),
        Index("frames_waiting_idx", "account_id", "id", postgresql_where=text("status = 'waiting'")),
        Index("frames_image_idx", "image_id", postgresql_where=text("image_id IS NOT NULL")),
        Index("frames_staged_idx", "job_id", "id", postgresql_where=text("status = 'staged'")),
        Index(
            "frames_staged_equal_idx",
            "account_id",
            "fingerprint",
            postgresql_where=text("seeded AND status = 'staged'"),
        ),
        {"postgresql_partition_by": "RANGE (id)"},
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    job_id: Mapped[UUID]
    index: Mapped[int]
    key_no: Mapped[int]
    account_id: Mapped[UUID]
    status: Mapped[str]
    suspect: Mapped[bool] = mapped_column(server_default=text("false"))
    attempts: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    seed: Mapped[int] = mapped_column(BigInteger)
    work: Mapped[int] = mapped_column(BigInteger)
    quantity: Mapped[int] = mapped_column(BigInteger)
    price_id: Mapped[int] = mapped_column(ForeignKey("prices.id"))
    pack_id: Mapped[int | None] = mapped_column(BigInteger)  # an open pack's, or NULL: a trigger sees to it
    image_id: Mapped[int | None] = mapped_column(BigInteger)  # an image of the account's: the same
    ended_at: Mapped[datetime | None]
    reason: Mapped[str | None]
    fingerprint: Mapped[bytes]
    spec: Mapped[dict[str, Any]]
    seeded: Mapped[bool] = mapped_column(server_default=text("false"))
    reused: Mapped[bool] = mapped_column(server_default=text("false"))


class Input(Base):
    """An image an account sent to start frames from; with deleted_at, what is left of it."""

    __tablename__ = "inputs"
    __table_args__ = (
        UniqueConstraint("id", "account_id"),
        Index(
            "inputs_live_key",
            "account_id",
            "sha256",
            unique=True,
            postgresql_where=text("stored_at IS NOT NULL AND deleted_at IS NULL"),
        ),
        Index("inputs_account_idx", "account_id", "id"),
        Index("inputs_old_idx", "used_at", postgresql_where=text("deleted_at IS NULL")),
        Index(
            "inputs_counted_idx",
            "account_id",
            postgresql_include=["bytes"],
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index(
            "inputs_dying_idx",
            "id",
            postgresql_where=text("deleted_at IS NOT NULL AND purged_at IS NULL"),
        ),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"))
    sha256: Mapped[bytes]
    format: Mapped[str]
    bytes: Mapped[int]
    width: Mapped[int]
    height: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    used_at: Mapped[datetime] = mapped_column(server_default=NOW)
    stored_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    purged_at: Mapped[datetime | None]


class JobInput(Base):
    """An input image that a job's frames need: it stays while the job is open."""

    __tablename__ = "job_inputs"
    __table_args__ = (
        ForeignKeyConstraint(["input_id", "account_id"], ["inputs.id", "inputs.account_id"]),
        Index("job_inputs_input_idx", "input_id"),
    )

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    input_id: Mapped[UUID] = mapped_column(primary_key=True)
    account_id: Mapped[UUID]


class InputName(Base):
    """What an account calls an input image, where its clients name files."""

    __tablename__ = "input_names"
    __table_args__ = (
        ForeignKeyConstraint(
            ["input_id", "account_id"], ["inputs.id", "inputs.account_id"], ondelete="CASCADE"
        ),
        Index("input_names_input_idx", "input_id"),
    )

    account_id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    input_id: Mapped[UUID]


class Ticket(Base):
    """What a client of another API holds of a job; asked is JSON in ASCII."""

    __tablename__ = "tickets"
    __table_args__ = (
        UniqueConstraint("account_id", "dialect", "name"),
        Index("tickets_account_idx", "account_id", "dialect", "job_id"),
        Index("tickets_start_by_idx", "start_by", postgresql_where=text("start_by IS NOT NULL")),
    )

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"))
    dialect: Mapped[str]
    name: Mapped[str]
    client: Mapped[str] = mapped_column(server_default=text("''"))
    asked: Mapped[str]
    start_by: Mapped[datetime | None]
    timed_out: Mapped[bool] = mapped_column(server_default=text("false"))


class File(Base):
    """A file an account sent; with deleted_at, what is left of it."""

    __tablename__ = "files"
    __table_args__ = (
        UniqueConstraint("id", "account_id"),
        Index(
            "files_account_idx",
            "account_id",
            "id",
            postgresql_include=["bytes"],
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index("files_old_idx", "created_at", postgresql_where=text("deleted_at IS NULL")),
        Index(
            "files_dying_idx",
            "id",
            postgresql_where=text("deleted_at IS NOT NULL AND purged_at IS NULL"),
        ),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"))
    purpose: Mapped[str]
    filename: Mapped[str]
    content_type: Mapped[str]
    sha256: Mapped[bytes]
    bytes: Mapped[int]
    # `metadata` is SQLAlchemy's own
    labels: Mapped[dict[str, Any] | None] = mapped_column("metadata", JSONB(none_as_null=True))
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    stored_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    purged_at: Mapped[datetime | None]


class Batch(Base):
    """Requests of a file, as jobs."""

    __tablename__ = "batches"
    __table_args__ = (
        UniqueConstraint("id", "account_id"),
        ForeignKeyConstraint(["input_file_id", "account_id"], ["files.id", "files.account_id"]),
        Index("batches_account_idx", "account_id", "id"),
        Index("batches_file_idx", "input_file_id"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"))
    input_file_id: Mapped[UUID]
    endpoint: Mapped[str]
    completion_window: Mapped[str]
    labels: Mapped[dict[str, Any] | None] = mapped_column("metadata", JSONB(none_as_null=True))
    faults: Mapped[list[dict[str, Any]] | None] = mapped_column(JSONB(none_as_null=True))
    lines: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    expires_at: Mapped[datetime]
    cancelled_at: Mapped[datetime | None]


class BatchLine(Base):
    """A request of a batch: the frames it became, or why it became none."""

    __tablename__ = "batch_lines"
    __table_args__ = (
        ForeignKeyConstraint(
            ["batch_id", "account_id"], ["batches.id", "batches.account_id"], ondelete="CASCADE"
        ),
        UniqueConstraint("batch_id", "custom_id"),
        Index("batch_lines_job_idx", "job_id", postgresql_where=text("job_id IS NOT NULL")),
    )

    batch_id: Mapped[UUID] = mapped_column(primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    account_id: Mapped[UUID]
    custom_id: Mapped[str]
    job_id: Mapped[UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    first: Mapped[int | None]
    frames: Mapped[int | None]
    format: Mapped[str | None]
    error: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))


class OpenCall(Base):
    """A synchronous call that was not answered yet."""

    __tablename__ = "open_calls"
    __table_args__ = (
        Index("open_calls_body_idx", "account_id", "body_sha256", "attempt"),
        Index("open_calls_at_idx", "at"),
    )

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"))
    body_sha256: Mapped[bytes]
    attempt: Mapped[int] = mapped_column(SmallInteger)
    at: Mapped[datetime] = mapped_column(server_default=NOW)


class KnownImage(Base):
    """The image that answers frames of one account, fingerprint and format."""

    __tablename__ = "known_images"
    __table_args__ = (Index("known_images_image_idx", "image_id"),)

    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"), primary_key=True)
    fingerprint: Mapped[bytes] = mapped_column(primary_key=True)
    format: Mapped[str] = mapped_column(primary_key=True)
    image_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("images.id", ondelete="CASCADE"))
    prompt: Mapped[bool]


class WaitersDue(Base):
    """Whose waiting frames the sweep has to look at."""

    __tablename__ = "waiters_due"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"))
    fingerprints: Mapped[list[bytes] | None] = mapped_column(ARRAY(LargeBinary))
    after: Mapped[UUID | None]


class Usage(Base):
    """What was used: a frame's charge (entry 0) or the reversal of it (entry 1)."""

    __tablename__ = "usage"
    __table_args__ = (
        Index("usage_account_idx", "account_id", "at"),
        Index("usage_unstated_idx", "account_id", "at", postgresql_where=text("statement_line IS NULL")),
        {"postgresql_partition_by": "RANGE (frame_id)"},
    )

    frame_id: Mapped[UUID] = mapped_column(primary_key=True)
    entry: Mapped[int] = mapped_column(SmallInteger, primary_key=True, server_default=text("0"))
    account_id: Mapped[UUID]
    job_id: Mapped[UUID]
    model: Mapped[str]
    method: Mapped[str]
    currency: Mapped[str]
    price_id: Mapped[int]
    rate: Mapped[Decimal]
    quantity: Mapped[int] = mapped_column(BigInteger)
    amount: Mapped[Decimal]
    pack_id: Mapped[int | None] = mapped_column(BigInteger)
    at: Mapped[datetime] = mapped_column(server_default=NOW)
    statement_line: Mapped[int | None] = mapped_column(BigInteger)


class Reversal(Base):
    """Why a charge was taken back, and by whom."""

    __tablename__ = "reversals"

    frame_id: Mapped[UUID] = mapped_column(primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"))
    api_key_id: Mapped[UUID | None] = mapped_column(ForeignKey("api_keys.id"))
    reason: Mapped[str]
    at: Mapped[datetime] = mapped_column(server_default=NOW)


class Statement(Base):
    """What an account owes for a month; total is NULL until it is closed."""

    __tablename__ = "statements"
    __table_args__ = (
        ForeignKeyConstraint(["account_id", "currency"], ["accounts.id", "accounts.currency"]),
        UniqueConstraint("account_id", "month"),
        UniqueConstraint("id", "account_id", "currency"),
        Index(
            "statements_closing_idx", "account_id", unique=True, postgresql_where=text("closed_at IS NULL")
        ),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    account_id: Mapped[UUID]
    month: Mapped[date] = mapped_column(Date)
    currency: Mapped[str]
    digits: Mapped[int] = mapped_column(SmallInteger)
    opened_at: Mapped[datetime] = mapped_column(server_default=NOW)
    total: Mapped[Decimal | None]
    closed_at: Mapped[datetime | None]


class StatementLine(Base):
    """What was used of one model by one method at one rate; usage.statement_line names it."""

    __tablename__ = "statement_lines"
    __table_args__ = (
        ForeignKeyConstraint(
            ["statement_id", "account_id", "currency"],
            ["statements.id", "statements.account_id", "statements.currency"],
        ),
        UniqueConstraint("statement_id", "model", "method", "rate"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    statement_id: Mapped[int] = mapped_column(BigInteger)
    account_id: Mapped[UUID]
    currency: Mapped[str]
    model: Mapped[str]
    method: Mapped[str]
    rate: Mapped[Decimal]
    frames: Mapped[int] = mapped_column(BigInteger)
    reversed: Mapped[int] = mapped_column(BigInteger)
    late: Mapped[int] = mapped_column(BigInteger)
    quantity: Mapped[int] = mapped_column(BigInteger)
    exact: Mapped[Decimal]
    amount: Mapped[Decimal | None]


class Sitting(Base):
    """When a worker was there, before it started anew."""

    __tablename__ = "sittings"

    worker: Mapped[str] = mapped_column(primary_key=True)
    started_at: Mapped[datetime] = mapped_column(primary_key=True)
    pool: Mapped[str]
    device: Mapped[str]
    ended_at: Mapped[datetime]


class Outbox(Base):
    """What happened, as it is written."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    account_id: Mapped[UUID]
    job_id: Mapped[UUID | None]
    frame_id: Mapped[UUID | None]
    kind: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class Event(Base):
    """What happened, as it is read: in the order of its number."""

    __tablename__ = "events"
    __table_args__ = (
        Index("events_job_idx", "job_id", "number"),
        Index("events_account_idx", "account_id", "number"),
        Index("events_job_rare_idx", "job_id", "number", postgresql_where=text("kind <> 'frame.done'")),
        Index(
            "events_account_rare_idx", "account_id", "number", postgresql_where=text("kind <> 'frame.done'")
        ),
        {"postgresql_partition_by": "RANGE (number)"},
    )

    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    account_id: Mapped[UUID]
    job_id: Mapped[UUID | None]
    frame_id: Mapped[UUID | None]
    kind: Mapped[str]
    data: Mapped[dict[str, Any]]
    at: Mapped[datetime]


class Webhook(Base):
    """Who is told of an account's events, or of one job's; the secret is computed, not stored."""

    __tablename__ = "webhooks"
    __table_args__ = (
        UniqueConstraint("id", "account_id"),
        Index("webhooks_account_idx", "account_id", "id", postgresql_where=text("job_id IS NULL")),
        Index("webhooks_job_idx", "job_id", postgresql_where=text("job_id IS NOT NULL")),
        Index(
            "webhooks_due_idx",
            "next_at",
            postgresql_where=text("next_at IS NOT NULL AND disabled_at IS NULL"),
        ),
        Index("webhooks_behind_idx", "id", postgresql_where=text("behind_from IS NOT NULL")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"))
    job_id: Mapped[UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    url: Mapped[str]
    receiver: Mapped[str]
    kinds: Mapped[list[str]]
    description: Mapped[str | None]
    shape: Mapped[str] = mapped_column(server_default=text("''"))
    base: Mapped[str] = mapped_column(server_default=text("''"))
    version: Mapped[int] = mapped_column(server_default=text("1"))
    rotated_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    disabled_at: Mapped[datetime | None]
    disabled_why: Mapped[str | None]
    failures: Mapped[int] = mapped_column(server_default=text("0"))
    failing_since: Mapped[datetime | None]
    next_at: Mapped[datetime | None]
    paused_until: Mapped[datetime | None]
    leased_until: Mapped[datetime | None]
    behind_from: Mapped[int | None] = mapped_column(BigInteger)


class CallbackSecret(Base):
    """The version of the secret of an account's jobs' own callbacks, once it was rotated."""

    __tablename__ = "callback_secrets"

    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id"), primary_key=True)
    version: Mapped[int]
    rotated_at: Mapped[datetime] = mapped_column(server_default=NOW)


class Delivery(Base):
    """One event on its way to one webhook; tests have no event."""

    __tablename__ = "deliveries"
    __table_args__ = (
        ForeignKeyConstraint(
            ["webhook_id", "account_id"], ["webhooks.id", "webhooks.account_id"], ondelete="CASCADE"
        ),
        UniqueConstraint("webhook_id", "event"),
        Index("deliveries_webhook_idx", "webhook_id", "id"),
        Index("deliveries_pending_idx", "webhook_id", "id", postgresql_where=text("status = 'pending'")),
        Index("deliveries_old_idx", "ended_at", postgresql_where=text("ended_at IS NOT NULL")),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    webhook_id: Mapped[UUID]
    account_id: Mapped[UUID]
    event: Mapped[int | None] = mapped_column(BigInteger)
    kind: Mapped[str]
    status: Mapped[str] = mapped_column(server_default=text("'pending'"))
    step: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    tries: Mapped[int] = mapped_column(server_default=text("0"))
    next_at: Mapped[datetime | None] = mapped_column(server_default=func.clock_timestamp())
    log: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default=text("'[]'"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    ended_at: Mapped[datetime | None]


class DeliveriesUpto(Base):
    """The last event that was looked at for webhooks."""

    __tablename__ = "deliveries_upto"

    one: Mapped[bool] = mapped_column(primary_key=True, server_default=text("true"))
    number: Mapped[int] = mapped_column(BigInteger)
