-- Open the places of these jobs in their lanes, in the order of their ids; as open_keys.sql.
WITH locked AS MATERIALIZED (
    SELECT jl.job_id, jl.model
    FROM job_lanes AS jl
    WHERE jl.job_id = ANY (CAST(:jobs AS uuid[]))
    ORDER BY jl.job_id, jl.model
    FOR NO KEY UPDATE
)
UPDATE job_lanes AS jl SET open = true
FROM locked WHERE jl.job_id = locked.job_id AND jl.model = locked.model
