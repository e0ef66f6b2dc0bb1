-- The spine's schema. Runs on Postgres 15 to 18 and needs no extension.
--
-- Hot tables are kept narrow and their work indexes partial. What has to leave by the month is partitioned
-- by an id that rises with time: frames and usage by frame id (UUIDv7), events by number. Nothing that stays
-- refers to them by foreign key, so a month can be detached.

-- ---------------------------------------------------------------------------------------------- who pays

CREATE TABLE accounts (
    id          uuid        PRIMARY KEY,
    name        text        NOT NULL UNIQUE CHECK (name ~ '^[a-z0-9][a-z0-9._-]{0,62}$'),
    currency    text        NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    weight      integer     NOT NULL DEFAULT 1 CHECK (weight BETWEEN 1 AND 1000), -- its part of a class, against the others'
    created_at  timestamptz NOT NULL DEFAULT now(),
    UNIQUE (id, currency)
);

-- An API key's secret is HMAC(FARM_SECRET, id and version): nothing here opens anything.
CREATE TABLE api_keys (
    id          uuid        PRIMARY KEY,
    account_id  uuid        NOT NULL REFERENCES accounts,
    role        text        NOT NULL CHECK (role IN ('read', 'submit', 'admin')),
    version     integer     NOT NULL DEFAULT 1 CHECK (version > 0),
    created_at  timestamptz NOT NULL DEFAULT now(),
    revoked_at  timestamptz
);
CREATE INDEX api_keys_account_idx ON api_keys (account_id);

-- ---------------------------------------------------------------------------------------------- prices

CREATE TABLE price_books (
    id          integer     GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id  uuid        REFERENCES accounts, -- NULL: everybody without a book of their own
    model       text        NOT NULL,
    method      text        NOT NULL CHECK (method IN ('mpx_step', 'image')),
    currency    text        NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    UNIQUE NULLS NOT DISTINCT (account_id, model, method, currency),
    UNIQUE (id, method, currency)
);

-- A price never changes; its range is closed when the next one starts.
CREATE TABLE prices (
    id          integer     GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    book_id     integer     NOT NULL,
    method      text        NOT NULL,
    currency    text        NOT NULL,
    rate        numeric     NOT NULL CHECK (rate >= 0),
    valid       tstzrange   NOT NULL CHECK (NOT isempty(valid) AND lower(valid) IS NOT NULL),
    FOREIGN KEY (book_id, method, currency) REFERENCES price_books (id, method, currency),
    UNIQUE (id, method, currency, rate),
    -- int4range stands in for equality, which gist has not without btree_gist
    EXCLUDE USING gist (int4range(book_id, book_id, '[]') WITH &&, valid WITH &&)
);

-- ---------------------------------------------------------------------------------------------- jobs

CREATE TABLE jobs (
    id          uuid        PRIMARY KEY CHECK (right(id::text, 6) = '000000'), -- its frames' ids count up from it
    account_id  uuid        NOT NULL,
    api_key_id  uuid        REFERENCES api_keys,
    name        text        CHECK (length(name) BETWEEN 1 AND 200),
    status      text        NOT NULL CHECK (status IN ('staged', 'active', 'paused', 'cancelled', 'finished')),
    priority    smallint    NOT NULL CHECK (priority BETWEEN 0 AND 9),
    runnable    boolean     NOT NULL CHECK (runnable = (status = 'active')),
    frames      integer     NOT NULL CHECK (frames BETWEEN 1 AND 16777215),
    currency    text        NOT NULL,
    quoted      numeric     NOT NULL CHECK (quoted >= 0),               -- what it costs at most
    held        numeric     NOT NULL CHECK (held BETWEEN 0 AND quoted), -- what its open frames may still cost
    created_at  timestamptz NOT NULL DEFAULT now(),
    ended_at    timestamptz, -- since when all its frames have ended
    CHECK (ended_at IS NULL OR status IN ('cancelled', 'finished')),
    CHECK (ended_at IS NOT NULL OR status <> 'finished'),
    FOREIGN KEY (account_id, currency) REFERENCES accounts (id, currency),
    UNIQUE (id, account_id, priority, runnable)
);
CREATE INDEX jobs_account_idx ON jobs (account_id, id);
CREATE INDEX jobs_open_idx ON jobs (id) WHERE ended_at IS NULL;

