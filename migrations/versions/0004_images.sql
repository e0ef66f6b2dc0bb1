-- Images leave: past an account's retention, when a job's are deleted on request, or as files nobody booked.
--
-- Deleting a job's images is a verb on the job; frames are not touched, they keep their row and what they point
-- to. An image is wanted while a frame of a job with images_deleted_at NULL points to it. One that nobody wants
-- gets deleted_at (a tombstone: key, hash and size stay as evidence), then its file goes, then purged_at says so.
-- settle.sql refuses a key with a tombstone; farm/retention.py says when one may come back to life, and why no
-- file is lost to a worker that stores it again meanwhile.

ALTER TABLE accounts ADD COLUMN retention_days integer CHECK (retention_days BETWEEN 1 AND 36500); -- NULL: kept

ALTER TABLE jobs
    ADD COLUMN images_deleted_at timestamptz, -- since when none of its images is shown
    ADD COLUMN images_cleared integer NOT NULL DEFAULT 0, -- of its frames, from the first: looked at since then
    ADD CONSTRAINT jobs_images_deleted_check CHECK (images_deleted_at IS NULL OR ended_at IS NOT NULL),
    ADD CONSTRAINT jobs_images_cleared_check CHECK (images_cleared BETWEEN 0 AND frames
        AND (images_cleared = 0 OR images_deleted_at IS NOT NULL));
CREATE INDEX jobs_kept_idx ON jobs (account_id, ended_at) WHERE ended_at IS NOT NULL AND images_deleted_at IS NULL;
CREATE INDEX jobs_uncleared_idx ON jobs (images_deleted_at)
    WHERE images_deleted_at IS NOT NULL AND images_cleared < frames;

-- What nobody booked has a row only as a tombstone, and nobody knows its pixels.
ALTER TABLE images
    ADD COLUMN deleted_at timestamptz, -- since when nobody wants it
    ADD COLUMN purged_at timestamptz,  -- since when its file is gone
    ALTER COLUMN pixel_sha256 DROP NOT NULL,
    ALTER COLUMN bytes DROP NOT NULL,
    ALTER COLUMN width DROP NOT NULL,
    ALTER COLUMN height DROP NOT NULL,
    ADD CONSTRAINT images_known_check CHECK (deleted_at IS NOT NULL
        OR num_nulls(pixel_sha256, bytes, width, height) = 0),
    ADD CONSTRAINT images_purged_check CHECK (purged_at IS NULL OR deleted_at IS NOT NULL);
CREATE INDEX images_dying_idx ON images (id) WHERE deleted_at IS NOT NULL AND purged_at IS NULL;

-- Tombstones of files that no frame ever had are forgotten after a while.
CREATE INDEX images_unknown_idx ON images (purged_at) WHERE pixel_sha256 IS NULL;

-- Which frames point to an image: one that nobody else wants may go.
CREATE INDEX frames_image_idx ON frames (image_id) WHERE image_id IS NOT NULL;

CREATE TRIGGER images_revived BEFORE UPDATE OF deleted_at ON images FOR EACH ROW
    WHEN (OLD.deleted_at IS NOT NULL AND NEW.deleted_at IS NULL AND OLD.purged_at IS NULL)
    EXECUTE FUNCTION refuse('its file is being deleted');
