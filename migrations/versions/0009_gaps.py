"""Expand: gaps, whose statements stand in 0009_gaps.sql."""

from pathlib import Path

from alembic import op

revision = "0009"
down_revision = "0008"

BEFORE = """
CREATE OR REPLACE TRIGGER prices_fixed BEFORE UPDATE ON prices FOR EACH ROW
    WHEN (OLD.book_id <> NEW.book_id OR OLD.rate <> NEW.rate OR lower(OLD.valid) <> lower(NEW.valid)
          OR OLD.source <> NEW.source OR OLD.set_by IS DISTINCT FROM NEW.set_by
          OR (upper(OLD.valid) IS NOT NULL AND upper(OLD.valid) IS DISTINCT FROM upper(NEW.valid)
              AND NOT (upper(NEW.valid) IS NOT NULL AND upper(NEW.valid) < upper(OLD.valid)
                       AND upper(NEW.valid) >= now())))
    EXECUTE FUNCTION refuse('a price never changes; close its range and add another')"""


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    op.execute("ALTER TABLE counts DROP COLUMN waiting, DROP COLUMN reused")
    op.execute("DROP TABLE delivered_upto")
    op.execute("DROP TABLE delivered")
    op.execute("DROP TRIGGER usage_fixed ON usage")
    op.execute(
        "CREATE TRIGGER usage_fixed BEFORE UPDATE ON usage FOR EACH ROW EXECUTE FUNCTION usage_fixed()"
    )
    op.get_bind().exec_driver_sql(BEFORE.replace("%", "%%"))
    op.execute("DROP FUNCTION attached(regclass)")
