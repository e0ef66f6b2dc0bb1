-- Stage queued frames of a job that has more queued and claimed than its max_parallel allows: the last ones first, :n at
-- most. The caller has locked the job in an earlier statement. What is on a device is finished.
-- Reads the frames' key backwards, frames_queued_idx, and once frames_pack_idx.
WITH surplus AS MATERIALIZED (
    SELECT j.id, least(CAST(:n AS bigint),
               (SELECT count(*) FROM frames AS f WHERE f.pack_id IS NOT NULL AND f.job_id = j.id)
               + (SELECT count(*) FROM (SELECT FROM frames AS f
                                        WHERE f.job_id = j.id AND f.status = 'queued'
                                          AND f.id > j.id AND f.id <= last_frame_id(j.id)
                                        LIMIT j.max_parallel + CAST(:n AS bigint)) AS q)
               - j.max_parallel) AS frames
    FROM jobs AS j
    WHERE j.id = :job AND j.max_parallel < 16777215
), last AS MATERIALIZED (
    SELECT f.id
    FROM surplus AS s
    CROSS JOIN LATERAL (
        SELECT f.id FROM frames AS f
        WHERE f.job_id = s.id AND f.status = 'queued' AND f.id > s.id AND f.id <= last_frame_id(s.id)
        ORDER BY f.id DESC
        LIMIT greatest(0, s.frames)
        FOR UPDATE SKIP LOCKED
    ) AS f
), staged AS (
    UPDATE frames AS f SET status = 'staged'
    WHERE f.id = ANY (ARRAY (SELECT id FROM last))
      AND f.id >= (SELECT id FROM last ORDER BY id LIMIT 1)
      AND f.id <= (SELECT id FROM last ORDER BY id DESC LIMIT 1)
)
SELECT count(*) FROM last
