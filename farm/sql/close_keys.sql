-- Lock those of the given keys that have no queued frame left. close.sql closes them in the next statement, whose
-- snapshot is younger than the lock: a frame given back meanwhile waits for us and opens its key again.
SELECT k.job_id, k.key_no
FROM job_keys AS k
JOIN unnest(CAST(:jobs AS uuid[]), CAST(:keys AS integer[])) AS x (job_id, key_no) USING (job_id, key_no)
WHERE k.open AND NOT EXISTS (
    SELECT FROM frames AS f
    WHERE f.job_id = k.job_id AND f.key_no = k.key_no AND f.status = 'queued'
      AND f.id > k.job_id AND f.id <= last_frame_id(k.job_id)
)
ORDER BY k.job_id, k.key_no
FOR NO KEY UPDATE OF k SKIP LOCKED
