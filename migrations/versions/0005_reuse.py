"""Expand: reuse and provenance, whose statements stand in 0005_reuse.sql."""

from pathlib import Path

from alembic import op

revision = "0005"
down_revision = "0004"

BEFORE = """
CREATE OR REPLACE FUNCTION charge_is_done() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM frames WHERE id = NEW.frame_id AND status = 'done'
                   AND account_id = NEW.account_id AND quantity = NEW.quantity AND price_id = NEW.price_id) THEN
        RAISE EXCEPTION 'charge for frame %, which is not done at that price', NEW.frame_id
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$"""


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    """Waiting frames are queued again. What was reused stays done and charged; the price's method stays allowed
    where a price uses it.
    """
    op.get_bind().exec_driver_sql(BEFORE.replace("%", "%%"))
    op.execute("DROP TRIGGER jobs_waiters ON jobs")
    op.execute("DROP FUNCTION waiters_of_job_due()")
    op.execute("ALTER TABLE jobs DROP COLUMN rerender_of")
    op.execute("ALTER TABLE images DROP COLUMN pack_id")
    op.execute("ALTER TABLE packs DROP COLUMN engine")
    op.execute("ALTER TABLE accounts DROP COLUMN prompt_in_images")
    op.execute("DROP TABLE waiters_due")
    op.execute("DROP TABLE known_images")
    op.execute("DROP INDEX frames_equal_idx")
    op.execute("DROP INDEX frames_waiting_idx")
    op.execute("UPDATE job_keys AS k SET open = true FROM frames AS f"
               " WHERE f.status = 'waiting' AND k.job_id = f.job_id AND k.key_no = f.key_no")  # fmt: skip
    op.execute("UPDATE job_lanes AS l SET open = true FROM frames AS f"
               " WHERE f.status = 'waiting' AND l.job_id = f.job_id")  # fmt: skip
    op.execute("UPDATE frames SET status = 'queued' WHERE status = 'waiting'")
    op.execute("ALTER TABLE frames DROP COLUMN reused, DROP COLUMN seeded")
    op.execute("ALTER TABLE job_keys DROP COLUMN reuse_price_id")
    op.execute("ALTER TABLE price_books DROP CONSTRAINT price_books_method_check")
    op.execute("ALTER TABLE price_books ADD CONSTRAINT price_books_method_check"
               " CHECK (method IN ('mpx_step', 'image')) NOT VALID")  # fmt: skip
