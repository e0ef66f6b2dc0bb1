-- Of up to :n jobs whose deadline has passed: those that ask for it fail with what is not done, the others go on as bulk.
-- The verb on the job; cancel_frames.sql follows. FOR UPDATE as the verbs take it; SKIP LOCKED: one that is being settled
-- has its turn in the next round. Reads jobs_deadline_idx.
WITH due AS MATERIALIZED (
    SELECT id, account_id, on_late, deadline FROM jobs
    WHERE deadline <= now() AND late_at IS NULL AND ended_at IS NULL AND status IN ('active', 'paused')
    ORDER BY deadline
    LIMIT :n
    FOR UPDATE SKIP LOCKED
), failed AS (
    UPDATE jobs AS j SET status = 'late', runnable = false, waits = false, late_at = clock_timestamp()
    FROM due AS d WHERE j.id = d.id AND d.on_late = 'fail'
), demoted AS (
    UPDATE jobs AS j SET priority = least(j.priority, 1), late_at = clock_timestamp()
    FROM due AS d WHERE j.id = d.id AND d.on_late = 'demote'
), told AS (
    INSERT INTO outbox (account_id, job_id, kind, data)
    SELECT account_id, id, 'job.late', jsonb_build_object('on_late', on_late, 'deadline', deadline) FROM due ORDER BY id
)
SELECT id, on_late FROM due
