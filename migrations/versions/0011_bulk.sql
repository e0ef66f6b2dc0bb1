-- Bulk intake: uploads that are appended to by offset, the names their frames carry, what was wrong with which line; and
-- proofs: of a job's frames the first are rendered, the rest wait for approval.
--
-- An upload's frames are stored as they come, under a job of status staged: such a job is not runnable, and nobody
-- sees it until the upload is accepted, which touches the job alone. Each chunk is one transaction: frames, names, errors
-- and offset together. An upload's id is its job's.

-- ---------------------------------------------------------------------------------------------- uploads

CREATE TABLE bulk_uploads (
    id              uuid        PRIMARY KEY CHECK (right(id::text, 6) = '000000'),
    account_id      uuid        NOT NULL,
    currency        text        NOT NULL,
    api_key_id      uuid        REFERENCES api_keys,
    idempotency_key text        CHECK (length(idempotency_key) BETWEEN 1 AND 255),
    asked_sha256    bytea       CHECK (length(asked_sha256) = 32), -- of the facts, to tell another request under the same key
    status          text        NOT NULL DEFAULT 'open' CHECK (status IN ('open', 'accepted', 'refused', 'discarded')),
    mode            text        NOT NULL CHECK (mode IN ('all_or_nothing', 'accept_good')),
    format          text        NOT NULL CHECK (format IN ('ndjson', 'csv', 'matrix')),
    facts           jsonb       NOT NULL, -- of the job, and the spec's fields for lines that leave them out
    columns         text[],               -- of a CSV file, once its first line is here
    received        bigint      NOT NULL DEFAULT 0 CHECK (received >= 0), -- bytes, to the end of a line
    lines           bigint      NOT NULL DEFAULT 0 CHECK (lines >= 0),    -- ends of line in them
    good            integer     NOT NULL DEFAULT 0 CHECK (good >= 0),     -- lines that would be frames
    bad             bigint      NOT NULL DEFAULT 0 CHECK (bad >= 0),
    stored          integer     NOT NULL DEFAULT 0 CHECK (stored BETWEEN 0 AND good), -- frames there are
    problem         jsonb,                -- why it was refused, where no line is to blame
    created_at      timestamptz NOT NULL DEFAULT now(),
    touched_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at        timestamptz,
    UNIQUE (id, account_id),
    FOREIGN KEY (account_id, currency) REFERENCES accounts (id, currency),
    CHECK ((idempotency_key IS NULL) = (asked_sha256 IS NULL)),
    CHECK ((status = 'open') = (ended_at IS NULL)),
    CHECK (status <> 'accepted' OR good > 0 AND stored = good AND (mode = 'accept_good' OR bad = 0))
);
CREATE INDEX bulk_uploads_account_idx ON bulk_uploads (account_id, id);
CREATE INDEX bulk_uploads_open_idx ON bulk_uploads (touched_at) WHERE status = 'open';
CREATE INDEX bulk_uploads_left_idx ON bulk_uploads (id) WHERE status IN ('refused', 'discarded') AND stored > 0;
CREATE UNIQUE INDEX bulk_uploads_once_key ON bulk_uploads (account_id, idempotency_key) WHERE idempotency_key IS NOT NULL;

-- What was taken in, chunk by chunk: who sends a file again under its idempotency key is compared with it.
CREATE TABLE bulk_chunks (
    upload_id   uuid        NOT NULL,
    account_id  uuid        NOT NULL,
    upto        bigint      NOT NULL CHECK (upto > 0), -- bytes
    sha256      bytea       NOT NULL CHECK (length(sha256) = 32),
    PRIMARY KEY (upload_id, upto),
    FOREIGN KEY (upload_id, account_id) REFERENCES bulk_uploads (id, account_id) ON DELETE CASCADE
);

CREATE TABLE bulk_errors (
    upload_id   uuid        NOT NULL,
    account_id  uuid        NOT NULL,
    line        bigint      NOT NULL CHECK (line > 0), -- of the file, from 1
    no          integer     NOT NULL CHECK (no >= 0),  -- of the line's errors
    custom_id   text,
    field       text        NOT NULL,
    value       json,
    allowed     text        NOT NULL,
    PRIMARY KEY (upload_id, line, no),
    FOREIGN KEY (upload_id, account_id) REFERENCES bulk_uploads (id, account_id) ON DELETE CASCADE
);

-- ---------------------------------------------------------------------------------------------- names

-- What the account calls a frame: unique in its job. Partitioned as frames are, by the id of the job whose frames stand
-- right behind it: a month leaves with its frames. No foreign key a row, as in 0010: a statement's jobs are looked up once.
CREATE TABLE frame_names (
    job_id      uuid        NOT NULL,
    index       integer     NOT NULL CHECK (index >= 0),
    account_id  uuid        NOT NULL,
    custom_id   text        NOT NULL CHECK (length(custom_id) BETWEEN 1 AND 255),
    PRIMARY KEY (job_id, index),
    UNIQUE (job_id, custom_id)
) PARTITION BY RANGE (job_id);

CREATE FUNCTION names_agree() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (
        SELECT FROM (SELECT DISTINCT job_id, account_id FROM added) AS n
        WHERE (SELECT j.account_id FROM jobs AS j WHERE j.id = n.job_id) IS DISTINCT FROM n.account_id
    ) THEN
        RAISE EXCEPTION 'a name of a frame that is not its account''s' USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER names_agree AFTER INSERT ON frame_names REFERENCING NEW TABLE AS added FOR EACH STATEMENT
    EXECUTE FUNCTION names_agree();

-- A partition of names beside each of frames: those there are, and those ensure_partitions makes from now on.
CREATE FUNCTION ensure_names(first_month date, last_month date) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    month date := date_trunc('month', first_month);
BEGIN
    WHILE month <= last_month LOOP
        EXECUTE format('CREATE TABLE IF NOT EXISTS frame_names_%s PARTITION OF frame_names FOR VALUES FROM (%L) TO (%L)',
                       to_char(month, 'YYYY_MM'), uuid_floor(month::timestamp AT TIME ZONE 'UTC'),
                       uuid_floor((month + interval '1 month') AT TIME ZONE 'UTC'));
        month := month + interval '1 month';
    END LOOP;
END $$;
SELECT ensure_names(now()::date, (now() + interval '2 months')::date);

-- ---------------------------------------------------------------------------------------------- proofs

ALTER TABLE jobs
    ADD COLUMN proof integer CHECK (proof > 0), -- frames that are rendered before the rest is approved
    ADD COLUMN approved_at timestamptz,
    ADD CONSTRAINT jobs_approved_check CHECK (approved_at IS NULL OR proof IS NOT NULL);

-- A key of the rest stands beside the proof's own, and stays closed until the job is approved: what a claim does not
-- see, it need not skip, and approving a million frames touches their few keys.
ALTER TABLE job_keys
    ADD COLUMN rest boolean NOT NULL DEFAULT false,
    DROP CONSTRAINT job_keys_job_id_call_key_key,
    ADD UNIQUE (job_id, call_key, rest);

CREATE FUNCTION rest_is_approved() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM jobs WHERE id = NEW.job_id AND approved_at IS NOT NULL) THEN
        RAISE EXCEPTION 'key % of job % waits for approval', NEW.key_no, NEW.job_id
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER job_keys_approved AFTER INSERT OR UPDATE OF open ON job_keys FOR EACH ROW WHEN (NEW.rest AND NEW.open)
    EXECUTE FUNCTION rest_is_approved();
