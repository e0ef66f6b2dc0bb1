-- End the jobs whose frames have all ended; a cancelled one keeps its status. Returns those that go on and have a
-- max_parallel: they may have room. Reads counts_job_idx.
WITH over AS (
    UPDATE jobs AS j
    SET status = CASE j.status WHEN 'cancelled' THEN 'cancelled' ELSE 'finished' END,
        runnable = false, ended_at = clock_timestamp()
    WHERE j.id = ANY (CAST(:jobs AS uuid[])) AND j.ended_at IS NULL
      AND j.frames = (SELECT sum(done + failed + cancelled) FROM counts WHERE job_id = j.id)
    RETURNING j.id, j.account_id, j.status
), told AS (
    INSERT INTO outbox (account_id, job_id, kind)
    SELECT account_id, id, 'job.finished' FROM over WHERE status = 'finished' ORDER BY id
)
SELECT id FROM jobs
WHERE id = ANY (CAST(:jobs AS uuid[])) AND max_parallel IS NOT NULL AND runnable AND id NOT IN (SELECT id FROM over)
