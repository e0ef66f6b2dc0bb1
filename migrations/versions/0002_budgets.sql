-- Price books that admins write, quotes, and budgets. Expand only.

-- ---------------------------------------------------------------------------------------------- prices

ALTER TABLE prices ADD COLUMN source text NOT NULL DEFAULT 'catalog' CHECK (source IN ('catalog', 'admin'));
ALTER TABLE prices ADD COLUMN set_by uuid REFERENCES api_keys; -- the admin's key
ALTER TABLE prices ADD COLUMN set_at timestamptz NOT NULL DEFAULT now();
ALTER TABLE prices ADD CHECK (set_by IS NULL OR source = 'admin');
CREATE INDEX prices_book_idx ON prices (book_id);
CREATE INDEX prices_set_by_idx ON prices (set_by) WHERE set_by IS NOT NULL;

-- What was in force stays as it was. What has not happened yet may change: an end that lies ahead may come sooner,
-- as another price is put before the next one, and a price that has not started may be taken out.
CREATE OR REPLACE TRIGGER prices_fixed BEFORE UPDATE ON prices FOR EACH ROW
    WHEN (OLD.book_id <> NEW.book_id OR OLD.rate <> NEW.rate OR lower(OLD.valid) <> lower(NEW.valid)
          OR OLD.source <> NEW.source OR OLD.set_by IS DISTINCT FROM NEW.set_by
          OR (upper(OLD.valid) IS NOT NULL AND upper(OLD.valid) IS DISTINCT FROM upper(NEW.valid)
              AND NOT (upper(NEW.valid) IS NOT NULL AND upper(NEW.valid) < upper(OLD.valid)
                       AND upper(NEW.valid) >= now())))
    EXECUTE FUNCTION refuse('a price never changes; close its range and add another');
CREATE OR REPLACE TRIGGER prices_kept BEFORE DELETE ON prices FOR EACH ROW
    WHEN (lower(OLD.valid) <= clock_timestamp())
    EXECUTE FUNCTION refuse('prices are kept');

-- ---------------------------------------------------------------------------------------------- quotes

-- What a job of these specs costs at most, for a while: its prices are frozen here, and then in the job's frames.
CREATE TABLE quotes (
    id          uuid        PRIMARY KEY,
    account_id  uuid        NOT NULL,
    api_key_id  uuid        REFERENCES api_keys,
    specs_sha256 bytea     NOT NULL CHECK (length(specs_sha256) = 32),
    frames      integer     NOT NULL CHECK (frames BETWEEN 1 AND 16777215),
    currency    text        NOT NULL,
    amount      numeric     NOT NULL CHECK (amount >= 0),
    created_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz NOT NULL CHECK (expires_at > created_at),
    job_id      uuid        UNIQUE REFERENCES jobs ON DELETE CASCADE, -- the one that was submitted against it
    UNIQUE (id, account_id, currency),
    FOREIGN KEY (account_id, currency) REFERENCES accounts (id, currency)
);
CREATE INDEX quotes_expired_idx ON quotes (expires_at) WHERE job_id IS NULL;

CREATE TABLE quote_prices (
    quote_id    uuid        NOT NULL,
    model       text        NOT NULL,
    account_id  uuid        NOT NULL,
    price_id    integer     NOT NULL,
    method      text        NOT NULL,
    currency    text        NOT NULL,
    rate        numeric     NOT NULL,
    PRIMARY KEY (quote_id, model, method),
    FOREIGN KEY (quote_id, account_id, currency) REFERENCES quotes (id, account_id, currency) ON DELETE CASCADE,
    FOREIGN KEY (price_id, method, currency, rate) REFERENCES prices (id, method, currency, rate)
);

-- ---------------------------------------------------------------------------------------------- budgets

ALTER TABLE api_keys ADD UNIQUE (id, account_id);

-- What an account, or one of its keys, may spend: what was charged and what is held together stay within it.
CREATE TABLE budgets (
    id          integer     GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id  uuid        NOT NULL,
    api_key_id  uuid, -- NULL: of the whole account
    period      text        NOT NULL CHECK (period IN ('month', 'total')), -- a calendar month, UTC
    currency    text        NOT NULL,
    amount      numeric     NOT NULL CHECK (amount >= 0),
    set_at      timestamptz NOT NULL DEFAULT now(),
    UNIQUE NULLS NOT DISTINCT (account_id, api_key_id, period),
    UNIQUE (id, account_id),
    FOREIGN KEY (account_id, currency) REFERENCES accounts (id, currency),
    FOREIGN KEY (api_key_id, account_id) REFERENCES api_keys (id, account_id)
);

