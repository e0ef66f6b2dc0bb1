-- Lock the runnable jobs with max_parallel that have fewer frames queued and claimed than that, and staged ones: of :jobs
-- if they are named. refill.sql comes next: its snapshot is younger than the lock, so that two never fill one job.
-- NO KEY UPDATE conflicts with itself and with the verbs, and with nothing that claims and settles.
-- Reads jobs_capped_idx, frames_staged_idx, frames_queued_idx, and once frames_pack_idx.
WITH running AS MATERIALIZED (
    SELECT job_id, count(*) AS frames FROM frames WHERE pack_id IS NOT NULL GROUP BY job_id
)
SELECT j.id
FROM jobs AS j
WHERE j.max_parallel IS NOT NULL AND j.ended_at IS NULL AND j.runnable
  AND (CAST(:jobs AS uuid[]) IS NULL OR j.id = ANY (CAST(:jobs AS uuid[])))
  AND EXISTS (
      SELECT FROM frames AS f
      WHERE f.job_id = j.id AND f.status = 'staged' AND f.id > j.id AND f.id <= CASE
          WHEN j.proof IS NOT NULL AND j.approved_at IS NULL
          THEN CAST(left(j.id::text, 30) || lpad(to_hex(j.proof), 6, '0') AS uuid) ELSE last_frame_id(j.id) END)
  AND (j.max_parallel = 16777215 OR j.max_parallel >
       coalesce((SELECT r.frames FROM running AS r WHERE r.job_id = j.id), 0)
       + (SELECT count(*) FROM (SELECT FROM frames AS f
                                WHERE f.job_id = j.id AND f.status = 'queued'
                                  AND f.id > j.id AND f.id <= last_frame_id(j.id)
                                LIMIT j.max_parallel) AS q))
ORDER BY j.id
LIMIT 500
FOR NO KEY UPDATE OF j SKIP LOCKED
