-- Frames that wait to be handed out, by model and priority, and since when the oldest of their jobs waits.
--
-- Counted by jobs, not by frames: a job's queued frames are all its frames less those ended and those on a device.
-- Only jobs with several open lanes are counted frame by frame, to 100,000 a key. Paused jobs don't wait.
-- 200,000 open jobs of one frame took 1.3 s, on 2 cores with a load of 8; with job_lanes grouped by job instead of
-- joined to itself 3.2 s. Reads frames_pack_idx, frames_queued_idx, and the keys of job_lanes and jobs in order.
WITH running AS MATERIALIZED (
    SELECT job_id, count(*) AS frames FROM frames WHERE pack_id IS NOT NULL GROUP BY job_id
), mixed AS MATERIALIZED (
    SELECT DISTINCT a.job_id
    FROM job_lanes AS a
    JOIN job_lanes AS b ON b.job_id = a.job_id AND b.model > a.model AND b.runnable AND b.open
    WHERE a.runnable AND a.open
), waiting AS (
    SELECT jl.model, jl.priority, j.created_at,
           CASE WHEN j.proof IS NOT NULL AND j.approved_at IS NULL THEN j.proof ELSE j.frames END
               - coalesce(e.frames, 0) - coalesce(r.frames, 0) AS frames
    FROM job_lanes AS jl
    JOIN jobs AS j ON j.id = jl.job_id
    LEFT JOIN (SELECT job_id, sum(done + failed + cancelled) AS frames FROM counts GROUP BY job_id) AS e
         ON e.job_id = jl.job_id
    LEFT JOIN running AS r ON r.job_id = jl.job_id
    WHERE jl.runnable AND jl.open AND NOT EXISTS (SELECT FROM mixed WHERE mixed.job_id = jl.job_id)
    UNION ALL
    SELECT jl.model, jl.priority, j.created_at, q.frames
    FROM mixed
    JOIN job_lanes AS jl ON jl.job_id = mixed.job_id AND jl.runnable AND jl.open
    JOIN jobs AS j ON j.id = jl.job_id
    CROSS JOIN LATERAL (
        SELECT sum(n.frames) AS frames
        FROM job_keys AS k
        CROSS JOIN LATERAL (
            SELECT count(*) AS frames
            FROM (SELECT FROM frames AS f
                  WHERE f.job_id = k.job_id AND f.key_no = k.key_no AND f.status = 'queued'
                    AND f.id > k.job_id AND f.id <= last_frame_id(k.job_id)
                  LIMIT 100000) AS one
        ) AS n
        WHERE k.job_id = jl.job_id AND k.model = jl.model AND k.open
    ) AS q
)
SELECT model, priority, sum(frames) AS frames,
       extract(epoch FROM clock_timestamp() - min(created_at)) AS oldest_s
FROM waiting
WHERE frames > 0
GROUP BY model, priority
ORDER BY model, priority
