-- Open the keys of frames that were given back, in the order of their ids. Unconditional: only a write waits for
-- one who is about to close them.
WITH locked AS MATERIALIZED (
    SELECT k.job_id, k.key_no
    FROM job_keys AS k
    JOIN (SELECT DISTINCT job_id, key_no
          FROM unnest(CAST(:jobs AS uuid[]), CAST(:keys AS integer[])) AS x (job_id, key_no)) AS x
         USING (job_id, key_no)
    ORDER BY k.job_id, k.key_no
    FOR NO KEY UPDATE OF k
)
UPDATE job_keys AS k SET open = true
FROM locked WHERE k.job_id = locked.job_id AND k.key_no = locked.key_no
