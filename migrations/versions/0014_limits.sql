-- Keys that expire, rotate with an overlap and say when they were used; limits of accounts; answers kept to be repeated.

ALTER TABLE api_keys
    ADD COLUMN name           text        CHECK (length(name) BETWEEN 1 AND 100),
    ADD COLUMN scopes         text[]      CHECK (cardinality(scopes) > 0 AND scopes <@ '{read,submit,admin}'::text[]), -- NULL: the role's
    ADD COLUMN expires_at     timestamptz,
    ADD COLUMN previous_until timestamptz, -- the version before this one opens until then
    ADD COLUMN last_used_at   timestamptz; -- right within a minute or two

-- What an account, or one of its keys, may do at most; NULL: what the farm's settings say.
CREATE TABLE limits (
    id                integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    account_id        uuid    NOT NULL REFERENCES accounts,
    api_key_id        uuid, -- NULL: all its keys together
    reads_per_s       double precision CHECK (reads_per_s BETWEEN 0 AND 1e6), -- 0: none at all
    writes_per_s      double precision CHECK (writes_per_s BETWEEN 0 AND 1e6),
    submissions_per_s double precision CHECK (submissions_per_s BETWEEN 0 AND 1e6),
    open_frames       bigint  CHECK (open_frames >= 0),
    inputs            integer CHECK (inputs >= 0),
    input_bytes       bigint  CHECK (input_bytes >= 0),
    set_at            timestamptz NOT NULL DEFAULT now(),
    UNIQUE NULLS NOT DISTINCT (account_id, api_key_id),
    FOREIGN KEY (api_key_id, account_id) REFERENCES api_keys (id, account_id),
    CONSTRAINT limits_of_a_key_check CHECK (api_key_id IS NULL OR num_nonnulls(open_frames, inputs, input_bytes) = 0)
);

-- ---------------------------------------------------------------------------------------------- open frames

-- Frames that have not ended, of an account's keys: added by the trigger on jobs, taken off by fold_counts.sql in the
-- statement that folds their ends. The sum over an account is right in every snapshot, and late by one fold at most.
ALTER TABLE tallies
    ADD COLUMN open_frames bigint NOT NULL DEFAULT 0,
    ADD CONSTRAINT tallies_open_frames_check CHECK (month IS NULL OR open_frames = 0);
CREATE INDEX tallies_open_idx ON tallies (account_id) INCLUDE (open_frames) WHERE open_frames <> 0;

CREATE OR REPLACE FUNCTION tally_hold() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    change numeric := CASE TG_OP WHEN 'INSERT' THEN NEW.held WHEN 'DELETE' THEN -OLD.held ELSE NEW.held - OLD.held END;
    more   bigint := CASE TG_OP WHEN 'INSERT' THEN NEW.frames WHEN 'UPDATE' THEN NEW.frames - OLD.frames
        ELSE CASE OLD.status WHEN 'staged' THEN -OLD.frames ELSE 0 END END; -- an upload's; any other deleted has ended
BEGIN
    IF change <> 0 OR more <> 0 THEN
        INSERT INTO tallies (account_id, api_key_id, held, open_frames)
        VALUES (coalesce(NEW.account_id, OLD.account_id), coalesce(NEW.api_key_id, OLD.api_key_id), change, more);
    END IF;
    RETURN NULL;
END $$;
CREATE OR REPLACE TRIGGER jobs_tallied AFTER INSERT OR DELETE OR UPDATE OF held, frames ON jobs
    FOR EACH ROW EXECUTE FUNCTION tally_hold();

INSERT INTO tallies (account_id, api_key_id, open_frames)
SELECT j.account_id, j.api_key_id, sum(j.frames - c.ended)
FROM jobs AS j
CROSS JOIN LATERAL (
    SELECT coalesce(sum(done + failed + cancelled), 0) AS ended FROM counts WHERE job_id = j.id AND folded
) AS c
GROUP BY 1, 2
HAVING sum(j.frames - c.ended) <> 0;

CREATE INDEX inputs_counted_idx ON inputs (account_id) INCLUDE (bytes) WHERE deleted_at IS NULL;

-- ---------------------------------------------------------------------------------------------- once

-- What a request that created something was answered, without secrets, for who sends it again. Jobs have
-- idempotency_keys: their answer is shown as they are by then.
CREATE TABLE kept_answers (
    account_id  uuid        NOT NULL REFERENCES accounts,
    operation   text        NOT NULL CHECK (length(operation) BETWEEN 1 AND 2000), -- method and path
    key         text        NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    body_sha256 bytea       NOT NULL CHECK (length(body_sha256) = 32),
    status      smallint    NOT NULL CHECK (status BETWEEN 200 AND 299),
    headers     jsonb       NOT NULL DEFAULT '{}',
    answer      jsonb       NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (account_id, operation, key)
);
CREATE INDEX kept_answers_created_idx ON kept_answers (created_at);
