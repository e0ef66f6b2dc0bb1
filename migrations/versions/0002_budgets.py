"""Expand: price books that admins write, quotes, budgets; the statements stand in 0002_budgets.sql."""

from pathlib import Path

from alembic import op

revision = "0002"
down_revision = "0001"

DOWN = """
DELETE FROM outbox WHERE job_id IS NULL;
DELETE FROM events WHERE job_id IS NULL;
ALTER TABLE outbox ALTER COLUMN job_id SET NOT NULL;
ALTER TABLE events ALTER COLUMN job_id SET NOT NULL;
DROP TRIGGER jobs_tallied ON jobs;
DROP FUNCTION tally_hold();
ALTER TABLE counts DROP COLUMN at;
DROP TABLE tallies;
DROP TABLE budget_pauses;
DROP TABLE budget_thresholds;
DROP TABLE budgets;
ALTER TABLE api_keys DROP CONSTRAINT api_keys_id_account_id_key;
DROP TABLE quote_prices;
DROP TABLE quotes;
CREATE OR REPLACE TRIGGER prices_fixed BEFORE UPDATE ON prices FOR EACH ROW
    WHEN (OLD.book_id <> NEW.book_id OR OLD.rate <> NEW.rate OR lower(OLD.valid) <> lower(NEW.valid)
          OR (upper(OLD.valid) IS NOT NULL AND upper(OLD.valid) IS DISTINCT FROM upper(NEW.valid)))
    EXECUTE FUNCTION refuse('a price never changes; close its range and add another');
CREATE OR REPLACE TRIGGER prices_kept BEFORE DELETE ON prices FOR EACH ROW EXECUTE FUNCTION refuse('prices are kept');
DROP INDEX prices_book_idx;
ALTER TABLE prices DROP COLUMN source, DROP COLUMN set_by, DROP COLUMN set_at;
"""


def upgrade() -> None:
    # one string to the driver, not text(): a colon in SQL stays a colon
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    op.get_bind().exec_driver_sql(DOWN)
