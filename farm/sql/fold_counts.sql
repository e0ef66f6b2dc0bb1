-- Fold up to :n deltas of ended frames, each job's into one row, and lower its hold by what they freed. What they were
-- charged goes to the account's tallies in the same statement: spent and held together never miss any of it;
-- nor do open frames count longer than their end is unfolded.
-- The jobs in the order of their ids, SKIP LOCKED: a fold never waits, and never makes a settle wait long.
WITH due AS MATERIALIZED (
    SELECT id, account_id, api_key_id FROM jobs
    WHERE id IN (SELECT job_id FROM counts WHERE NOT folded ORDER BY id LIMIT :n)
    ORDER BY id
    FOR NO KEY UPDATE SKIP LOCKED
), taken AS (
    DELETE FROM counts WHERE job_id IN (SELECT id FROM due)
    RETURNING job_id, done, failed, cancelled, reused, waiting, charged, freed, folded, at
), total AS MATERIALIZED (
    SELECT job_id, sum(done) AS done, sum(failed) AS failed, sum(cancelled) AS cancelled,
           sum(reused) AS reused, sum(waiting) AS waiting, sum(charged) AS charged, sum(freed) AS freed,
           coalesce(sum(freed) FILTER (WHERE NOT folded), 0) AS freed_now
    FROM taken
    GROUP BY job_id
), put AS (
    INSERT INTO counts (job_id, done, failed, cancelled, reused, waiting, charged, freed, folded)
    SELECT job_id, done, failed, cancelled, reused, waiting, charged, freed, true FROM total
), spent AS (
    INSERT INTO tallies (account_id, api_key_id, month, spent)
    SELECT d.account_id, d.api_key_id, date_trunc('month', t.at AT TIME ZONE 'UTC')::date, sum(t.charged)
    FROM taken AS t JOIN due AS d ON d.id = t.job_id
    WHERE NOT t.folded AND t.charged <> 0
    GROUP BY 1, 2, 3
), closed AS (
    INSERT INTO tallies (account_id, api_key_id, open_frames)
    SELECT d.account_id, d.api_key_id, -sum(t.done + t.failed + t.cancelled)
    FROM taken AS t JOIN due AS d ON d.id = t.job_id
    WHERE NOT t.folded
    GROUP BY 1, 2
    HAVING sum(t.done + t.failed + t.cancelled) <> 0
)
UPDATE jobs AS j
SET held = j.held - t.freed_now
FROM total AS t
WHERE j.id = t.job_id
RETURNING j.id