-- A job's place in a lane: one row for each model it asks for. Priority and runnable follow the job by
-- ON UPDATE CASCADE, so a verb touches the job and these few rows, never its frames.
CREATE TABLE job_lanes (
    job_id      uuid        NOT NULL,
    model       text        NOT NULL,
    account_id  uuid        NOT NULL,
    priority    smallint    NOT NULL,
    runnable    boolean     NOT NULL,
    open        boolean     NOT NULL DEFAULT true, -- may have queued frames; false is certain
    PRIMARY KEY (job_id, model),
    UNIQUE (job_id, model, account_id),
    FOREIGN KEY (job_id, account_id, priority, runnable)
        REFERENCES jobs (id, account_id, priority, runnable) ON UPDATE CASCADE ON DELETE CASCADE
);
CREATE INDEX job_lanes_head_idx ON job_lanes (model, priority, account_id, job_id) WHERE runnable AND open;

-- The distinct keys of a job's frames: a frame carries only their number.
CREATE TABLE job_keys (
    job_id      uuid        NOT NULL,
    key_no      integer     NOT NULL CHECK (key_no >= 0),
    model       text        NOT NULL,
    account_id  uuid        NOT NULL,
    shape_key   text        NOT NULL,
    call_key    text        NOT NULL,
    pixels      integer     NOT NULL CHECK (pixels > 0), -- of one frame
    open        boolean     NOT NULL DEFAULT true, -- may have queued frames; false is certain
    PRIMARY KEY (job_id, key_no),
    UNIQUE (job_id, key_no, account_id),
    UNIQUE (job_id, call_key),
    FOREIGN KEY (job_id, model, account_id) REFERENCES job_lanes (job_id, model, account_id) ON DELETE CASCADE
);
CREATE INDEX job_keys_open_idx ON job_keys (job_id, model, key_no) WHERE open;
CREATE INDEX job_keys_call_idx ON job_keys (call_key, job_id, key_no) WHERE open;

CREATE TABLE idempotency_keys (
    account_id  uuid        NOT NULL REFERENCES accounts,
    key         text        NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    body_sha256 bytea       NOT NULL CHECK (length(body_sha256) = 32),
    job_id      uuid        NOT NULL REFERENCES jobs ON DELETE CASCADE,
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (account_id, key)
);
CREATE INDEX idempotency_keys_created_idx ON idempotency_keys (created_at);
CREATE INDEX idempotency_keys_job_idx ON idempotency_keys (job_id);

-- Appended as deltas with the frames they count, summed to be read, folded by the sweep: no row is updated
-- by several workers.
CREATE TABLE counts (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id      uuid        NOT NULL REFERENCES jobs ON DELETE CASCADE,
    done        integer     NOT NULL DEFAULT 0,
    failed      integer     NOT NULL DEFAULT 0,
    cancelled   integer     NOT NULL DEFAULT 0,
    charged     numeric     NOT NULL DEFAULT 0,
    freed       numeric     NOT NULL DEFAULT 0, -- of the hold: charged, or not needed any more
    folded      boolean     NOT NULL DEFAULT false
);
CREATE INDEX counts_job_idx ON counts (job_id);
CREATE INDEX counts_unfolded_idx ON counts (id) WHERE NOT folded;

-- ---------------------------------------------------------------------------------------------- fairness

-- What a lane was served, in pixels × steps × rows divided by its account's weight. `served` is in no index,
-- so charging it is a HOT update.
CREATE TABLE lanes (
    model       text        NOT NULL,
    priority    smallint    NOT NULL CHECK (priority BETWEEN 0 AND 9),
    account_id  uuid        NOT NULL REFERENCES accounts,
    served      bigint      NOT NULL DEFAULT 0 CHECK (served >= 0),
    active      boolean     NOT NULL, -- may have a runnable frame; false is certain
    waiting_at  timestamptz NOT NULL DEFAULT now(), -- served last, or active since
    PRIMARY KEY (model, priority, account_id)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);
