"""Expand: input images, whose statements stand in 0006_inputs.sql."""

from pathlib import Path

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    """Their files stay in the store, under inputs/."""
    op.execute("DROP TABLE job_inputs")
    op.execute("DROP TABLE inputs")
    op.execute("DROP FUNCTION input_is_there()")
    op.execute("DROP FUNCTION input_is_free()")
