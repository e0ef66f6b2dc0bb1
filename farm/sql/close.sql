-- Close the locked keys that are empty still, and lock the job lanes they leave without an open key.
WITH closed AS (
    UPDATE job_keys AS k
    SET open = false
    FROM unnest(CAST(:jobs AS uuid[]), CAST(:keys AS integer[])) AS x (job_id, key_no)
    WHERE k.job_id = x.job_id AND k.key_no = x.key_no AND NOT EXISTS (
        SELECT FROM frames AS f
        WHERE f.job_id = k.job_id AND f.key_no = k.key_no AND f.status = 'queued'
          AND f.id > k.job_id AND f.id <= last_frame_id(k.job_id)
    )
    RETURNING k.job_id, k.key_no, k.model
)
SELECT jl.job_id, jl.model
FROM job_lanes AS jl
WHERE jl.open AND (jl.job_id, jl.model) IN (SELECT job_id, model FROM closed)
  AND NOT EXISTS (
      SELECT FROM job_keys AS k
      WHERE k.job_id = jl.job_id AND k.model = jl.model AND k.open
        AND (k.job_id, k.key_no) NOT IN (SELECT job_id, key_no FROM closed)
  )
ORDER BY jl.job_id, jl.model
FOR NO KEY UPDATE OF jl SKIP LOCKED
