-- Frames on a device of jobs whose deadline has passed, with their packs. Reads jobs_late_idx and frames_pack_idx.
SELECT f.id, f.pack_id
FROM jobs AS j JOIN frames AS f ON f.job_id = j.id
WHERE j.status = 'late' AND j.ended_at IS NULL AND f.pack_id IS NOT NULL
ORDER BY f.pack_id
LIMIT :n
