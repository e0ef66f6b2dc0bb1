-- How many frames of each of these jobs were done in the last minute, the newest 256 at most, and in how many seconds. They
-- are settled some at a time: of a job that has only begun, in a second at least. Reads events_job_idx.
SELECT j.id AS job_id, clock_timestamp() AS at, count(e.at) AS frames,
       CASE WHEN count(e.at) < 256 THEN greatest(1, extract(epoch FROM clock_timestamp() - min(e.at)))
            ELSE greatest(0.1, extract(epoch FROM clock_timestamp() - min(e.at))) END AS seconds
FROM unnest(CAST(:jobs AS uuid[])) AS j (id)
CROSS JOIN LATERAL (
    SELECT at FROM events
    WHERE job_id = j.id AND kind = 'frame.done' AND at > clock_timestamp() - interval '1 minute'
    ORDER BY number DESC
    LIMIT 256
) AS e
GROUP BY j.id
