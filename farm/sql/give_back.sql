-- Take frames from their packs: queued again, or ended.
--
-- A frame of a cancelled job is cancelled. With :blame, a pack of one frame that shared the device with no other pack
-- counts against it, and the :max_attempts-th time it fails with the reason; frames of another become suspects and
-- are claimed alone.
-- With :lost, not if Postgres was away meanwhile: then the worker could not extend the lease.
-- Locks as settle.sql: packs and jobs by the caller, then frames.
WITH held AS MATERIALIZED (
    SELECT f.id, f.job_id, f.index, f.key_no, f.account_id, f.attempts, f.quantity, f.price_id, f.pack_id,
           f.seeded, f.fingerprint,
           f.job_id = ANY (CAST(:cancelled_jobs AS uuid[])) AS cancelled,
           :blame AND p.frames = 1 AND NOT p.shared
               AND NOT (:lost AND p.claimed_at < pg_postmaster_start_time()) AS blamed
    FROM frames AS f
    JOIN packs AS p ON p.id = f.pack_id
    WHERE f.pack_id = ANY (CAST(:packs AS bigint[])) AND f.status = 'claimed'
      AND (CAST(:frames AS uuid[]) IS NULL OR f.id = ANY (CAST(:frames AS uuid[])))
    ORDER BY f.id
    FOR NO KEY UPDATE OF f
), judged AS MATERIALIZED (
    SELECT h.*, h.attempts + CASE WHEN blamed THEN 1 ELSE 0 END AS attempts_now,
           CASE WHEN cancelled THEN 'cancelled'
                WHEN blamed AND h.attempts + 1 >= :max_attempts THEN 'failed'
                ELSE 'queued' END AS status
    FROM held AS h
), written AS (
    UPDATE frames AS f
    SET status = j.status, pack_id = NULL, attempts = j.attempts_now,
        suspect = j.status = 'queued' AND (:blame OR f.suspect),
        reason = CASE WHEN j.status = 'failed' THEN :reason END,
        ended_at = CASE WHEN j.status <> 'queued' THEN clock_timestamp() END
    FROM judged AS j
    WHERE f.id = j.id AND f.id >= (SELECT id FROM judged ORDER BY id LIMIT 1)
      AND f.id <= (SELECT id FROM judged ORDER BY id DESC LIMIT 1)
), due AS ( -- an equal frame may wait no longer for one that ended, or that is queued in a less urgent class
    INSERT INTO waiters_due (account_id, fingerprints)
    SELECT account_id, array_agg(fingerprint) FROM held WHERE seeded GROUP BY account_id
), counted AS (
    INSERT INTO counts (job_id, failed, cancelled, freed)
    SELECT j.job_id, count(*) FILTER (WHERE j.status = 'failed'), count(*) FILTER (WHERE j.status = 'cancelled'),
           sum(j.quantity * p.rate * CASE p.method WHEN 'mpx_step' THEN 0.00000095367431640625 ELSE 1 END)
    FROM judged AS j JOIN prices AS p ON p.id = j.price_id
    WHERE j.status <> 'queued'
    GROUP BY j.job_id
), told AS (
    INSERT INTO outbox (account_id, job_id, frame_id, kind, data)
    SELECT account_id, job_id, id, 'frame.' || status,
           jsonb_build_object('index', index)
           || CASE status WHEN 'failed' THEN jsonb_build_object('reason', CAST(:reason AS text)) ELSE '{}' END
    FROM judged
    WHERE status <> 'queued'
    ORDER BY id
)
SELECT id, job_id, key_no, status FROM judged
