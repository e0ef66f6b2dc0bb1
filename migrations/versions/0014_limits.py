"""Expand: keys, limits, kept answers, whose statements stand in 0014_limits.sql."""

from pathlib import Path

from alembic import op

revision = "0014"
down_revision = "0013"

# tally_hold() as it stood in 0002
DOWN = """
DROP TABLE kept_answers;
DROP INDEX inputs_counted_idx;
CREATE OR REPLACE TRIGGER jobs_tallied AFTER INSERT OR DELETE OR UPDATE OF held ON jobs
    FOR EACH ROW EXECUTE FUNCTION tally_hold();
CREATE OR REPLACE FUNCTION tally_hold() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    change numeric := CASE TG_OP WHEN 'INSERT' THEN NEW.held WHEN 'DELETE' THEN -OLD.held ELSE NEW.held - OLD.held END;
BEGIN
    IF change <> 0 THEN
        INSERT INTO tallies (account_id, api_key_id, held)
        VALUES (coalesce(NEW.account_id, OLD.account_id), coalesce(NEW.api_key_id, OLD.api_key_id), change);
    END IF;
    RETURN NULL;
END $$;
DROP INDEX tallies_open_idx;
ALTER TABLE tallies DROP CONSTRAINT tallies_open_frames_check, DROP COLUMN open_frames;
DROP TABLE limits;
ALTER TABLE api_keys
    DROP COLUMN name,
    DROP COLUMN scopes,
    DROP COLUMN expires_at,
    DROP COLUMN previous_until,
    DROP COLUMN last_used_at;
"""


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    op.get_bind().exec_driver_sql(DOWN)
