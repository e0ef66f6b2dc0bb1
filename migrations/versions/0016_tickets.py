"""Expand: tickets, and names of inputs, whose statements stand in 0016_tickets.sql."""

from pathlib import Path

from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    op.execute("DROP TABLE input_names")
    op.execute("DROP TABLE tickets")
