-- Close what has no queued frame left: given lanes' keys and jobs, then the lanes themselves. The caller has
-- locked the lanes (lock_lanes.sql) in an earlier statement of this transaction: whoever opens one again writes
-- it last, so what was opened before that lock is seen here, and what comes later waits and then opens it.
UPDATE lanes AS l
SET active = false
FROM unnest(CAST(:models AS text[]), CAST(:priorities AS smallint[]), CAST(:accounts AS uuid[]))
     AS x (model, priority, account_id)
WHERE l.model = x.model AND l.priority = x.priority AND l.account_id = x.account_id
  AND NOT EXISTS (
      SELECT FROM job_lanes AS jl
      JOIN job_keys AS k ON k.job_id = jl.job_id AND k.model = jl.model AND k.open
      JOIN LATERAL (
          SELECT FROM frames AS f
          WHERE f.job_id = k.job_id AND f.key_no = k.key_no AND f.status = 'queued'
            AND f.id > k.job_id AND f.id <= last_frame_id(k.job_id)
          LIMIT 1
      ) AS f ON true
      WHERE jl.model = l.model AND jl.priority = l.priority AND jl.account_id = l.account_id
        AND jl.runnable AND jl.open
  )
