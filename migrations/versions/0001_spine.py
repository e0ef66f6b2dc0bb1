"""Expand: the spine's schema, whose statements stand in 0001_spine.sql."""

from pathlib import Path

from alembic import op

revision = "0001"
down_revision = None

TABLES = (
    "events outbox usage frames images packs workers lanes counts idempotency_keys"
    " job_keys job_lanes jobs prices price_books api_keys accounts"
)
FUNCTIONS = (
    "ensure_partitions(date, date, bigint)",
    "last_frame_id(uuid)",
    "uuid_floor(timestamptz)",
    "charge_is_done()",
    "done_is_charged()",
    "usage_fixed()",
    "refuse()",
)


def upgrade() -> None:
    # one string to the driver, not text(): a colon in SQL stays a colon
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    for table in TABLES.split():
        op.execute(f"DROP TABLE {table}")
    for function in FUNCTIONS:
        op.execute(f"DROP FUNCTION {function}")
