-- Decide on waiting frames: done with the image that is known by now, or queued if nobody makes it for them, or still
-- waiting.
--
-- A frame waits for an equal one that is on a device, or queued in a class as urgent where it may be handed out; one that
-- may not be handed out itself waits for any; and for one of its own job beyond the job's max_parallel, which it would
-- stand beside as staged itself; for none behind a proof. Of several that have nobody to wait for the most urgent is queued.
-- A reused image is charged at the price frozen at admission for that; what rendering would have cost is freed, or with
-- :at_once, where it is being admitted and no more was held for it, that price.
-- Locks, as settle.sql: the caller has locked jobs and then these frames. The image's row is locked against being
-- deleted (farm/retention.py). Reads known_images_pkey, frames_equal_idx and frames_staged_equal_idx.
WITH waiting AS MATERIALIZED (
    SELECT f.id, f.job_id, f.index, f.key_no, f.account_id, f.fingerprint, f.spec ->> 'format' AS format,
           f.quantity * r.rate * CASE r.method WHEN 'mpx_step' THEN 0.00000095367431640625 ELSE 1 END AS freed,
           j.runnable, j.priority, j.max_parallel, k.model, k.reuse_price_id, n.image_id
    FROM frames AS f
    JOIN jobs AS j ON j.id = f.job_id
    JOIN job_keys AS k ON k.job_id = f.job_id AND k.key_no = f.key_no
    JOIN prices AS r ON r.id = f.price_id
    JOIN accounts AS a ON a.id = f.account_id
    LEFT JOIN known_images AS n ON n.account_id = f.account_id AND n.fingerprint = f.fingerprint
         AND n.format = f.spec ->> 'format' AND n.prompt = a.prompt_in_images
    WHERE f.id = ANY (CAST(:frames AS uuid[])) AND f.status = 'waiting' AND f.job_id <> ALL (CAST(:cancelled_jobs AS uuid[]))
), image AS MATERIALIZED (
    SELECT i.id FROM images AS i
    WHERE i.id = ANY (ARRAY (SELECT image_id FROM waiting)) AND i.deleted_at IS NULL
    ORDER BY i.id
    FOR KEY SHARE
), reused AS MATERIALIZED (
    SELECT w.*, p.method, p.currency, p.rate
    FROM waiting AS w
    JOIN image AS i ON i.id = w.image_id
    JOIN prices AS p ON p.id = w.reuse_price_id
), alone AS MATERIALIZED (
    SELECT w.id, w.job_id, w.key_no, w.max_parallel,
           row_number() OVER (PARTITION BY w.account_id, w.fingerprint, w.format
                              ORDER BY w.runnable DESC, w.priority DESC, w.id) AS place
    FROM waiting AS w
    WHERE w.id <> ALL (ARRAY (SELECT id FROM reused)) AND NOT EXISTS (
        SELECT FROM frames AS f
        JOIN jobs AS j ON j.id = f.job_id
        WHERE f.account_id = w.account_id AND f.fingerprint = w.fingerprint AND f.seeded
          AND f.status IN ('queued', 'claimed') AND f.spec ->> 'format' = w.format
          AND j.status <> 'cancelled'
          AND (f.status = 'claimed' OR j.priority >= w.priority AND (j.runnable OR NOT w.runnable)
               AND (j.proof IS NULL OR j.approved_at IS NOT NULL OR f.index < j.proof))
    ) AND (w.max_parallel IS NULL OR NOT EXISTS (
        SELECT FROM frames AS f
        WHERE f.account_id = w.account_id AND f.fingerprint = w.fingerprint AND f.seeded AND f.status = 'staged'
          AND f.job_id = w.job_id AND f.spec ->> 'format' = w.format
    ))
), decided AS MATERIALIZED (
    SELECT id, job_id, key_no, 'done' AS status, image_id FROM reused
    UNION ALL
    SELECT id, job_id, key_no, CASE WHEN max_parallel IS NULL THEN 'queued' ELSE 'staged' END, NULL
    FROM alone WHERE place = 1
), written AS (
    UPDATE frames AS f
    SET status = d.status, image_id = d.image_id, reused = d.status = 'done',
        ended_at = CASE d.status WHEN 'done' THEN clock_timestamp() END
    FROM decided AS d
    WHERE f.id = ANY (CAST(:frames AS uuid[])) AND d.id = f.id
), booked AS (
    INSERT INTO usage (frame_id, account_id, job_id, model, method, currency, price_id, rate, quantity, amount)
    SELECT id, account_id, job_id, model, method, currency, reuse_price_id, rate, 1, rate
    FROM reused
    ORDER BY id
), counted AS (
    INSERT INTO counts (job_id, done, reused, waiting, charged, freed)
    SELECT d.job_id, count(r.id), count(r.id), -count(*), coalesce(sum(r.rate), 0),
           coalesce(sum(CASE WHEN :at_once THEN r.rate ELSE r.freed END), 0)
    FROM decided AS d LEFT JOIN reused AS r ON r.id = d.id
    GROUP BY d.job_id
), told AS (
    INSERT INTO outbox (account_id, job_id, frame_id, kind, data)
    SELECT account_id, job_id, id, 'frame.done', jsonb_build_object('index', index, 'reused', true)
    FROM reused
    ORDER BY id
)
SELECT id, job_id, key_no, status FROM decided
