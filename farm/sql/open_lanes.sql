-- Make the lanes of these jobs active that are not. One that refills starts at the lowest active share, so that it
-- cannot spend what it saved while it asked for nothing; a model's first lane at that of all models, which one worker
-- may compare it with. In the order of their keys; the last statement of its transaction, after hold_lanes.sql, which
-- keeps lanes active that are so here: with an upsert of each, 64 clients of one account waited for each other's
-- commits most of the time.
WITH wanted AS MATERIALIZED (
    SELECT DISTINCT jl.model, jl.priority, jl.account_id, l.active IS TRUE AS active
    FROM job_lanes AS jl
    LEFT JOIN lanes AS l ON l.model = jl.model AND l.priority = jl.priority AND l.account_id = jl.account_id
    WHERE jl.job_id = ANY (CAST(:jobs AS uuid[])) AND jl.runnable
), opened AS (
    INSERT INTO lanes AS l (model, priority, account_id, served, active, waiting_at)
    SELECT x.model, x.priority, x.account_id,
           coalesce((SELECT min(o.served) FROM lanes AS o
                     WHERE o.model = x.model AND o.priority = x.priority AND o.active),
                    (SELECT min(o.served) FROM lanes AS o WHERE o.priority = x.priority AND o.active), 0),
           true, clock_timestamp()
    FROM wanted AS x
    WHERE NOT x.active
    ORDER BY x.model, x.priority, x.account_id
    ON CONFLICT (model, priority, account_id) DO UPDATE
    SET active = true,
        served = CASE WHEN l.active THEN l.served ELSE greatest(l.served, excluded.served) END,
        waiting_at = CASE WHEN l.active THEN l.waiting_at ELSE excluded.waiting_at END
)
SELECT model, priority FROM wanted
