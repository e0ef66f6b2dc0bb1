-- Lock the active lanes that hold no open, runnable job, to retire them. SKIP LOCKED: one that somebody fills or
-- charges just now is not empty for long; FOR UPDATE, as who fills an active one holds it FOR KEY SHARE. Reads lanes_active_idx, job_lanes_head_idx.
SELECT l.model, l.priority, l.account_id
FROM lanes AS l
WHERE l.active AND NOT EXISTS (
    SELECT FROM job_lanes AS jl
    WHERE jl.model = l.model AND jl.priority = l.priority AND jl.account_id = l.account_id
      AND jl.runnable AND jl.open
)
LIMIT 5000
FOR UPDATE SKIP LOCKED
