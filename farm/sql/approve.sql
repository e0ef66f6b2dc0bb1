-- Open the keys of what stands behind a job's proof, and have the sweep look at its waiting frames. In the order of the
-- keys, as open_keys.sql; the caller has locked the job, and it says that it is approved: a trigger asks.
WITH locked AS MATERIALIZED (
    SELECT job_id, key_no FROM job_keys WHERE job_id = :job AND rest ORDER BY key_no FOR NO KEY UPDATE
), due AS (
    INSERT INTO waiters_due (account_id) VALUES (:account_id)
)
UPDATE job_keys AS k SET open = true
FROM locked WHERE k.job_id = locked.job_id AND k.key_no = locked.key_no
