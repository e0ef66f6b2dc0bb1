-- Cancel up to :n paused jobs whose budget says so and of which nothing is on a device any more: so what runs is
-- finished and billed, and what is queued ends. Reads jobs_open_idx and frames_pack_idx, and is run only while a
-- threshold of that action is reached.
WITH running AS MATERIALIZED (
    SELECT DISTINCT job_id FROM frames WHERE pack_id IS NOT NULL
), due AS MATERIALIZED (
    SELECT j.id, j.account_id FROM jobs AS j
    WHERE j.ended_at IS NULL AND j.status = 'paused' AND j.id NOT IN (SELECT job_id FROM running) AND EXISTS (
        SELECT FROM budget_thresholds AS t JOIN budgets AS b ON b.id = t.budget_id
        WHERE t.reached_at IS NOT NULL AND t.action = 'cancel'
          AND b.account_id = j.account_id AND (b.api_key_id IS NULL OR b.api_key_id = j.api_key_id))
    ORDER BY j.id
    LIMIT :n
    FOR UPDATE OF j SKIP LOCKED
), cancelled AS (
    UPDATE jobs AS j SET status = 'cancelled' FROM due AS d WHERE j.id = d.id
), told AS (
    INSERT INTO outbox (account_id, job_id, kind, data)
    SELECT account_id, id, 'job.cancelled', '{"by": "budget"}' FROM due ORDER BY id
)
SELECT count(*) FROM due
