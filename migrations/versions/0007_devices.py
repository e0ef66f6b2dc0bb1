"""Expand: devices, whose statements stand in 0007_devices.sql."""

from pathlib import Path

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    op.execute("DROP TABLE ailments")
    op.execute("DROP TABLE measurements")
