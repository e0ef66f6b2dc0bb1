-- The work before a new job of priority :priority, by those of :models that have some: what is queued as urgent or more so,
-- and half of what is on devices, of any priority, since how far it is stands nowhere.
--
-- Counted by jobs, as in queue_depth.sql, and cheap for a job of a million frames: the frames left of a job that has one
-- model, at the mean work of 32 of its frames. These are spread by the golden ratio, which falls into step with no
-- pattern of specs, and those still queued speak for the job. The 1,000 jobs with most frames left are looked at; others
-- count as they do on average. A job with several models is counted by its keys: frames of a key are of equal work.
-- Frames that wait for an equal one are no work. A job of 1,000,000 frames and 1,500 of one took 30 ms, on 2 busy cores.
-- Reads the keys of frames, job_lanes and jobs, frames_pack_idx and frames_queued_idx.
WITH running AS MATERIALIZED (
    SELECT f.job_id, p.model, count(*) AS frames, sum(f.work) AS work
    FROM frames AS f JOIN packs AS p ON p.id = f.pack_id
    WHERE f.pack_id IS NOT NULL
    GROUP BY f.job_id, p.model
), mixed AS MATERIALIZED (
    SELECT DISTINCT a.job_id
    FROM job_lanes AS a
    JOIN job_lanes AS b ON b.job_id = a.job_id AND b.model > a.model AND b.runnable AND b.open
    WHERE a.runnable AND a.open AND a.priority >= :priority
), plain AS MATERIALIZED (
    SELECT w.job_id, w.model, w.upto, w.upto - w.gone AS frames
    FROM (
        SELECT jl.job_id, jl.model,
               CASE WHEN j.proof IS NOT NULL AND j.approved_at IS NULL THEN j.proof ELSE j.frames END AS upto,
               coalesce(e.frames, 0) + coalesce(r.frames, 0) AS gone
        FROM job_lanes AS jl
        JOIN jobs AS j ON j.id = jl.job_id
        LEFT JOIN (SELECT job_id, sum(done + failed + cancelled + waiting) AS frames FROM counts GROUP BY job_id) AS e
             ON e.job_id = jl.job_id
        LEFT JOIN (SELECT job_id, sum(frames) AS frames FROM running GROUP BY job_id) AS r ON r.job_id = jl.job_id
        WHERE jl.runnable AND jl.open AND jl.priority >= :priority AND jl.model = ANY (CAST(:models AS text[]))
          AND NOT EXISTS (SELECT FROM mixed WHERE mixed.job_id = jl.job_id)
    ) AS w
    WHERE w.upto > w.gone
), sampled AS MATERIALIZED (
    SELECT l.job_id, l.model, l.frames, s.work
    FROM (SELECT * FROM plain ORDER BY frames DESC, job_id LIMIT 1000) AS l
    CROSS JOIN LATERAL (
        SELECT coalesce(avg(f.work) FILTER (WHERE f.status = 'queued'), avg(f.work)) AS work
        FROM generate_series(1, least(l.upto, 32)) AS i
        CROSS JOIN LATERAL (
            SELECT CASE WHEN l.upto <= 32 THEN i ELSE 1 + floor(l.upto * (0.6180339887 * i % 1))::integer END AS place
        ) AS x
        JOIN frames AS f ON f.id = CAST(left(l.job_id::text, 30) || lpad(to_hex(x.place), 6, '0') AS uuid)
    ) AS s
    WHERE s.work IS NOT NULL
), typical AS (
    SELECT model, sum(frames * work) / sum(frames) AS work FROM sampled GROUP BY model
), ahead AS (
    SELECT model, work / 2 AS work FROM running WHERE model = ANY (CAST(:models AS text[]))
    UNION ALL
    SELECT p.model, p.frames * coalesce(s.work, t.work)
    FROM plain AS p
    JOIN typical AS t ON t.model = p.model
    LEFT JOIN sampled AS s ON s.job_id = p.job_id AND s.model = p.model
    UNION ALL
    SELECT k.model, n.frames * one.work
    FROM mixed
    JOIN job_lanes AS jl ON jl.job_id = mixed.job_id AND jl.runnable AND jl.open
    JOIN job_keys AS k ON k.job_id = jl.job_id AND k.model = jl.model AND k.open
    CROSS JOIN LATERAL (
        SELECT f.work
        FROM frames AS f
        WHERE f.job_id = k.job_id AND f.key_no = k.key_no AND f.status = 'queued'
          AND f.id > k.job_id AND f.id <= last_frame_id(k.job_id)
        ORDER BY f.id LIMIT 1
    ) AS one
    CROSS JOIN LATERAL (
        SELECT count(*) AS frames
        FROM (SELECT FROM frames AS f
              WHERE f.job_id = k.job_id AND f.key_no = k.key_no AND f.status = 'queued'
                AND f.id > k.job_id AND f.id <= last_frame_id(k.job_id)
              LIMIT 100000) AS counted
    ) AS n
    WHERE jl.model = ANY (CAST(:models AS text[]))
)
SELECT model, sum(work) AS work FROM ahead GROUP BY model
