-- what a client of another API holds of a job: the name it knows it by, and what it asked for, in that API's words.
-- asked is JSON in ASCII, as text: jsonb would refuse what JSON may hold, \u0000 and lone surrogates among it
CREATE TABLE tickets (
    job_id uuid PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    account_id uuid NOT NULL REFERENCES accounts (id),
    dialect text NOT NULL CHECK (dialect IN ('replicate', 'fal', 'automatic1111', 'comfyui', 'plain')),
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    client text NOT NULL DEFAULT '',          -- which of the account's clients asked, where they say so
    asked text NOT NULL CHECK (asked LIKE '{%}'),
    start_by timestamptz,                    -- a job that no worker has begun by then is cancelled
    timed_out boolean NOT NULL DEFAULT false, -- that was done
    CONSTRAINT tickets_account_id_dialect_name_key UNIQUE (account_id, dialect, name)
);
-- an account's, newest first
CREATE INDEX tickets_account_idx ON tickets (account_id, dialect, job_id);
CREATE INDEX tickets_start_by_idx ON tickets (start_by) WHERE start_by IS NOT NULL;

-- the names that clients of ComfyUI upload images under
CREATE TABLE input_names (
    account_id uuid NOT NULL,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 255),
    input_id uuid NOT NULL,
    PRIMARY KEY (account_id, name),
    FOREIGN KEY (input_id, account_id) REFERENCES inputs (id, account_id) ON DELETE CASCADE
);
CREATE INDEX input_names_input_idx ON input_names (input_id);