CREATE INDEX lanes_active_idx ON lanes (model, priority) WHERE active;

-- ---------------------------------------------------------------------------------------------- work

CREATE TABLE workers (
    id          text        PRIMARY KEY, -- the Celery node's name
    pool        text        NOT NULL,
    models      text[]      NOT NULL CHECK (cardinality(models) > 0),
    device      text        NOT NULL,
    state       text        NOT NULL CHECK (state IN ('up', 'draining', 'gone')),
    started_at  timestamptz NOT NULL DEFAULT now(),
    seen_at     timestamptz NOT NULL DEFAULT now()
);

-- Frames one worker claimed together. Its id is the fence, lease_until the lease.
-- The id is a moment in microseconds and 12 random bits, no sequence: a crash may undo a claim that did not wait
-- for the disk, and a sequence would then give its number, the fence, to somebody else.
CREATE TABLE packs (
    id          bigint      PRIMARY KEY DEFAULT
        ((extract(epoch FROM clock_timestamp()) * 1000000)::bigint << 12) | floor(random() * 4096)::bigint,
    worker      text        NOT NULL,
    model       text        NOT NULL,
    call_key    text        NOT NULL,
    priority    smallint    NOT NULL,
    frames      integer     NOT NULL CHECK (frames > 0),
    work        bigint      NOT NULL CHECK (work > 0),
    claimed_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    lease_until timestamptz NOT NULL,
    gpu_ms      integer     CHECK (gpu_ms >= 0),
    outcome     text        CHECK (outcome IN ('settled', 'failed', 'lost', 'released')),
    closed_at   timestamptz,
    CHECK ((outcome IS NULL) = (closed_at IS NULL))
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02);
CREATE INDEX packs_open_idx ON packs (lease_until) WHERE closed_at IS NULL;
CREATE INDEX packs_worker_idx ON packs (worker) WHERE closed_at IS NULL;

-- The stored file. Several frames may point to one.
CREATE TABLE images (
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id   uuid        NOT NULL REFERENCES accounts,
    key          text        NOT NULL UNIQUE,
    format       text        NOT NULL CHECK (format IN ('png', 'webp', 'jpeg')),
    sha256       bytea       NOT NULL CHECK (length(sha256) = 32),
    pixel_sha256 bytea       NOT NULL CHECK (length(pixel_sha256) = 32),
    bytes        integer     NOT NULL CHECK (bytes > 0),
    width        integer     NOT NULL CHECK (width > 0),
    height       integer     NOT NULL CHECK (height > 0),
    created_at   timestamptz NOT NULL DEFAULT now(),
    CHECK (key = 'v1/' || replace(account_id::text, '-', '') || '/' || encode(sha256, 'hex') || '.' || format)
);

