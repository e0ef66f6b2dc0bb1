-- Webhooks: who is told of what, and each telling. No secret is stored: it is computed of FARM_SECRET, the webhook's
-- id (a job's own one: the account's) and a version.

CREATE TABLE webhooks (
    id           uuid        PRIMARY KEY,
    account_id   uuid        NOT NULL REFERENCES accounts,
    job_id       uuid        REFERENCES jobs ON DELETE CASCADE, -- the one job that it is told of; NULL: all of them
    url          text        NOT NULL CHECK (length(url) BETWEEN 1 AND 4096),
    receiver     text        NOT NULL, -- scheme, host and port of the URL
    kinds        text[]      NOT NULL CHECK (cardinality(kinds) BETWEEN 1 AND 20),
    description  text        CHECK (length(description) <= 200),
    shape        text        NOT NULL DEFAULT '', -- of what is sent: '' is ours, others are dialects'
    base         text        NOT NULL DEFAULT '', -- how whoever asked reached the farm: links begin with it
    version      integer     NOT NULL DEFAULT 1 CHECK (version >= 1),
    rotated_at   timestamptz, -- the secret before signs too for a day
    created_at   timestamptz NOT NULL DEFAULT now(),
    disabled_at  timestamptz,
    disabled_why text        CHECK (disabled_why IN ('asked', 'gone', 'failing')),
    failures     integer     NOT NULL DEFAULT 0 CHECK (failures >= 0), -- in a row
    failing_since timestamptz,
    next_at      timestamptz, -- when something may be due; NULL: nothing waits
    paused_until timestamptz, -- a receiver that failed is left alone for a while
    leased_until timestamptz, -- somebody is telling it
    behind_from  bigint,      -- the first event without a delivery: too many wait
    UNIQUE (id, account_id),
    CHECK ((disabled_at IS NULL) = (disabled_why IS NULL)),
    CHECK ((failures = 0) = (failing_since IS NULL)),
    CHECK (job_id IS NOT NULL OR (shape = '' AND base = ''))
);
CREATE INDEX webhooks_account_idx ON webhooks (account_id, id) WHERE job_id IS NULL;
CREATE INDEX webhooks_job_idx ON webhooks (job_id) WHERE job_id IS NOT NULL;
CREATE INDEX webhooks_due_idx ON webhooks (next_at) WHERE next_at IS NOT NULL AND disabled_at IS NULL;
CREATE INDEX webhooks_behind_idx ON webhooks (id) WHERE behind_from IS NOT NULL;

-- The secret of the callbacks of an account's jobs, from the first rotation on.
CREATE TABLE callback_secrets (
    account_id   uuid        PRIMARY KEY REFERENCES accounts,
    version      integer     NOT NULL CHECK (version >= 1),
    rotated_at   timestamptz NOT NULL DEFAULT now()
);

-- One row for each webhook and event, from the moment the event was looked at; tests have no event.
CREATE TABLE deliveries (
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    webhook_id   uuid        NOT NULL,
    account_id   uuid        NOT NULL,
    event        bigint,
    kind         text        NOT NULL,
    status       text        NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'delivered', 'failed')),
    step         smallint    NOT NULL DEFAULT 0 CHECK (step >= 0), -- of the schedule
    tries        integer     NOT NULL DEFAULT 0 CHECK (tries >= 0),
    next_at      timestamptz DEFAULT clock_timestamp(),
    log          jsonb       NOT NULL DEFAULT '[]', -- the last tries
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at     timestamptz,
    FOREIGN KEY (webhook_id, account_id) REFERENCES webhooks (id, account_id) ON DELETE CASCADE,
    UNIQUE (webhook_id, event),
    CHECK ((status = 'pending') = (next_at IS NOT NULL)),
    CHECK ((status = 'pending') = (ended_at IS NULL))
) WITH (autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX deliveries_webhook_idx ON deliveries (webhook_id, id);
CREATE INDEX deliveries_pending_idx ON deliveries (webhook_id, id) WHERE status = 'pending';
CREATE INDEX deliveries_old_idx ON deliveries (ended_at) WHERE ended_at IS NOT NULL;

-- The last event that was looked at for them.
CREATE TABLE deliveries_upto (
    one          boolean     PRIMARY KEY DEFAULT true CHECK (one),
    number       bigint      NOT NULL CHECK (number >= 0)
);
INSERT INTO deliveries_upto (number) SELECT coalesce(max(number), 0) FROM events;

-- Who follows a job of a million frames without its frames must not read a million events.
CREATE INDEX events_job_rare_idx ON events (job_id, number) WHERE kind <> 'frame.done';
CREATE INDEX events_account_rare_idx ON events (account_id, number) WHERE kind <> 'frame.done';
