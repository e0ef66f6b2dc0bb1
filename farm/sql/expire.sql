-- Delete the images of jobs that ended longer ago than their account keeps them. The verb on the job; clear.sql and
-- the purge follow. Reads jobs_kept_idx, an account at a time; a job somebody has locked waits for the next round.
UPDATE jobs SET images_deleted_at = clock_timestamp()
WHERE id = ANY (ARRAY (
    SELECT j.id
    FROM accounts AS a
    JOIN jobs AS j ON j.account_id = a.id
    WHERE a.retention_days IS NOT NULL AND j.images_deleted_at IS NULL AND j.ended_at IS NOT NULL
      AND j.ended_at < clock_timestamp() - make_interval(days => a.retention_days)
    ORDER BY j.ended_at
    LIMIT :n
    FOR NO KEY UPDATE OF j SKIP LOCKED
))
RETURNING id, account_id
