-- Everything that must hold of frames, charges, counts, holds and packs; each row returned is a violation.
SELECT 'done without a charge' AS violation, f.id::text AS subject, '' AS detail
FROM frames AS f LEFT JOIN usage AS u ON u.frame_id = f.id AND u.entry = 0
WHERE f.status = 'done' AND u.frame_id IS NULL
UNION ALL
SELECT 'charge without a done frame', u.frame_id::text, coalesce(f.status, 'no frame')
FROM usage AS u LEFT JOIN frames AS f ON f.id = u.frame_id
WHERE u.entry = 0 AND (f.id IS NULL OR f.status <> 'done')
UNION ALL
SELECT 'charge differs from the frozen price', u.frame_id::text, u.amount::text
FROM usage AS u JOIN frames AS f ON f.id = u.frame_id JOIN prices AS p ON p.id = f.price_id
WHERE u.entry = 0 AND (u.price_id <> f.price_id OR u.quantity <> f.quantity OR u.rate <> p.rate
    OR u.amount <> f.quantity * p.rate * CASE p.method WHEN 'mpx_step' THEN 0.00000095367431640625 ELSE 1 END)
UNION ALL
SELECT 'charged twice', frame_id::text, count(*)::text
FROM usage WHERE entry = 0 GROUP BY frame_id HAVING count(*) > 1
UNION ALL
SELECT 'image of another account', f.id::text, i.key
FROM frames AS f JOIN images AS i ON i.id = f.image_id
WHERE i.account_id <> f.account_id
UNION ALL
SELECT 'counts differ from frames', j.id::text, format('counted %s, ended %s', c.ended, f.ended)
FROM jobs AS j
CROSS JOIN LATERAL (SELECT coalesce(sum(done + failed + cancelled), 0) AS ended FROM counts WHERE job_id = j.id) AS c
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE ended_at IS NOT NULL) AS ended, count(*) AS frames FROM frames
    WHERE job_id = j.id AND id > j.id AND id <= last_frame_id(j.id)
) AS f
WHERE c.ended <> f.ended OR f.frames <> j.frames
UNION ALL
SELECT CASE WHEN j.held - h.freed < h.needed THEN 'hold below what open frames need' ELSE 'hold above it at rest' END,
       j.id::text, format('held %s, freed since %s, needed %s', j.held, h.freed, h.needed)
FROM jobs AS j
CROSS JOIN LATERAL (
    SELECT coalesce((SELECT sum(freed) FROM counts WHERE job_id = j.id AND NOT folded), 0) AS freed,
           coalesce((SELECT sum(f.quantity * p.rate
                                * CASE p.method WHEN 'mpx_step' THEN 0.00000095367431640625 ELSE 1 END)
                     FROM frames AS f JOIN prices AS p ON p.id = f.price_id
                     WHERE f.job_id = j.id AND f.id > j.id AND f.id <= last_frame_id(j.id)
                       AND f.ended_at IS NULL), 0) AS needed
) AS h
WHERE j.held - h.freed <> h.needed
UNION ALL
SELECT 'ended job with open frames', j.id::text, j.status
FROM jobs AS j
WHERE j.ended_at IS NOT NULL AND EXISTS (
    SELECT FROM frames AS f WHERE f.job_id = j.id AND f.id > j.id AND f.id <= last_frame_id(j.id) AND f.ended_at IS NULL)
UNION ALL
SELECT 'closed pack with frames', p.id::text, p.outcome
FROM packs AS p WHERE p.closed_at IS NOT NULL AND EXISTS (SELECT FROM frames WHERE pack_id = p.id)
UNION ALL
SELECT 'queued frame behind a closed key or lane', f.id::text, format('key %s, job lane %s', k.open, jl.open)
FROM frames AS f
JOIN job_keys AS k USING (job_id, key_no)
JOIN job_lanes AS jl ON jl.job_id = k.job_id AND jl.model = k.model
JOIN lanes AS l ON l.model = jl.model AND l.priority = jl.priority AND l.account_id = jl.account_id
WHERE f.status = 'queued' AND NOT (k.open AND jl.open AND (l.active OR NOT jl.runnable))
