"""Expand: frames, usage and images agree by the statement, whose triggers stand in 0010_speed.sql."""

from pathlib import Path

from alembic import op

revision = "0010"
down_revision = "0009"

# as they stood in 0001 and 0005
BEFORE = """
CREATE FUNCTION done_is_charged() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM usage WHERE frame_id = NEW.id AND entry = 0) THEN
        RAISE EXCEPTION 'frame % is done without a charge', NEW.id USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER frames_charged AFTER INSERT OR UPDATE OF status ON frames
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.status = 'done') EXECUTE FUNCTION done_is_charged();
CREATE FUNCTION charge_is_done() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM frames AS f
        WHERE f.id = NEW.frame_id AND f.status = 'done' AND f.account_id = NEW.account_id
          AND CASE WHEN f.reused
              THEN NEW.method = 'reuse' AND NEW.quantity = 1 AND NEW.price_id = (
                  SELECT k.reuse_price_id FROM job_keys AS k WHERE k.job_id = f.job_id AND k.key_no = f.key_no)
              ELSE NEW.method <> 'reuse' AND NEW.quantity = f.quantity AND NEW.price_id = f.price_id END
    ) THEN
        RAISE EXCEPTION 'charge for frame %, which is not done at that price', NEW.frame_id
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER usage_done AFTER INSERT ON usage
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION charge_is_done();
"""


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    for trigger, table, function in (
        ("usage_agrees", "usage", "usage_agrees()"),
        ("frames_agree", "frames", "frames_agree()"),
        ("frames_begin", "frames", None),
    ):
        op.execute(f"DROP TRIGGER {trigger} ON {table}")
        if function:
            op.execute(f"DROP FUNCTION {function}")
    op.get_bind().exec_driver_sql(BEFORE.replace("%", "%%"))
    for table, columns, target in (
        ("frames", "image_id", "images"),
        ("frames", "pack_id", "packs"),
        ("images", "account_id", "accounts"),
        ("usage", "price_id, method, currency, rate", "prices (id, method, currency, rate)"),
        ("usage", "account_id", "accounts"),
    ):
        op.execute(f"ALTER TABLE {table} ADD FOREIGN KEY ({columns}) REFERENCES {target}")
