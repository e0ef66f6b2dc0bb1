-- End up to :n queued frames of jobs that were cancelled: the verb touched the job alone. SKIP LOCKED: one that
-- is being claimed meanwhile ends when its pack does. Reads jobs_open_idx and
-- frames_queued_idx.
WITH next AS MATERIALIZED (
    SELECT f.id, f.job_id, f.index, f.account_id, f.quantity, f.price_id
    FROM jobs AS j
    CROSS JOIN LATERAL (
        SELECT f.* FROM frames AS f
        WHERE f.job_id = j.id AND f.status = 'queued' AND f.id > j.id AND f.id <= last_frame_id(j.id)
        LIMIT :n
        FOR UPDATE SKIP LOCKED
    ) AS f
    WHERE j.status = 'cancelled' AND j.ended_at IS NULL
    LIMIT :n
), ended AS (
    UPDATE frames AS f SET status = 'cancelled', ended_at = clock_timestamp(), suspect = false
    WHERE f.id = ANY (ARRAY (SELECT id FROM next))
      AND f.id >= (SELECT id FROM next ORDER BY id LIMIT 1)
      AND f.id <= (SELECT id FROM next ORDER BY id DESC LIMIT 1)
), counted AS (
    INSERT INTO counts (job_id, cancelled, freed)
    SELECT s.job_id, count(*),
           sum(s.quantity * p.rate * CASE p.method WHEN 'mpx_step' THEN 0.00000095367431640625 ELSE 1 END)
    FROM next AS s JOIN prices AS p ON p.id = s.price_id
    GROUP BY s.job_id
)
SELECT count(*) FROM next
