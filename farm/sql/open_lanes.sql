-- Make the lanes of these jobs active. One that refills starts at the lowest active share, so that it cannot
-- spend what it saved while it asked for nothing; a model's first lane at that of all models, which one worker may
-- compare it with. In the order of their keys; the last statement of its
-- transaction, as it holds off everybody who charges these lanes.
INSERT INTO lanes AS l (model, priority, account_id, served, active, waiting_at)
SELECT x.model, x.priority, x.account_id,
       coalesce((SELECT min(o.served) FROM lanes AS o
                 WHERE o.model = x.model AND o.priority = x.priority AND o.active),
                (SELECT min(o.served) FROM lanes AS o WHERE o.priority = x.priority AND o.active), 0),
       true, clock_timestamp()
FROM (
    SELECT DISTINCT model, priority, account_id
    FROM job_lanes
    WHERE job_id = ANY (CAST(:jobs AS uuid[])) AND runnable
) AS x
ORDER BY x.model, x.priority, x.account_id
ON CONFLICT (model, priority, account_id) DO UPDATE
SET active = true,
    served = CASE WHEN l.active THEN l.served ELSE greatest(l.served, excluded.served) END,
    waiting_at = CASE WHEN l.active THEN l.waiting_at ELSE excluded.waiting_at END
RETURNING l.model, l.priority
