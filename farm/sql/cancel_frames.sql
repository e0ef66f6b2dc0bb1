-- End up to :n queued or waiting frames of jobs that were cancelled: the verb touched the job alone. SKIP LOCKED: one
-- that is being claimed meanwhile ends when its pack does. Reads jobs_open_idx, frames_queued_idx and
-- frames_waiting_idx.
WITH queued AS MATERIALIZED (
    SELECT f.id, f.job_id, f.account_id, f.quantity, f.price_id, f.seeded, f.fingerprint, 0 AS waited
    FROM jobs AS j
    CROSS JOIN LATERAL (
        SELECT f.* FROM frames AS f
        WHERE f.job_id = j.id AND f.status = 'queued' AND f.id > j.id AND f.id <= last_frame_id(j.id)
        LIMIT :n
        FOR UPDATE SKIP LOCKED
    ) AS f
    WHERE j.status = 'cancelled' AND j.ended_at IS NULL
    LIMIT :n
), waiting AS MATERIALIZED (
    SELECT f.id, f.job_id, f.account_id, f.quantity, f.price_id, false AS seeded, f.fingerprint, 1 AS waited
    FROM jobs AS j
    CROSS JOIN LATERAL (
        SELECT f.* FROM frames AS f
        WHERE f.account_id = j.account_id AND f.status = 'waiting' AND f.id > j.id AND f.id <= last_frame_id(j.id)
        LIMIT :n
        FOR UPDATE SKIP LOCKED
    ) AS f
    WHERE j.status = 'cancelled' AND j.ended_at IS NULL
    LIMIT :n
), next AS MATERIALIZED (
    SELECT * FROM queued UNION ALL SELECT * FROM waiting
), ended AS (
    UPDATE frames AS f SET status = 'cancelled', ended_at = clock_timestamp(), suspect = false
    WHERE f.id = ANY (ARRAY (SELECT id FROM next))
      AND f.id >= (SELECT id FROM next ORDER BY id LIMIT 1)
      AND f.id <= (SELECT id FROM next ORDER BY id DESC LIMIT 1)
), due AS (
    INSERT INTO waiters_due (account_id, fingerprints)
    SELECT account_id, array_agg(fingerprint) FROM next WHERE seeded GROUP BY account_id
), counted AS (
    INSERT INTO counts (job_id, cancelled, waiting, freed)
    SELECT s.job_id, count(*), -sum(s.waited),
           sum(s.quantity * p.rate * CASE p.method WHEN 'mpx_step' THEN 0.00000095367431640625 ELSE 1 END)
    FROM next AS s JOIN prices AS p ON p.id = s.price_id
    GROUP BY s.job_id
)
SELECT count(*) FROM next
