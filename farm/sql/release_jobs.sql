-- End the waiting of up to :n jobs: their start has come, the jobs they come after have ended, and no more of their
-- frames are queued than may be (narrow.sql is done). One that comes after a job that had to be all done and is not is
-- cancelled. What a budget holds back waits on. Returns those whose lanes are to be opened as runnable.
-- FOR UPDATE as the verbs take it; SKIP LOCKED: one that is being settled has its turn in the next round.
-- Reads jobs_waits_idx, and of each job there job_after's key, the keys of jobs, frames_queued_idx.
WITH running AS MATERIALIZED (
    SELECT job_id, count(*) AS frames FROM frames WHERE pack_id IS NOT NULL GROUP BY job_id
), due AS MATERIALIZED (
    SELECT j.id, j.account_id, (
        SELECT min(a.after_id::text)::uuid
        FROM job_after AS a JOIN jobs AS d ON d.id = a.after_id
        WHERE a.job_id = j.id AND a.ok AND d.frames > (SELECT coalesce(sum(done), 0) FROM counts WHERE job_id = d.id)
    ) AS missed
    FROM jobs AS j
    WHERE j.waits AND j.ended_at IS NULL AND j.status IN ('active', 'paused')
      AND (j.start_after IS NULL OR j.start_after <= now())
      AND NOT EXISTS (
          SELECT FROM job_after AS a JOIN jobs AS d ON d.id = a.after_id
          WHERE a.job_id = j.id AND d.ended_at IS NULL
      )
      AND (j.max_parallel IS NULL OR j.max_parallel = 16777215 OR (
          SELECT count(*) > 0
                 AND count(*) + coalesce((SELECT r.frames FROM running AS r WHERE r.job_id = j.id), 0) > j.max_parallel
          FROM (SELECT FROM frames AS f
                WHERE f.job_id = j.id AND f.status = 'queued' AND f.id > j.id AND f.id <= last_frame_id(j.id)
                LIMIT j.max_parallel + 1) AS q) IS FALSE)
      AND NOT EXISTS (
          SELECT FROM budget_thresholds AS t JOIN budgets AS b ON b.id = t.budget_id
          WHERE t.reached_at IS NOT NULL AND t.action IN ('drain', 'cancel')
            AND b.account_id = j.account_id AND (b.api_key_id IS NULL OR b.api_key_id = j.api_key_id))
    ORDER BY j.id
    LIMIT :n
    FOR UPDATE OF j SKIP LOCKED
), released AS (
    UPDATE jobs AS j SET waits = false, runnable = j.status = 'active'
    FROM due AS d WHERE j.id = d.id AND d.missed IS NULL
    RETURNING j.id, j.account_id, j.runnable
), missed AS (
    UPDATE jobs AS j SET waits = false, status = 'cancelled', runnable = false
    FROM due AS d WHERE j.id = d.id AND d.missed IS NOT NULL
    RETURNING j.id, j.account_id, d.missed
), told AS (
    INSERT INTO outbox (account_id, job_id, kind, data)
    SELECT account_id, id, 'job.released', '{}' FROM released WHERE runnable
    UNION ALL
    SELECT account_id, id, 'job.cancelled',
           jsonb_build_object('by', 'after_ok', 'job', 'job_' || replace(CAST(missed AS text), '-', ''))
    FROM missed
)
SELECT id, runnable FROM released UNION ALL SELECT id, false FROM missed
