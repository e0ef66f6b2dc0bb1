-- Close the locked job lanes that have no open key, as this younger snapshot sees it.
UPDATE job_lanes AS jl
SET open = false
FROM unnest(CAST(:jobs AS uuid[]), CAST(:models AS text[])) AS x (job_id, model)
WHERE jl.job_id = x.job_id AND jl.model = x.model AND NOT EXISTS (
    SELECT FROM job_keys AS k WHERE k.job_id = jl.job_id AND k.model = jl.model AND k.open
)
