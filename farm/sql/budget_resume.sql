-- Let up to :n jobs go on that a budget paused and none holds back any more, and forget those that ended meanwhile.
-- Returns the jobs that are active again: their lanes are to be opened. Reads budget_pauses, which is empty as a rule.
WITH due AS MATERIALIZED (
    SELECT j.id, j.account_id, j.status
    FROM budget_pauses AS p JOIN jobs AS j ON j.id = p.job_id
    WHERE j.status <> 'paused' OR NOT EXISTS (
        SELECT FROM budget_thresholds AS t JOIN budgets AS b ON b.id = t.budget_id
        WHERE t.reached_at IS NOT NULL AND t.action IN ('drain', 'cancel')
          AND b.account_id = j.account_id AND (b.api_key_id IS NULL OR b.api_key_id = j.api_key_id))
    ORDER BY j.id
    LIMIT :n
    FOR UPDATE OF j SKIP LOCKED
), forgotten AS (
    DELETE FROM budget_pauses WHERE job_id IN (SELECT id FROM due)
), resumed AS (
    UPDATE jobs AS j SET status = 'active', runnable = NOT j.waits FROM due AS d WHERE j.id = d.id AND d.status = 'paused'
    RETURNING j.id, j.account_id
), told AS (
    INSERT INTO outbox (account_id, job_id, kind, data)
    SELECT account_id, id, 'job.resumed', '{"by": "budget"}' FROM resumed ORDER BY id
)
SELECT id FROM resumed
