-- Settle stored frames: done, image, charge, counts and event, or none of them.
--
-- The fence: a frame counts only while it is claimed by the pack it was rendered in. What is not is left out here
-- and not returned; its file is an orphan. Amounts come from the rows frozen at admission.
-- Locks, in this order everywhere: packs, jobs, frames. hold.sql has locked packs and jobs, in a statement of its own:
-- nobody else touches these frames by now, so that no row is checked again in the middle of this (which is slow
-- to reason about, and a segmentation fault of Postgres 18.4 on a partitioned table). Frames of :cancelled_jobs end
-- as cancelled, unbilled. over: none of a job's frames is queued.
WITH stored AS MATERIALIZED (
    SELECT frame_id, pack_id, key, format, decode(sha256, 'hex') AS sha256, decode(pixel_sha256, 'hex') AS pixel_sha256,
           bytes, width, height, gpu_ms, prompt
    FROM json_to_recordset(CAST(:stored AS json))
         AS s (frame_id uuid, pack_id bigint, key text, format text, sha256 text, pixel_sha256 text, bytes integer,
               width integer, height integer, gpu_ms integer, prompt boolean)
), mine AS MATERIALIZED (
    SELECT f.id, f.job_id, f.index, f.key_no, f.account_id, f.quantity, f.price_id, f.pack_id, s.key,
           f.seeded, f.fingerprint,
           f.job_id = ANY (CAST(:cancelled_jobs AS uuid[])) AS cancelled
    FROM frames AS f
    JOIN stored AS s ON s.frame_id = f.id AND s.pack_id = f.pack_id
    WHERE f.id >= (SELECT frame_id FROM stored ORDER BY frame_id LIMIT 1)
      AND f.id <= (SELECT frame_id FROM stored ORDER BY frame_id DESC LIMIT 1)
      AND f.status = 'claimed' AND f.pack_id = ANY (CAST(:held AS bigint[]))
    ORDER BY f.id
    FOR NO KEY UPDATE OF f
), image AS (
    INSERT INTO images AS i (account_id, key, format, sha256, pixel_sha256, bytes, width, height, pack_id)
    SELECT DISTINCT ON (s.key) m.account_id, s.key, s.format, s.sha256, s.pixel_sha256, s.bytes, s.width, s.height,
           m.pack_id
    FROM mine AS m JOIN stored AS s ON s.frame_id = m.id
    WHERE NOT m.cancelled
    ORDER BY s.key
    ON CONFLICT (key) DO UPDATE SET bytes = i.bytes -- the same bytes: only to have its id
        WHERE i.deleted_at IS NULL -- or else frames_check1 refuses it all: see farm/retention.py
    RETURNING i.id, i.key
), known AS ( -- equal frames find it from now on
    INSERT INTO known_images (account_id, fingerprint, format, image_id, prompt)
    SELECT DISTINCT ON (1, 2, 3) m.account_id, m.fingerprint, s.format, i.id, s.prompt
    FROM mine AS m JOIN stored AS s ON s.frame_id = m.id JOIN image AS i ON i.key = m.key
    WHERE m.seeded AND NOT m.cancelled
    ORDER BY 1, 2, 3
    ON CONFLICT (account_id, fingerprint, format) DO UPDATE
    SET image_id = excluded.image_id, prompt = excluded.prompt
), due AS (
    INSERT INTO waiters_due (account_id, fingerprints)
    SELECT account_id, array_agg(fingerprint) FROM mine WHERE seeded GROUP BY account_id
), made AS MATERIALIZED ( -- as arrays: a join of two short lists was planned as a loop in a loop
    SELECT array_agg(key) AS keys, array_agg(id) AS ids FROM image
), ended AS (
    UPDATE frames AS f
    SET status = CASE WHEN m.cancelled THEN 'cancelled' ELSE 'done' END,
        image_id = CASE WHEN NOT m.cancelled THEN i.ids[array_position(i.keys, m.key)] END,
        pack_id = NULL, suspect = false, ended_at = clock_timestamp()
    FROM mine AS m CROSS JOIN made AS i
    WHERE f.id = m.id
), charge AS MATERIALIZED (
    SELECT m.*, k.model, p.method, p.currency, p.rate,
           m.quantity * p.rate * CASE p.method WHEN 'mpx_step' THEN 0.00000095367431640625 ELSE 1 END AS amount
    FROM mine AS m
    JOIN prices AS p ON p.id = m.price_id
    JOIN job_keys AS k ON k.job_id = m.job_id AND k.key_no = m.key_no
), booked AS (
    INSERT INTO usage (frame_id, account_id, job_id, model, method, currency, price_id, rate, quantity, amount, pack_id)
    SELECT id, account_id, job_id, model, method, currency, price_id, rate, quantity, amount, pack_id
    FROM charge WHERE NOT cancelled
    ORDER BY id
), counted AS (
    INSERT INTO counts (job_id, done, cancelled, charged, freed)
    SELECT job_id, count(*) FILTER (WHERE NOT cancelled), count(*) FILTER (WHERE cancelled),
           coalesce(sum(amount) FILTER (WHERE NOT cancelled), 0), sum(amount)
    FROM charge
    GROUP BY job_id
), told AS (
    INSERT INTO outbox (account_id, job_id, frame_id, kind, data)
    SELECT account_id, job_id, id, CASE WHEN cancelled THEN 'frame.cancelled' ELSE 'frame.done' END,
           jsonb_build_object('index', index)
    FROM charge
    ORDER BY id
), closed AS (
    UPDATE packs AS p
    SET closed_at = clock_timestamp(), outcome = 'settled',
        gpu_ms = (SELECT max(s.gpu_ms) FROM stored AS s WHERE s.pack_id = p.id)
    WHERE p.id = ANY (CAST(:held AS bigint[]))
      AND (SELECT count(*) FROM frames AS f WHERE f.pack_id = p.id)
          = (SELECT count(*) FROM mine AS m WHERE m.pack_id = p.id) -- those are among these
), rest AS MATERIALIZED ( -- looked for once a job, not once a frame
    SELECT j.id, NOT EXISTS (
        SELECT FROM frames AS f
        WHERE f.job_id = j.id AND f.status = 'queued' AND f.id > j.id AND f.id <= last_frame_id(j.id)) AS over
    FROM unnest(CAST(:jobs AS uuid[])) AS j (id)
)
SELECT m.id, m.job_id, m.cancelled, j.over
FROM mine AS m
JOIN rest AS j ON j.id = m.job_id
