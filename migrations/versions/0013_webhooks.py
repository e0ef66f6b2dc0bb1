"""Expand: webhooks, whose statements stand in 0013_webhooks.sql."""

from pathlib import Path

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    op.execute("DROP INDEX events_account_rare_idx")
    op.execute("DROP INDEX events_job_rare_idx")
    for table in ("deliveries_upto", "deliveries", "callback_secrets", "webhooks"):
        op.execute(f"DROP TABLE {table}")
