"""Expand: when a job runs and how much of it at once, whose statements stand in 0012_control.sql."""

from pathlib import Path

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    """What waits goes on; what was staged for max_parallel is queued; a job past its deadline is cancelled."""
    for statement in (
        "UPDATE frames SET status = 'queued' WHERE status = 'staged'",
        "UPDATE job_keys SET open = true WHERE NOT rest AND (job_id, key_no) IN"
        " (SELECT DISTINCT f.job_id, f.key_no FROM frames AS f JOIN jobs AS j ON j.id = f.job_id"
        "  WHERE j.max_parallel IS NOT NULL AND f.status = 'queued')",
        "UPDATE job_lanes SET open = true WHERE job_id IN"
        " (SELECT id FROM jobs WHERE max_parallel IS NOT NULL AND ended_at IS NULL)",
        "UPDATE jobs SET status = 'cancelled' WHERE status = 'late'",
        "UPDATE jobs SET waits = false, runnable = status = 'active' WHERE waits",
        "ALTER TABLE jobs DROP CONSTRAINT jobs_check, DROP CONSTRAINT jobs_status_check,"
        " DROP CONSTRAINT jobs_late_check, DROP CONSTRAINT jobs_late_at_check, DROP CONSTRAINT jobs_deadline_check,"
        " DROP COLUMN waits, DROP COLUMN follows, DROP COLUMN max_parallel, DROP COLUMN late_at, DROP COLUMN on_late,"
        " DROP COLUMN deadline, DROP COLUMN start_after,"
        " ADD CONSTRAINT jobs_check CHECK (runnable = (status = 'active')),"
        " ADD CONSTRAINT jobs_status_check"
        " CHECK (status IN ('staged', 'active', 'paused', 'cancelled', 'finished'))",
        "DROP INDEX frames_staged_equal_idx",
        "DROP INDEX frames_staged_idx",
        "DROP TABLE job_after",
        "DROP FUNCTION after_own_jobs()",
    ):
        op.execute(statement)
