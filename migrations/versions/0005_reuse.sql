-- Reuse: a frame whose image is known already is answered with it, and one whose equal is being made waits for that.
-- And what an image's provenance needs beside its frame.

-- ---------------------------------------------------------------------------------------------- prices

-- A reused image has a price of its own.
ALTER TABLE price_books DROP CONSTRAINT price_books_method_check;
ALTER TABLE price_books ADD CONSTRAINT price_books_method_check CHECK (method IN ('mpx_step', 'image', 'reuse'));

-- ---------------------------------------------------------------------------------------------- frames

ALTER TABLE job_keys ADD COLUMN reuse_price_id integer REFERENCES prices; -- NULL: its frames are rendered in any case

-- Frames whose seed was asked for may be found by equal ones; one drawn at random is nobody's equal.
ALTER TABLE frames
    ADD COLUMN seeded boolean NOT NULL DEFAULT false,
    ADD COLUMN reused boolean NOT NULL DEFAULT false, -- its image was made for another frame: charged at the price for that
    ADD CONSTRAINT frames_waiting_check CHECK (status <> 'waiting' OR seeded),
    ADD CONSTRAINT frames_reused_check CHECK (NOT reused OR status = 'done');
CREATE INDEX frames_equal_idx ON frames (account_id, fingerprint)
    WHERE seeded AND status IN ('waiting', 'queued', 'claimed');
CREATE INDEX frames_waiting_idx ON frames (account_id, id) WHERE status = 'waiting';

-- The image that answers a frame: of the same account, fingerprint and format. The newest stays.
CREATE TABLE known_images (
    account_id  uuid        NOT NULL REFERENCES accounts,
    fingerprint bytea       NOT NULL CHECK (length(fingerprint) = 32),
    format      text        NOT NULL CHECK (format IN ('png', 'webp', 'jpeg')),
    image_id    bigint      NOT NULL REFERENCES images ON DELETE CASCADE,
    prompt      boolean     NOT NULL, -- the file says it
    PRIMARY KEY (account_id, fingerprint, format)
);
CREATE INDEX known_images_image_idx ON known_images (image_id);

-- Whose waiting frames to look at: written with everything that may end their waiting, in its transaction.
CREATE TABLE waiters_due (
    id           bigint     GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id   uuid       NOT NULL REFERENCES accounts ON DELETE CASCADE,
    fingerprints bytea[],   -- NULL: all of the account's
    after        uuid       -- those up to it were looked at
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);

-- A job that may not be handed out any more, or comes in another class, changes who waits for whom.
CREATE FUNCTION waiters_of_job_due() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO waiters_due (account_id) VALUES (NEW.account_id);
    RETURN NULL;
END $$;
CREATE TRIGGER jobs_waiters AFTER UPDATE OF status, priority ON jobs FOR EACH ROW
    WHEN (NEW.ended_at IS NULL AND (OLD.status <> NEW.status OR OLD.priority <> NEW.priority))
    EXECUTE FUNCTION waiters_of_job_due();

-- ---------------------------------------------------------------------------------------------- provenance

ALTER TABLE accounts ADD COLUMN prompt_in_images boolean NOT NULL DEFAULT false;
ALTER TABLE packs ADD COLUMN engine jsonb;    -- what rendered it: versions, the model's revision and dtype
ALTER TABLE images ADD COLUMN pack_id bigint; -- the pack it was stored from first
ALTER TABLE jobs ADD COLUMN rerender_of uuid; -- the frame this job renders again

-- ---------------------------------------------------------------------------------------------- guards

-- A charge is a done frame's, at the price frozen at admission: what rendering costs, or reusing if it was reused.
CREATE OR REPLACE FUNCTION charge_is_done() RETURNS trigger LANGUAGE plpgsql AS $$
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
