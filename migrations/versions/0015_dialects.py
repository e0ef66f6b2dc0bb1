"""Expand: files, batches and open calls, whose statements stand in 0015_dialects.sql."""

from pathlib import Path

from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    for table in ("open_calls", "batch_lines", "batches", "files"):
        op.execute(f"DROP TABLE {table}")
