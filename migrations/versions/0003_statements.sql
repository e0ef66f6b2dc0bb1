-- Statements and their lines, why a charge was reversed, and when workers sat there. Runs on Postgres 15 to 18.

-- ---------------------------------------------------------------------------------------------- statements

-- An account's month. While closed_at is NULL its lines are filled batch after batch; from then on nothing changes.
CREATE TABLE statements (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id  uuid        NOT NULL,
    month       date        NOT NULL CHECK (extract(day FROM month) = 1),
    currency    text        NOT NULL,
    digits      smallint    NOT NULL CHECK (digits BETWEEN 0 AND 4), -- of the currency's minor unit
    opened_at   timestamptz NOT NULL DEFAULT now(),
    total       numeric     CHECK (total = round(total, digits)),
    closed_at   timestamptz,
    CHECK ((closed_at IS NULL) = (total IS NULL)),
    FOREIGN KEY (account_id, currency) REFERENCES accounts (id, currency),
    UNIQUE (account_id, month),
    UNIQUE (id, account_id, currency)
);
CREATE UNIQUE INDEX statements_closing_idx ON statements (account_id) WHERE closed_at IS NULL; -- one month after the other

-- What usage.statement_line names. Usage has no foreign key to it, which would cost every charge a look: a line never
-- goes, and usage_stated below sees to it that a row gets only a line of its own kind.
CREATE TABLE statement_lines (
    id           bigint     GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    statement_id bigint     NOT NULL,
    account_id   uuid       NOT NULL,
    currency     text       NOT NULL,
    model        text       NOT NULL,
    method       text       NOT NULL,
    rate         numeric    NOT NULL,
    frames       bigint     NOT NULL CHECK (frames >= 0),   -- charges
    reversed     bigint     NOT NULL CHECK (reversed >= 0), -- reversals
    late         bigint     NOT NULL CHECK (late BETWEEN 0 AND frames + reversed), -- of both, those of earlier months
    quantity     bigint     NOT NULL,
    exact        numeric    NOT NULL,
    amount       numeric,   -- rounded, when the statement closes
    FOREIGN KEY (statement_id, account_id, currency) REFERENCES statements (id, account_id, currency),
    UNIQUE (statement_id, model, method, rate),
    CHECK (frames + reversed > 0),
    CHECK (exact = quantity * rate * CASE method WHEN 'mpx_step' THEN 0.00000095367431640625 ELSE 1 END) -- 1/2^20
);

-- What no statement has yet. Rows leave it when they are stated, so that it stays as small as a month.
CREATE INDEX usage_unstated_idx ON usage (account_id, at) WHERE statement_line IS NULL;

CREATE TRIGGER statements_fixed BEFORE UPDATE ON statements FOR EACH ROW
    WHEN (OLD.closed_at IS NOT NULL OR OLD.account_id <> NEW.account_id OR OLD.month <> NEW.month
          OR OLD.currency <> NEW.currency OR OLD.digits <> NEW.digits)
    EXECUTE FUNCTION refuse('a statement stays as it was closed');
CREATE TRIGGER statements_kept BEFORE DELETE ON statements FOR EACH ROW EXECUTE FUNCTION refuse('statements are kept');
CREATE TRIGGER statement_lines_kept BEFORE DELETE ON statement_lines FOR EACH ROW
    EXECUTE FUNCTION refuse('statements are kept');

CREATE FUNCTION line_is_open() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM statements WHERE id = NEW.statement_id AND closed_at IS NULL FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'a statement stays as it was closed' USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER statement_lines_fixed BEFORE INSERT OR UPDATE ON statement_lines FOR EACH ROW
    EXECUTE FUNCTION line_is_open();

-- Rounded once a line, by less than one minor unit, and the total by half of one at most.
CREATE FUNCTION statement_adds_up() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    unit CONSTANT numeric := round(power(10::numeric, -NEW.digits), NEW.digits);
    lines record;
