"""Expand: statements, reversals and sittings, whose SQL stands in 0003_statements.sql."""

from pathlib import Path

from alembic import op

revision = "0003"
down_revision = "0002"

USAGE_FIXED = """
CREATE OR REPLACE FUNCTION usage_fixed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.statement_line IS NOT NULL OR to_jsonb(OLD) - 'statement_line' <> to_jsonb(NEW) - 'statement_line' THEN
        RAISE EXCEPTION 'usage is append-only; correct it by a reversal' USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$
"""
UNDONE = (
    "DROP TRIGGER workers_start ON workers",
    "DROP TRIGGER usage_reversed ON usage",
    "DROP TRIGGER usage_stated ON usage",
    "DROP TRIGGER usage_unstated ON usage",
    "DROP INDEX usage_unstated_idx",
    "DROP TABLE sittings, reversals, statement_lines, statements",
    "DROP FUNCTION keep_sitting()",
    "DROP FUNCTION reversal_has_a_reason()",
    "DROP FUNCTION usage_stated()",
    "DROP FUNCTION statement_adds_up()",
    "DROP FUNCTION line_is_open()",
    USAGE_FIXED,  # as in 0001
)


def upgrade() -> None:
    # one string to the driver, not text(): a colon in SQL stays a colon
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    for statement in UNDONE:
        op.execute(statement)
