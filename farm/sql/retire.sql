-- Retire the lanes that hold no open job still. empty_lanes.sql locked them in an earlier statement of this
-- transaction: whoever fills a lane takes its lock last, so what was filled before is seen here, and what comes later
-- waits for us and then makes it active again.
UPDATE lanes AS l
SET active = false
FROM unnest(CAST(:models AS text[]), CAST(:priorities AS smallint[]), CAST(:accounts AS uuid[]))
     AS x (model, priority, account_id)
WHERE l.model = x.model AND l.priority = x.priority AND l.account_id = x.account_id
  AND NOT EXISTS (
      SELECT FROM job_lanes AS jl
      WHERE jl.model = l.model AND jl.priority = l.priority AND jl.account_id = l.account_id
        AND jl.runnable AND jl.open
  )
