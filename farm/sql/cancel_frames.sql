-- End up to :n queued, staged or waiting frames of jobs that were cancelled, or that were to be done by a deadline: the
-- verb touched the job alone. SKIP LOCKED: one that is being claimed meanwhile ends when its pack does. Reads
-- jobs_open_idx, frames_queued_idx, frames_staged_idx and frames_waiting_idx.
WITH queued AS MATERIALIZED (
    SELECT f.id, f.job_id, f.index, f.account_id, f.quantity, f.price_id, f.seeded, f.fingerprint, 0 AS waited
    FROM jobs AS j
    CROSS JOIN LATERAL (
        SELECT f.* FROM frames AS f
        WHERE f.job_id = j.id AND f.status = 'queued' AND f.id > j.id AND f.id <= last_frame_id(j.id)
        LIMIT :n
        FOR UPDATE SKIP LOCKED
    ) AS f
    WHERE j.status IN ('cancelled', 'late') AND j.ended_at IS NULL
    LIMIT :n
), staged AS MATERIALIZED (
    SELECT f.id, f.job_id, f.index, f.account_id, f.quantity, f.price_id, f.seeded, f.fingerprint, 0 AS waited
    FROM jobs AS j
    CROSS JOIN LATERAL (
        SELECT f.* FROM frames AS f
        WHERE f.job_id = j.id AND f.status = 'staged' AND f.id > j.id AND f.id <= last_frame_id(j.id)
        LIMIT :n
        FOR UPDATE SKIP LOCKED
    ) AS f
    WHERE j.status IN ('cancelled', 'late') AND j.ended_at IS NULL
    LIMIT :n
), waiting AS MATERIALIZED (
    SELECT f.id, f.job_id, f.index, f.account_id, f.quantity, f.price_id, false AS seeded, f.fingerprint, 1 AS waited
    FROM jobs AS j
    CROSS JOIN LATERAL (
        SELECT f.* FROM frames AS f
        WHERE f.account_id = j.account_id AND f.status = 'waiting' AND f.id > j.id AND f.id <= last_frame_id(j.id)
        LIMIT :n
        FOR UPDATE SKIP LOCKED
    ) AS f
    WHERE j.status IN ('cancelled', 'late') AND j.ended_at IS NULL
    LIMIT :n
), next AS MATERIALIZED (
    SELECT * FROM queued UNION ALL SELECT * FROM staged UNION ALL SELECT * FROM waiting
), jobs_ending AS MATERIALIZED (
    SELECT j.id, j.status = 'late' AS late,
           'not done by its deadline, ' || to_char(j.deadline AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') AS reason
    FROM jobs AS j WHERE j.id = ANY (ARRAY (SELECT job_id FROM next))
), ended AS (
    UPDATE frames AS f
    SET status = CASE WHEN f.job_id = ANY (ARRAY (SELECT id FROM jobs_ending WHERE late)) THEN 'failed'
                      ELSE 'cancelled' END,
        reason = (SELECT e.reason FROM jobs_ending AS e WHERE e.id = f.job_id AND e.late),
        ended_at = clock_timestamp(), suspect = false
    WHERE f.id = ANY (ARRAY (SELECT id FROM next))
      AND f.id >= (SELECT id FROM next ORDER BY id LIMIT 1)
      AND f.id <= (SELECT id FROM next ORDER BY id DESC LIMIT 1)
), due AS (
    INSERT INTO waiters_due (account_id, fingerprints)
    SELECT account_id, array_agg(fingerprint) FROM next WHERE seeded GROUP BY account_id
), counted AS (
    INSERT INTO counts (job_id, failed, cancelled, waiting, freed)
    SELECT s.job_id, count(*) FILTER (WHERE e.late), count(*) FILTER (WHERE NOT e.late), -sum(s.waited),
           sum(s.quantity * p.rate * CASE p.method WHEN 'mpx_step' THEN 0.00000095367431640625 ELSE 1 END)
    FROM next AS s JOIN prices AS p ON p.id = s.price_id JOIN jobs_ending AS e ON e.id = s.job_id
    GROUP BY s.job_id
), told AS (
    INSERT INTO outbox (account_id, job_id, frame_id, kind, data)
    SELECT s.account_id, s.job_id, s.id, 'frame.failed', jsonb_build_object('index', s.index, 'reason', e.reason)
    FROM next AS s JOIN jobs_ending AS e ON e.id = s.job_id AND e.late
    ORDER BY s.id
)
SELECT count(*) FROM next
