"""Expand: packs by shape and shared devices, whose statements stand in 0008_steps.sql."""

from pathlib import Path

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    op.execute("ALTER TABLE packs DROP COLUMN shared")
    op.execute("DROP INDEX job_keys_shape_idx")
