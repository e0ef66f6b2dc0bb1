-- Keep the lanes of these jobs from being retired until the end of the transaction. open_lanes.sql comes next: its
-- snapshot is younger than these locks, so that a lane it finds active stays active.
--
-- Advisory and shared: neither submissions of one account nor claims that charge its lanes wait for them. As locks FOR
-- KEY SHARE on the rows they made claims deadlock (three of them, over one lane's row and its tuple lock).
-- empty_lanes.sql only tries for the exclusive one.
SELECT pg_advisory_xact_lock_shared(hashtextextended(x.model || ' ' || x.priority || ' ' || x.account_id, 0))
FROM (
    SELECT DISTINCT model, priority, account_id
    FROM job_lanes
    WHERE job_id = ANY (CAST(:jobs AS uuid[])) AND runnable
    OFFSET 0
) AS x
