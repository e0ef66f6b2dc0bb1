-- Lock the active lanes that hold no open, runnable job, to retire them. One that somebody fills just now, who holds its
-- advisory lock (hold_lanes.sql), is passed over, and so is one that is charged. The tries come last, for lanes that are
-- empty: each that succeeds is held until the end. Reads lanes_active_idx, job_lanes_head_idx.
WITH empty AS MATERIALIZED (
    SELECT l.model, l.priority, l.account_id
    FROM lanes AS l
    WHERE l.active AND NOT EXISTS (
        SELECT FROM job_lanes AS jl
        WHERE jl.model = l.model AND jl.priority = l.priority AND jl.account_id = l.account_id
          AND jl.runnable AND jl.open
    )
    LIMIT 500
    FOR NO KEY UPDATE SKIP LOCKED
)
SELECT e.model, e.priority, e.account_id
FROM empty AS e
WHERE pg_try_advisory_xact_lock(hashtextextended(e.model || ' ' || e.priority || ' ' || e.account_id, 0))