-- The unit of retry and of billing. Its states are drawn at the top of farm/queue.py.
CREATE TABLE frames (
    id          uuid        NOT NULL,
    job_id      uuid        NOT NULL,
    index       integer     NOT NULL CHECK (index >= 0),
    key_no      integer     NOT NULL,
    account_id  uuid        NOT NULL,
    status      text        NOT NULL
        CHECK (status IN ('staged', 'waiting', 'queued', 'claimed', 'done', 'failed', 'cancelled', 'rejected')),
    suspect     boolean     NOT NULL DEFAULT false, -- its last pack was lost or failed: claimed alone
    attempts    smallint    NOT NULL DEFAULT 0 CHECK (attempts >= 0), -- packs it took down alone
    seed        bigint      NOT NULL CHECK (seed >= 0),
    work        bigint      NOT NULL CHECK (work > 0),
    quantity    bigint      NOT NULL CHECK (quantity > 0),
    price_id    integer     NOT NULL REFERENCES prices,
    pack_id     bigint      REFERENCES packs,
    image_id    bigint      REFERENCES images,
    ended_at    timestamptz,
    reason      text,
    fingerprint bytea       NOT NULL CHECK (length(fingerprint) = 32),
    spec        jsonb       NOT NULL,
    PRIMARY KEY (id),
    FOREIGN KEY (job_id, key_no, account_id) REFERENCES job_keys (job_id, key_no, account_id),
    CHECK ((status = 'claimed') = (pack_id IS NOT NULL)),
    CHECK ((status = 'done') = (image_id IS NOT NULL)),
    CHECK ((status IN ('failed', 'rejected')) = (reason IS NOT NULL)),
    CHECK ((status IN ('done', 'failed', 'cancelled', 'rejected')) = (ended_at IS NOT NULL))
) PARTITION BY RANGE (id);
CREATE INDEX frames_queued_idx ON frames (job_id, key_no, id) WHERE status = 'queued';
CREATE INDEX frames_pack_idx ON frames (pack_id) WHERE pack_id IS NOT NULL;

-- ---------------------------------------------------------------------------------------------- money

-- What was used. entry 0 is a frame's charge, 1 the reversal of it; the key allows one of each.
CREATE TABLE usage (
    frame_id       uuid        NOT NULL,
    entry          smallint    NOT NULL DEFAULT 0 CHECK (entry IN (0, 1)),
    account_id     uuid        NOT NULL REFERENCES accounts,
    job_id         uuid        NOT NULL,
    model          text        NOT NULL,
    method         text        NOT NULL,
    currency       text        NOT NULL,
    price_id       integer     NOT NULL,
    rate           numeric     NOT NULL,
    quantity       bigint      NOT NULL CHECK (quantity > 0),
    amount         numeric     NOT NULL,
    pack_id        bigint,
    at             timestamptz NOT NULL DEFAULT now(),
    statement_line bigint,
    PRIMARY KEY (frame_id, entry),
    FOREIGN KEY (price_id, method, currency, rate) REFERENCES prices (id, method, currency, rate),
    CHECK (amount = (1 - 2 * entry) * quantity * rate
                    * CASE method WHEN 'mpx_step' THEN 0.00000095367431640625 ELSE 1 END) -- 1/2^20, exactly
) PARTITION BY RANGE (frame_id);
CREATE INDEX usage_account_idx ON usage (account_id, at);

-- ---------------------------------------------------------------------------------------------- events

-- What happened, as it is written: in the transaction, without a number.
CREATE TABLE outbox (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id  uuid        NOT NULL,
    job_id      uuid        NOT NULL,
    frame_id    uuid,
    kind        text        NOT NULL,
    data        jsonb       NOT NULL DEFAULT '{}',
    at          timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);

-- What happened, as it is read: numbered after commit by the one relay, without a gap.
CREATE TABLE events (
    number      bigint      NOT NULL,
    account_id  uuid        NOT NULL,
    job_id      uuid        NOT NULL,
    frame_id    uuid,
    kind        text        NOT NULL,
    data        jsonb       NOT NULL,
    at          timestamptz NOT NULL,
    PRIMARY KEY (number)
) PARTITION BY RANGE (number);
CREATE INDEX events_job_idx ON events (job_id, number);
CREATE INDEX events_account_idx ON events (account_id, number);

-- ---------------------------------------------------------------------------------------------- guards

CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% of % is refused: %', TG_OP, TG_TABLE_NAME, TG_ARGV[0] USING ERRCODE = 'restrict_violation';
END $$;

CREATE TRIGGER frames_end BEFORE UPDATE OF status ON frames FOR EACH ROW
    WHEN (OLD.status IN ('done', 'failed', 'cancelled', 'rejected') AND NEW.status <> OLD.status)
    EXECUTE FUNCTION refuse('a frame that ended stays as it is');

