-- Inputs: images that accounts send to start frames from, and which jobs use them.
--
-- A row is made first, then its file is stored, then stored_at says so: there is no file without a row. An input
-- that no open job uses gets deleted_at after a while (a tombstone: hash and size stay as evidence of what a frame
-- was made from), then its file goes, then purged_at says so. Sent again it is another row: the file of a
-- tombstone is nobody else's.

CREATE TABLE inputs (
    id         uuid        PRIMARY KEY,
    account_id uuid        NOT NULL REFERENCES accounts,
    sha256     bytea       NOT NULL CHECK (length(sha256) = 32),
    format     text        NOT NULL CHECK (format IN ('png', 'webp', 'jpeg')),
    bytes      integer     NOT NULL CHECK (bytes > 0),
    width      integer     NOT NULL CHECK (width > 0),
    height     integer     NOT NULL CHECK (height > 0),
    created_at timestamptz NOT NULL DEFAULT now(),
    used_at    timestamptz NOT NULL DEFAULT now(), -- last sent or asked for; within an hour
    stored_at  timestamptz,                        -- since when its file is there
    deleted_at timestamptz,                        -- since when nobody may ask for it
    purged_at  timestamptz,                        -- since when its file is gone
    UNIQUE (id, account_id),
    CONSTRAINT inputs_purged_check CHECK (purged_at IS NULL OR deleted_at IS NOT NULL)
);
CREATE UNIQUE INDEX inputs_live_key ON inputs (account_id, sha256) WHERE stored_at IS NOT NULL AND deleted_at IS NULL;
CREATE INDEX inputs_account_idx ON inputs (account_id, id);
CREATE INDEX inputs_old_idx ON inputs (used_at) WHERE deleted_at IS NULL;
CREATE INDEX inputs_dying_idx ON inputs (id) WHERE deleted_at IS NOT NULL AND purged_at IS NULL;

CREATE TABLE job_inputs (
    job_id     uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    input_id   uuid NOT NULL,
    account_id uuid NOT NULL,
    PRIMARY KEY (job_id, input_id),
    FOREIGN KEY (input_id, account_id) REFERENCES inputs (id, account_id)
);
CREATE INDEX job_inputs_input_idx ON job_inputs (input_id);

-- An open job's inputs are there: who adds one locks it, who deletes one looks at its jobs under the other lock.
CREATE FUNCTION input_is_there() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM inputs WHERE id = NEW.input_id AND stored_at IS NOT NULL AND deleted_at IS NULL FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'input % is not there', NEW.input_id USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER job_inputs_there AFTER INSERT ON job_inputs FOR EACH ROW EXECUTE FUNCTION input_is_there();

CREATE FUNCTION input_is_free() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM job_inputs AS u JOIN jobs AS j ON j.id = u.job_id
               WHERE u.input_id = NEW.id AND j.ended_at IS NULL) THEN
        RAISE EXCEPTION 'input % is an open job''s', NEW.id USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER inputs_free AFTER UPDATE OF deleted_at ON inputs FOR EACH ROW
    WHEN (OLD.deleted_at IS NULL AND NEW.deleted_at IS NOT NULL) EXECUTE FUNCTION input_is_free();
CREATE TRIGGER inputs_revived BEFORE UPDATE OF deleted_at ON inputs FOR EACH ROW
    WHEN (OLD.deleted_at IS NOT NULL AND NEW.deleted_at IS NULL) EXECUTE FUNCTION refuse('its file is being deleted');
