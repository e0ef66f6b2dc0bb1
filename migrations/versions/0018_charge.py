"""Expand: lanes are charged by a function, a statement for each of them, in the order of their keys."""

from alembic import op

revision = "0018"
down_revision = "0017"

CHARGE = """
CREATE FUNCTION charge_lanes(of_model text, classes smallint[], owners uuid[], costs bigint[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    FOR k IN 1 .. coalesce(cardinality(classes), 0) LOOP
        UPDATE lanes SET served = served + costs[k], waiting_at = clock_timestamp()
        WHERE model = of_model AND priority = classes[k] AND account_id = owners[k];
    END LOOP;
END $$"""


def upgrade() -> None:
    op.execute(CHARGE)


def downgrade() -> None:
    op.execute("DROP FUNCTION charge_lanes(text, smallint[], uuid[], bigint[])")
