-- Files that accounts send, batches of requests made from them, and calls that wait for an answer.

CREATE TABLE files (
    id           uuid        PRIMARY KEY,
    account_id   uuid        NOT NULL REFERENCES accounts,
    purpose      text        NOT NULL CHECK (length(purpose) BETWEEN 1 AND 63),
    filename     text        NOT NULL CHECK (length(filename) BETWEEN 1 AND 255),
    content_type text        NOT NULL CHECK (length(content_type) BETWEEN 1 AND 127),
    bytes        integer     NOT NULL CHECK (bytes >= 0),
    sha256       bytea       NOT NULL CHECK (length(sha256) = 32),
    metadata     jsonb,
    created_at   timestamptz NOT NULL DEFAULT now(),
    stored_at    timestamptz, -- since when its bytes are in the store
    deleted_at   timestamptz, -- since when nobody may ask for it
    purged_at    timestamptz, -- since when they are gone
    UNIQUE (id, account_id),
    CONSTRAINT files_purged_check CHECK (purged_at IS NULL OR deleted_at IS NOT NULL)
);
CREATE INDEX files_account_idx ON files (account_id, id) INCLUDE (bytes) WHERE deleted_at IS NULL;
CREATE INDEX files_old_idx ON files (created_at) WHERE deleted_at IS NULL;
CREATE INDEX files_dying_idx ON files (id) WHERE deleted_at IS NOT NULL AND purged_at IS NULL;

CREATE TABLE batches (
    id                uuid        PRIMARY KEY,
    account_id        uuid        NOT NULL REFERENCES accounts,
    input_file_id     uuid        NOT NULL,
    endpoint          text        NOT NULL CHECK (length(endpoint) BETWEEN 1 AND 127),
    completion_window text        NOT NULL CHECK (length(completion_window) BETWEEN 1 AND 15),
    metadata          jsonb,
    faults            jsonb,       -- why its file was not taken at all
    lines             integer     NOT NULL CHECK (lines >= 0),
    created_at        timestamptz NOT NULL DEFAULT now(),
    expires_at        timestamptz NOT NULL,
    cancelled_at      timestamptz,
    UNIQUE (id, account_id),
    FOREIGN KEY (input_file_id, account_id) REFERENCES files (id, account_id),
    CONSTRAINT batches_failed_check CHECK (faults IS NULL OR cancelled_at IS NULL)
);
CREATE INDEX batches_account_idx ON batches (account_id, id);
CREATE INDEX batches_file_idx ON batches (input_file_id);

-- A request of a batch: the frames it became, or why it became none.
CREATE TABLE batch_lines (
    batch_id   uuid    NOT NULL,
    line       integer NOT NULL CHECK (line >= 1),
    account_id uuid    NOT NULL,
    custom_id  text    NOT NULL CHECK (length(custom_id) BETWEEN 1 AND 512),
    job_id     uuid    REFERENCES jobs ON DELETE CASCADE,
    first      integer CHECK (first >= 0), -- index of its first frame
    frames     integer CHECK (frames >= 1),
    format     text    CHECK (format IN ('url', 'b64_json')),
    error      jsonb,
    PRIMARY KEY (batch_id, line),
    UNIQUE (batch_id, custom_id),
    FOREIGN KEY (batch_id, account_id) REFERENCES batches (id, account_id) ON DELETE CASCADE,
    CONSTRAINT batch_lines_either_check CHECK ((error IS NULL) = (job_id IS NOT NULL)),
    CONSTRAINT batch_lines_whole_check CHECK (num_nulls(job_id, first, frames, format) IN (0, 4))
);
CREATE INDEX batch_lines_job_idx ON batch_lines (job_id) WHERE job_id IS NOT NULL;

-- A synchronous call that was not answered yet. A client that repeats it says how often it tried, not which call it
-- was: the repeat takes one over that was made with the same body and tried less often.
CREATE TABLE open_calls (
    job_id      uuid        PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
    account_id  uuid        NOT NULL REFERENCES accounts,
    body_sha256 bytea       NOT NULL CHECK (length(body_sha256) = 32),
    attempt     smallint    NOT NULL CHECK (attempt >= 0),
    at          timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX open_calls_body_idx ON open_calls (account_id, body_sha256, attempt);
CREATE INDEX open_calls_at_idx ON open_calls (at);
