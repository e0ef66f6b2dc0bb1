"""Expand: what frames must agree on is checked by statements of their own, which stand in 0017_agree.sql."""

from pathlib import Path

from alembic import op

revision = "0017"
down_revision = "0016"

BEFORE = """
CREATE OR REPLACE FUNCTION frames_agree() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    wrong record;
BEGIN
    SELECT * INTO wrong
    FROM (
        SELECT c.id, CASE c.status
            WHEN 'done' THEN CASE
                WHEN (SELECT u.entry FROM usage AS u WHERE u.frame_id = c.id AND u.entry = 0) IS NULL
                    THEN 'done without a charge'
                WHEN (SELECT i.account_id FROM images AS i WHERE i.id = c.image_id) IS DISTINCT FROM c.account_id
                    THEN 'done with an image that is not its account''s' END
            WHEN 'claimed' THEN CASE
                WHEN (SELECT p.id FROM packs AS p WHERE p.id = c.pack_id AND p.closed_at IS NULL) IS NULL
                    THEN 'claimed by a pack that is not open' END
            END AS fault
        FROM changed AS c
        WHERE c.status IN ('done', 'claimed')
    ) AS f
    WHERE f.fault IS NOT NULL
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'frame % is %', wrong.id, wrong.fault USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$"""


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    op.get_bind().exec_driver_sql(BEFORE.replace("%", "%%"))
