"""Expand: retention, deletion on request, and tombstones of images; the statements stand in 0004_images.sql."""

from pathlib import Path

from alembic import op

revision = "0004"
down_revision = "0003"

INDEXES = "frames_image_idx jobs_kept_idx jobs_uncleared_idx images_dying_idx images_unknown_idx"


def upgrade() -> None:
    op.get_bind().exec_driver_sql(Path(__file__).with_suffix(".sql").read_text().replace("%", "%%"))


def downgrade() -> None:
    """Images whose files were deleted have a row that says otherwise from here on; frames keep pointing to it."""
    for index in INDEXES.split():
        op.execute(f"DROP INDEX {index}")
    op.execute("DROP TRIGGER images_revived ON images")
    # tombstones of orphans: no frame points to one
    op.execute("DELETE FROM images WHERE pixel_sha256 IS NULL")
    op.execute("ALTER TABLE images DROP COLUMN purged_at, DROP COLUMN deleted_at")
    for column in ("pixel_sha256", "bytes", "width", "height"):
        op.execute(f"ALTER TABLE images ALTER COLUMN {column} SET NOT NULL")
    op.execute("ALTER TABLE jobs DROP COLUMN images_cleared, DROP COLUMN images_deleted_at")
    op.execute("ALTER TABLE accounts DROP COLUMN retention_days")
