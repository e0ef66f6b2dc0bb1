-- A page of a job's frames after one, in order, each with its name, image, model and what it was charged. The caller has
-- found the job. Each lookup is a probe of a key, whatever number of rows a plan was made for. Reads frames_pkey, and the
-- keys of job_keys, frame_names, images and usage.
SELECT f.id, f.index, f.seed, f.reason, f.ended_at, k.model, n.custom_id,
       CASE WHEN f.ended_at IS NULL AND j.status = 'cancelled' THEN 'cancelled' ELSE f.status END AS status,
       i.key, i.format, i.sha256, i.bytes, i.width, i.height, u.amount
FROM jobs AS j
CROSS JOIN LATERAL (
    SELECT f.* FROM frames AS f
    WHERE f.job_id = j.id AND f.id > :after AND f.id <= last_frame_id(:job)
    ORDER BY f.id
    LIMIT :n
) AS f
CROSS JOIN LATERAL (SELECT k.model FROM job_keys AS k WHERE k.job_id = f.job_id AND k.key_no = f.key_no LIMIT 1) AS k
LEFT JOIN LATERAL (
    SELECT n.custom_id FROM frame_names AS n WHERE n.job_id = :job AND n.index = f.index LIMIT 1
) AS n ON true
LEFT JOIN LATERAL (
    SELECT i.* FROM images AS i
    WHERE i.id = f.image_id AND i.deleted_at IS NULL AND j.images_deleted_at IS NULL LIMIT 1
) AS i ON true
LEFT JOIN LATERAL (SELECT sum(u.amount) AS amount FROM usage AS u WHERE u.frame_id = f.id) AS u ON f.status = 'done'
WHERE j.id = :job
ORDER BY f.id
