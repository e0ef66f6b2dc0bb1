-- Frames that wait to be handed out, by model and priority, and since when the oldest of their jobs waits.
--
-- Counted by jobs, not by frames: a job's queued frames are all its frames less those ended and those on a device.
-- A job with several open lanes is counted frame by frame, to 100,000 a key. Frames of paused jobs don't wait.
-- Reads job_lanes_head_idx, counts_job_idx, frames_pack_idx; for mixed jobs frames_queued_idx.
WITH place AS MATERIALIZED (
    SELECT job_id, model, priority FROM job_lanes WHERE runnable AND open
), mixed AS MATERIALIZED (
    SELECT job_id FROM place GROUP BY job_id HAVING count(*) > 1
), running AS MATERIALIZED (
    SELECT job_id, count(*) AS frames FROM frames WHERE pack_id IS NOT NULL GROUP BY job_id
), ended AS MATERIALIZED (
    SELECT job_id, sum(done + failed + cancelled) AS frames
    FROM counts
    WHERE job_id IN (SELECT job_id FROM place)
    GROUP BY job_id
), waiting AS (
    SELECT p.model, p.priority, j.created_at,
           j.frames - coalesce(e.frames, 0) - coalesce(r.frames, 0) AS frames
    FROM place AS p
    JOIN jobs AS j ON j.id = p.job_id
    LEFT JOIN ended AS e ON e.job_id = p.job_id
    LEFT JOIN running AS r ON r.job_id = p.job_id
    WHERE p.job_id NOT IN (SELECT job_id FROM mixed)
    UNION ALL
    SELECT p.model, p.priority, j.created_at, q.frames
    FROM place AS p
    JOIN mixed USING (job_id)
    JOIN jobs AS j ON j.id = p.job_id
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
        WHERE k.job_id = p.job_id AND k.model = p.model AND k.open
    ) AS q
)
SELECT model, priority, sum(frames) AS frames,
       extract(epoch FROM clock_timestamp() - min(created_at)) AS oldest_s
FROM waiting
WHERE frames > 0
GROUP BY model, priority
ORDER BY model, priority