-- What happens once that much of a budget was charged. reached_at: since when it is so, in that month.
CREATE TABLE budget_thresholds (
    budget_id   integer     NOT NULL,
    account_id  uuid        NOT NULL,
    percent     smallint    NOT NULL CHECK (percent BETWEEN 1 AND 100),
    action      text        NOT NULL CHECK (action IN ('notify', 'stop', 'drain', 'cancel')),
    reached_at  timestamptz,
    month       date        CHECK (extract(day FROM month) = 1),
    PRIMARY KEY (budget_id, percent, action),
    CHECK (month IS NULL OR reached_at IS NOT NULL),
    FOREIGN KEY (budget_id, account_id) REFERENCES budgets (id, account_id) ON DELETE CASCADE
);

-- Jobs that a budget paused, not a person: they go on when there is room again.
CREATE TABLE budget_pauses (
    job_id      uuid        PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
    account_id  uuid        NOT NULL REFERENCES accounts,
    at          timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX budget_pauses_account_idx ON budget_pauses (account_id);

-- What an account's keys hold (month is null) and were charged in a month: appended as deltas, folded by the sweep.
-- Held is written by a trigger on jobs alone, so that the sum here is the sum of jobs.held in every snapshot; spent
-- by fold_counts.sql, in the statement that lowers the holds by as much or more.
CREATE TABLE tallies (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id  uuid        NOT NULL REFERENCES accounts,
    api_key_id  uuid        REFERENCES api_keys,
    month       date        CHECK (extract(day FROM month) = 1),
    held        numeric     NOT NULL DEFAULT 0,
    spent       numeric     NOT NULL DEFAULT 0,
    folded      boolean     NOT NULL DEFAULT false,
    CHECK (CASE WHEN month IS NULL THEN spent = 0 ELSE held = 0 END)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);
CREATE INDEX tallies_account_idx ON tallies (account_id, api_key_id);
CREATE INDEX tallies_unfolded_idx ON tallies (account_id) WHERE NOT folded;

-- now() is that of the usage written in the same transaction: what is spent falls into the month it was charged in
ALTER TABLE counts ADD COLUMN at timestamptz NOT NULL DEFAULT now();

CREATE FUNCTION tally_hold() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    change numeric := CASE TG_OP WHEN 'INSERT' THEN NEW.held WHEN 'DELETE' THEN -OLD.held ELSE NEW.held - OLD.held END;
BEGIN
    IF change <> 0 THEN
        INSERT INTO tallies (account_id, api_key_id, held)
        VALUES (coalesce(NEW.account_id, OLD.account_id), coalesce(NEW.api_key_id, OLD.api_key_id), change);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER jobs_tallied AFTER INSERT OR DELETE OR UPDATE OF held ON jobs FOR EACH ROW EXECUTE FUNCTION tally_hold();

INSERT INTO tallies (account_id, api_key_id, held, folded)
SELECT account_id, api_key_id, sum(held), true FROM jobs GROUP BY account_id, api_key_id HAVING sum(held) <> 0;
INSERT INTO tallies (account_id, api_key_id, month, spent, folded)
SELECT u.account_id, j.api_key_id, date_trunc('month', u.at AT TIME ZONE 'UTC')::date, sum(u.amount), true
FROM usage AS u JOIN jobs AS j ON j.id = u.job_id
GROUP BY 1, 2, 3;
INSERT INTO tallies (account_id, api_key_id, month, spent) -- what is not folded yet will be added when it is
SELECT j.account_id, j.api_key_id, date_trunc('month', now() AT TIME ZONE 'UTC')::date, -sum(c.charged)
FROM counts AS c JOIN jobs AS j ON j.id = c.job_id
WHERE NOT c.folded
GROUP BY 1, 2;

-- ---------------------------------------------------------------------------------------------- events

-- A budget's event is an account's, not a job's.
ALTER TABLE outbox ALTER COLUMN job_id DROP NOT NULL;
ALTER TABLE events ALTER COLUMN job_id DROP NOT NULL;