CREATE TRIGGER jobs_end BEFORE UPDATE OF status ON jobs FOR EACH ROW
    WHEN (OLD.status IN ('cancelled', 'finished') AND NEW.status <> OLD.status)
    EXECUTE FUNCTION refuse('a job that ended stays as it is');

CREATE TRIGGER prices_fixed BEFORE UPDATE ON prices FOR EACH ROW
    WHEN (OLD.book_id <> NEW.book_id OR OLD.rate <> NEW.rate OR lower(OLD.valid) <> lower(NEW.valid)
          OR (upper(OLD.valid) IS NOT NULL AND upper(OLD.valid) IS DISTINCT FROM upper(NEW.valid)))
    EXECUTE FUNCTION refuse('a price never changes; close its range and add another');
CREATE TRIGGER prices_kept BEFORE DELETE ON prices FOR EACH ROW EXECUTE FUNCTION refuse('prices are kept');

CREATE FUNCTION usage_fixed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.statement_line IS NOT NULL OR to_jsonb(OLD) - 'statement_line' <> to_jsonb(NEW) - 'statement_line' THEN
        RAISE EXCEPTION 'usage is append-only; correct it by a reversal' USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER usage_fixed BEFORE UPDATE ON usage FOR EACH ROW EXECUTE FUNCTION usage_fixed();
CREATE TRIGGER usage_kept BEFORE DELETE ON usage FOR EACH ROW EXECUTE FUNCTION refuse('usage is append-only');

-- Done and charged are one fact: whoever writes one without the other cannot commit.
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
    IF NOT EXISTS (SELECT FROM frames WHERE id = NEW.frame_id AND status = 'done'
                   AND account_id = NEW.account_id AND quantity = NEW.quantity AND price_id = NEW.price_id) THEN
        RAISE EXCEPTION 'charge for frame %, which is not done at that price', NEW.frame_id
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER usage_done AFTER INSERT ON usage
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION charge_is_done();

-- ---------------------------------------------------------------------------------------------- partitions

-- The lowest UUIDv7 of a moment.
CREATE FUNCTION uuid_floor(moment timestamptz) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT (lpad(to_hex((extract(epoch FROM moment) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid
$$;

-- The highest id a frame of this job may have: lets the planner look into one partition only.
CREATE FUNCTION last_frame_id(job_id uuid) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT (left(job_id::text, 30) || 'ffffff')::uuid
$$;

-- One partition of frames and usage for each month from first to last, and of events up to a number. Existing ones stay.
CREATE FUNCTION ensure_partitions(first_month date, last_month date, last_event bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    month date := date_trunc('month', first_month);
    event bigint := 0;
    step CONSTANT bigint := 10000000;
BEGIN
    WHILE month <= last_month LOOP
        EXECUTE format('CREATE TABLE IF NOT EXISTS frames_%s PARTITION OF frames FOR VALUES FROM (%L) TO (%L) WITH (fillfactor = 85,
                        autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_insert_scale_factor = 0.05)',
                       to_char(month, 'YYYY_MM'), uuid_floor(month::timestamp AT TIME ZONE 'UTC'),
                       uuid_floor((month + interval '1 month') AT TIME ZONE 'UTC'));
        EXECUTE format('CREATE TABLE IF NOT EXISTS usage_%s PARTITION OF usage FOR VALUES FROM (%L) TO (%L)',
                       to_char(month, 'YYYY_MM'), uuid_floor(month::timestamp AT TIME ZONE 'UTC'),
                       uuid_floor((month + interval '1 month') AT TIME ZONE 'UTC'));
        month := month + interval '1 month';
    END LOOP;
    WHILE event <= last_event LOOP
        IF to_regclass(format('events_%s', event / step)) IS NULL THEN
            EXECUTE format('CREATE TABLE events_%s PARTITION OF events FOR VALUES FROM (%s) TO (%s)',
                           event / step, event, event + step);
        END IF;
        event := event + step;
    END LOOP;
END $$;

SELECT ensure_partitions(now()::date, (now() + interval '2 months')::date, 10000000);
