"""Expand: bulk uploads, the names of frames, and proofs, whose statements stand in 0011_bulk.sql."""

from pathlib import Path

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    """Jobs that are uploads still are removed; what a proof withheld goes on as if it had been approved."""
    for statement in (
        "DROP TRIGGER job_keys_approved ON job_keys",
        "DROP FUNCTION rest_is_approved()",
        "DELETE FROM frames AS f USING jobs AS j WHERE j.id = f.job_id AND j.status = 'staged'",
        "DELETE FROM jobs WHERE status = 'staged'",
        # one call key a job again: the rest's frames move to the proof's key, where there is one
        "UPDATE frames AS f SET key_no = p.key_no FROM job_keys AS r JOIN job_keys AS p ON p.job_id = r.job_id"
        " AND p.call_key = r.call_key AND NOT p.rest"
        " WHERE r.rest AND f.job_id = r.job_id AND f.key_no = r.key_no",
        "UPDATE job_keys AS p SET open = true FROM job_keys AS r"
        " WHERE r.job_id = p.job_id AND r.call_key = p.call_key AND r.rest AND NOT p.rest",
        "DELETE FROM job_keys AS r USING job_keys AS p"
        " WHERE p.job_id = r.job_id AND p.call_key = r.call_key AND r.rest AND NOT p.rest",
        "UPDATE job_keys SET open = true WHERE rest",
        "UPDATE job_lanes SET open = true WHERE job_id IN (SELECT id FROM jobs WHERE proof IS NOT NULL)",
        "ALTER TABLE job_keys DROP CONSTRAINT job_keys_job_id_call_key_rest_key, DROP COLUMN rest,"
        " ADD UNIQUE (job_id, call_key)",
        "ALTER TABLE jobs DROP COLUMN approved_at, DROP COLUMN proof",
        "DROP FUNCTION ensure_names(date, date)",
        "DROP TABLE frame_names",
        "DROP FUNCTION names_agree()",
        "DROP TABLE bulk_errors",
        "DROP TABLE bulk_chunks",
        "DROP TABLE bulk_uploads",
    ):
        op.execute(statement)
