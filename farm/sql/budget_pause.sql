-- Pause up to :n jobs whose budget says drain or cancel, as jobs.pause does: what is on a device is finished.
-- FOR UPDATE as the verb takes it; SKIP LOCKED: one that is being settled has its turn in the next round.
-- Reads jobs_open_idx, and is run only while a threshold of these actions is reached.
WITH due AS MATERIALIZED (
    SELECT j.id, j.account_id FROM jobs AS j
    WHERE j.ended_at IS NULL AND j.status = 'active' AND EXISTS (
        SELECT FROM budget_thresholds AS t JOIN budgets AS b ON b.id = t.budget_id
        WHERE t.reached_at IS NOT NULL AND t.action IN ('drain', 'cancel')
          AND b.account_id = j.account_id AND (b.api_key_id IS NULL OR b.api_key_id = j.api_key_id))
    ORDER BY j.id
    LIMIT :n
    FOR UPDATE OF j SKIP LOCKED
), paused AS (
    UPDATE jobs AS j SET status = 'paused', runnable = false FROM due AS d WHERE j.id = d.id
), noted AS (
    INSERT INTO budget_pauses (job_id, account_id) SELECT id, account_id FROM due ON CONFLICT DO NOTHING
), told AS (
    INSERT INTO outbox (account_id, job_id, kind, data)
    SELECT account_id, id, 'job.paused', '{"by": "budget"}' FROM due ORDER BY id
)
SELECT count(*) FROM due
