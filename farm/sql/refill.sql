-- Queue staged frames of :jobs, which capped.sql has locked: as many as max_parallel has room for, :n of a job at most,
-- in their order; of one whose proof is not approved only the proof's. A frame that is claimed or settled meanwhile is
-- counted all the same: never too many are queued. Returns the keys to open.
-- Reads frames_staged_idx, whose order is the frames'; frames_queued_idx, and once frames_pack_idx.
WITH running AS MATERIALIZED (
    SELECT job_id, count(*) AS frames FROM frames WHERE pack_id IS NOT NULL GROUP BY job_id
), room AS MATERIALIZED (
    SELECT j.id,
           CASE WHEN j.max_parallel = 16777215 THEN CAST(:n AS bigint) ELSE least(CAST(:n AS bigint), j.max_parallel
               - coalesce((SELECT r.frames FROM running AS r WHERE r.job_id = j.id), 0)
               - (SELECT count(*) FROM (SELECT FROM frames AS f
                                        WHERE f.job_id = j.id AND f.status = 'queued'
                                          AND f.id > j.id AND f.id <= last_frame_id(j.id)
                                        LIMIT j.max_parallel) AS q)) END AS frames,
           CASE WHEN j.proof IS NOT NULL AND j.approved_at IS NULL
                THEN CAST(left(j.id::text, 30) || lpad(to_hex(j.proof), 6, '0') AS uuid)
                ELSE last_frame_id(j.id) END AS upto
    FROM jobs AS j
    WHERE j.id = ANY (CAST(:jobs AS uuid[])) AND j.runnable AND j.max_parallel IS NOT NULL
), next AS MATERIALIZED (
    SELECT f.id, f.job_id, f.key_no
    FROM room AS r
    CROSS JOIN LATERAL (
        SELECT f.id, f.job_id, f.key_no FROM frames AS f
        WHERE f.job_id = r.id AND f.status = 'staged' AND f.id > r.id AND f.id <= r.upto
        LIMIT greatest(0, r.frames)
        FOR UPDATE SKIP LOCKED
    ) AS f
), queued AS (
    UPDATE frames AS f SET status = 'queued'
    WHERE f.id = ANY (ARRAY (SELECT id FROM next))
      AND f.id >= (SELECT id FROM next ORDER BY id LIMIT 1)
      AND f.id <= (SELECT id FROM next ORDER BY id DESC LIMIT 1)
)
SELECT DISTINCT job_id, key_no FROM next
