-- What the audit can still see, planned prices that are withdrawn, reuse counted by job and images counted once.
-- Expand only; runs on Postgres 15 to 18.

-- ---------------------------------------------------------------------------------------------- detached months

-- The ranges of ids of a table whose partitions are there: what lies in none was detached.
CREATE FUNCTION attached(parent regclass) RETURNS TABLE (lower uuid, upper uuid) LANGUAGE sql STABLE AS $$
    SELECT b.ends[1]::uuid, b.ends[2]::uuid
    FROM pg_inherits AS i
    JOIN pg_class AS c ON c.oid = i.inhrelid
    CROSS JOIN LATERAL (
        SELECT regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM \(''(.*)''\) TO \(''(.*)''\)') AS ends
    ) AS b
    WHERE i.inhparent = parent AND NOT i.inhdetachpending
$$;

-- ---------------------------------------------------------------------------------------------- prices

-- As in 0002, but an end that lies ahead may also come later, or never: the price planned for then was withdrawn.
CREATE OR REPLACE TRIGGER prices_fixed BEFORE UPDATE ON prices FOR EACH ROW
    WHEN (OLD.book_id <> NEW.book_id OR OLD.rate <> NEW.rate OR lower(OLD.valid) <> lower(NEW.valid)
          OR OLD.source <> NEW.source OR OLD.set_by IS DISTINCT FROM NEW.set_by
          OR (upper(OLD.valid) IS NOT NULL AND upper(OLD.valid) IS DISTINCT FROM upper(NEW.valid)
              AND NOT (upper(OLD.valid) > clock_timestamp()
                       AND (upper(NEW.valid) IS NULL OR upper(NEW.valid) >= now()))))
    EXECUTE FUNCTION refuse('a price never changes; close its range and add another');

-- ---------------------------------------------------------------------------------------------- usage

-- As usage_fixed() in 0003, but looked at after the row was written, and without a call: a trigger before it locks each
-- row first. Closing a month sets the flag of a million: a fifth less time, and a WAL record in five.
DROP TRIGGER usage_fixed ON usage;
CREATE TRIGGER usage_fixed AFTER UPDATE ON usage FOR EACH ROW
    WHEN (OLD.statement_line IS NOT NULL
          OR (OLD.frame_id, OLD.entry, OLD.account_id, OLD.job_id, OLD.model, OLD.method, OLD.currency, OLD.price_id,
              OLD.rate, OLD.quantity, OLD.amount, OLD.pack_id, OLD.at)
             IS DISTINCT FROM
             (NEW.frame_id, NEW.entry, NEW.account_id, NEW.job_id, NEW.model, NEW.method, NEW.currency, NEW.price_id,
              NEW.rate, NEW.quantity, NEW.amount, NEW.pack_id, NEW.at))
    EXECUTE FUNCTION refuse('usage is append-only; correct it by a reversal');

-- ---------------------------------------------------------------------------------------------- reuse in a job's counts

ALTER TABLE counts
    ADD COLUMN reused integer NOT NULL DEFAULT 0,  -- of those done
    ADD COLUMN waiting integer NOT NULL DEFAULT 0; -- more, or fewer, that wait for an equal one
INSERT INTO counts (job_id, reused, waiting)
SELECT job_id, count(*) FILTER (WHERE reused), count(*) FILTER (WHERE status = 'waiting')
FROM frames WHERE reused OR status = 'waiting'
GROUP BY job_id;

-- ---------------------------------------------------------------------------------------------- metrics

-- Images delivered, by model, as far as the sweep has counted events. Counting usage would read all of it each time.
CREATE TABLE delivered (
    model       text        PRIMARY KEY,
    images      bigint      NOT NULL CHECK (images >= 0)
);
CREATE TABLE delivered_upto (
    one         boolean     PRIMARY KEY DEFAULT true CHECK (one),
    number      bigint      NOT NULL CHECK (number >= 0) -- of the last event that was looked at
);
INSERT INTO delivered_upto (number) VALUES (0);
