-- Find the jobs whose lanes have runnable open work but are not active: the net below
-- open_lanes.sql; none, if all is well.
-- Reads job_lanes_head_idx.
SELECT DISTINCT jl.job_id
FROM job_lanes AS jl
LEFT JOIN lanes AS l ON l.model = jl.model AND l.priority = jl.priority AND l.account_id = jl.account_id
WHERE jl.runnable AND jl.open AND l.active IS NOT TRUE
LIMIT 1000