BEGIN
    SELECT coalesce(sum(amount), 0) AS amount, coalesce(sum(exact), 0) AS exact,
           coalesce(bool_and(amount IS NOT NULL AND amount = round(amount, NEW.digits)
                             AND abs(amount - exact) < unit), true) AS rounded
    INTO lines FROM statement_lines WHERE statement_id = NEW.id;
    IF NOT lines.rounded OR lines.amount <> NEW.total OR 2 * abs(NEW.total - lines.exact) > unit THEN
        RAISE EXCEPTION 'statement % does not add up', NEW.id USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER statements_add_up BEFORE INSERT OR UPDATE ON statements FOR EACH ROW WHEN (NEW.closed_at IS NOT NULL)
    EXECUTE FUNCTION statement_adds_up();

-- As in 0001, but a row is compared as it is, not as jsonb: a statement sets the flag of a million rows.
CREATE OR REPLACE FUNCTION usage_fixed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.statement_line IS NULL THEN
        OLD.statement_line := NEW.statement_line;
        IF OLD IS NOT DISTINCT FROM NEW THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION 'usage is append-only; correct it by a reversal' USING ERRCODE = 'restrict_violation';
END $$;

CREATE TRIGGER usage_unstated BEFORE INSERT ON usage FOR EACH ROW WHEN (NEW.statement_line IS NOT NULL)
    EXECUTE FUNCTION refuse('usage is stated when its month is closed');

-- Once a statement, not once a row. Only statements that name usage itself fire it, not those that name a partition;
-- the audit sees those.
CREATE FUNCTION usage_stated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (
        SELECT statement_line, account_id, model, method, currency, rate
        FROM stated WHERE statement_line IS NOT NULL
        EXCEPT
        SELECT l.id, l.account_id, l.model, l.method, l.currency, l.rate
        FROM statement_lines AS l JOIN statements AS s ON s.id = l.statement_id
        WHERE s.closed_at IS NULL
    ) THEN
        RAISE EXCEPTION 'usage belongs on an open line of its account, model, method and rate'
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER usage_stated AFTER UPDATE ON usage REFERENCING NEW TABLE AS stated FOR EACH STATEMENT
    EXECUTE FUNCTION usage_stated();

-- ---------------------------------------------------------------------------------------------- reversals

-- Who took a charge back, and why. The money is in usage, entry 1.
CREATE TABLE reversals (
    frame_id    uuid        PRIMARY KEY,
    account_id  uuid        NOT NULL REFERENCES accounts,
    api_key_id  uuid        REFERENCES api_keys, -- NULL: an admin at the database
    reason      text        NOT NULL CHECK (length(reason) BETWEEN 1 AND 500),
    at          timestamptz NOT NULL DEFAULT now()
);
CREATE TRIGGER reversals_kept BEFORE UPDATE OR DELETE ON reversals FOR EACH ROW
    EXECUTE FUNCTION refuse('usage is append-only');

CREATE FUNCTION reversal_has_a_reason() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM reversals WHERE frame_id = NEW.frame_id AND account_id = NEW.account_id) THEN
        RAISE EXCEPTION 'the charge of frame % is reversed without a reason', NEW.frame_id
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    IF NOT EXISTS (SELECT FROM usage WHERE frame_id = NEW.frame_id AND entry = 0 AND amount = -NEW.amount
                   AND model = NEW.model AND currency = NEW.currency) THEN
        RAISE EXCEPTION 'frame % has no charge to reverse', NEW.frame_id
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER usage_reversed AFTER INSERT ON usage
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.entry = 1) EXECUTE FUNCTION reversal_has_a_reason();

-- ---------------------------------------------------------------------------------------------- workers' time

-- When a worker was there before it started anew: workers holds its last time only. What a pool's GPUs could have done.
CREATE TABLE sittings (
    worker      text        NOT NULL,
    pool        text        NOT NULL,
    device      text        NOT NULL,
    started_at  timestamptz NOT NULL,
    ended_at    timestamptz NOT NULL CHECK (ended_at >= started_at),
    PRIMARY KEY (worker, started_at)
);
CREATE FUNCTION keep_sitting() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO sittings (worker, pool, device, started_at, ended_at)
    VALUES (OLD.id, OLD.pool, OLD.device, OLD.started_at, greatest(OLD.started_at, OLD.seen_at))
    ON CONFLICT DO NOTHING;
    RETURN NULL;
END $$;
CREATE TRIGGER workers_start AFTER UPDATE OF started_at ON workers FOR EACH ROW
    WHEN (OLD.started_at <> NEW.started_at) EXECUTE FUNCTION keep_sitting();
