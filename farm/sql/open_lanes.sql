-- Make the lanes of these jobs active. One that refills starts at the lowest active share, so that it cannot
-- spend what it saved while it asked for nothing; a model's first lane at that of all models, which one worker may
-- compare it with. In the order of their keys; the last statement of its transaction.
--
-- A lane that is active already is held FOR KEY SHARE alone: submissions of one account, and claims that charge it, do
-- not wait for each other's commit; only empty_lanes.sql, which takes FOR UPDATE, passes it over. With the upsert for
-- each of them 64 clients of one account took turns: 1043 of 1500 samples waited here.
WITH wanted AS MATERIALIZED (
    SELECT DISTINCT model, priority, account_id
    FROM job_lanes
    WHERE job_id = ANY (CAST(:jobs AS uuid[])) AND runnable
), standing AS MATERIALIZED (
    SELECT l.model, l.priority, l.account_id
    FROM wanted AS w
    JOIN lanes AS l ON l.model = w.model AND l.priority = w.priority AND l.account_id = w.account_id
    WHERE l.active
    ORDER BY l.model, l.priority, l.account_id
    FOR KEY SHARE OF l
), opened AS (
    INSERT INTO lanes AS l (model, priority, account_id, served, active, waiting_at)
    SELECT x.model, x.priority, x.account_id,
           coalesce((SELECT min(o.served) FROM lanes AS o
                     WHERE o.model = x.model AND o.priority = x.priority AND o.active),
                    (SELECT min(o.served) FROM lanes AS o WHERE o.priority = x.priority AND o.active), 0),
           true, clock_timestamp()
    FROM (SELECT * FROM wanted EXCEPT SELECT * FROM standing) AS x
    ORDER BY x.model, x.priority, x.account_id
    ON CONFLICT (model, priority, account_id) DO UPDATE
    SET active = true,
        served = CASE WHEN l.active THEN l.served ELSE greatest(l.served, excluded.served) END,
        waiting_at = CASE WHEN l.active THEN l.waiting_at ELSE excluded.waiting_at END
    RETURNING l.model, l.priority
)
SELECT model, priority FROM opened
UNION ALL
SELECT model, priority FROM standing
