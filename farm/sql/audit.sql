-- Everything that must hold of frames, charges, events, counts, holds and packs; each row returned is a violation.
--
-- Months of frames or of usage may have been detached, and events from the oldest on. What only they could show is not
-- looked for here: audit_unseen.sql names it. It may be that a line counts more than is there, never less.
WITH kept_frames AS MATERIALIZED (SELECT lower, upper FROM attached('frames')),
kept_usage AS MATERIALIZED (SELECT lower, upper FROM attached('usage')),
usage_gone AS MATERIALIZED ( -- the first moment of which usage may be missing; none: NULL
    SELECT min(j.created_at) AS since FROM jobs AS j
    WHERE NOT EXISTS (SELECT FROM kept_usage WHERE j.id >= lower AND j.id < upper)
), told_since AS MATERIALIZED ( -- an hour is longer than anything waits for its number
    SELECT at + interval '1 hour' AS since FROM (SELECT number, at FROM events ORDER BY number LIMIT 1) AS e
    WHERE number > 1
), told AS (
    SELECT frame_id, CASE kind WHEN 'frame.done' THEN 0 ELSE 1 END AS entry FROM events
    WHERE kind IN ('frame.done', 'usage.reversed')
    UNION ALL
    SELECT frame_id, CASE kind WHEN 'frame.done' THEN 0 ELSE 1 END FROM outbox
    WHERE kind IN ('frame.done', 'usage.reversed')
)
SELECT 'done without a charge' AS violation, f.id::text AS subject, '' AS detail
FROM frames AS f LEFT JOIN usage AS u ON u.frame_id = f.id AND u.entry = 0
WHERE f.status = 'done' AND u.frame_id IS NULL
  AND EXISTS (SELECT FROM kept_usage WHERE f.id >= lower AND f.id < upper)
UNION ALL
SELECT 'charge without a done frame', u.frame_id::text, coalesce(f.status, 'no frame')
FROM usage AS u LEFT JOIN frames AS f ON f.id = u.frame_id
WHERE u.entry = 0 AND (f.id IS NULL OR f.status <> 'done')
  AND EXISTS (SELECT FROM kept_frames WHERE u.frame_id >= lower AND u.frame_id < upper)
UNION ALL
SELECT CASE WHEN u.frame_id IS NULL THEN 'event of a charge that was not made'
            WHEN e.frame_id IS NULL THEN 'charge without its event' ELSE 'charge told of more than once' END,
       coalesce(u.frame_id, e.frame_id)::text, format('entry %s, %s events', coalesce(u.entry, e.entry), coalesce(e.n, 0))
FROM usage AS u
FULL JOIN (SELECT frame_id, entry, count(*) AS n FROM told GROUP BY frame_id, entry) AS e
     ON e.frame_id = u.frame_id AND e.entry = u.entry
WHERE CASE WHEN u.frame_id IS NULL THEN EXISTS (SELECT FROM kept_usage WHERE e.frame_id >= lower AND e.frame_id < upper)
           WHEN e.frame_id IS NULL THEN u.at >= coalesce((SELECT since FROM told_since), '-infinity')
           ELSE e.n > 1 END
UNION ALL
SELECT 'charge differs from the frozen price', u.frame_id::text, u.amount::text
FROM usage AS u JOIN frames AS f ON f.id = u.frame_id JOIN prices AS p ON p.id = f.price_id
WHERE u.entry = 0 AND NOT f.reused AND (u.price_id <> f.price_id OR u.quantity <> f.quantity OR u.rate <> p.rate
    OR u.amount <> f.quantity * p.rate * CASE p.method WHEN 'mpx_step' THEN 0.00000095367431640625 ELSE 1 END)
UNION ALL
SELECT 'reuse charged at another price than its own', u.frame_id::text, format('%s %s', u.method, u.amount)
FROM usage AS u
JOIN frames AS f ON f.id = u.frame_id
JOIN job_keys AS k ON k.job_id = f.job_id AND k.key_no = f.key_no
LEFT JOIN prices AS p ON p.id = k.reuse_price_id AND p.method = 'reuse'
LEFT JOIN price_books AS b ON b.id = p.book_id AND b.model = k.model
WHERE u.entry = 0 AND (f.reused OR u.method = 'reuse')
  AND (NOT f.reused OR u.method <> 'reuse' OR b.id IS NULL OR u.price_id <> p.id OR u.quantity <> 1
       OR u.amount <> p.rate OR u.pack_id IS NOT NULL)
UNION ALL
SELECT 'known image of another account', k.image_id::text, i.key
FROM known_images AS k JOIN images AS i ON i.id = k.image_id
WHERE i.account_id <> k.account_id OR i.format <> k.format
UNION ALL
SELECT 'waiting for nobody', f.id::text, ''
FROM frames AS f
JOIN jobs AS j ON j.id = f.job_id
WHERE f.status = 'waiting' AND j.status NOT IN ('cancelled', 'staged')
  AND (j.proof IS NULL OR j.approved_at IS NOT NULL OR f.index < j.proof)
  AND NOT EXISTS (
      SELECT FROM waiters_due AS d
      WHERE d.account_id = f.account_id AND (d.fingerprints IS NULL OR f.fingerprint = ANY (d.fingerprints))
        AND (d.after IS NULL OR d.after < f.id))
  AND NOT EXISTS (
      SELECT FROM frames AS e
      JOIN jobs AS ej ON ej.id = e.job_id
      WHERE e.account_id = f.account_id AND e.fingerprint = f.fingerprint AND e.seeded
        AND e.status IN ('queued', 'claimed') AND e.spec ->> 'format' = f.spec ->> 'format' AND ej.status <> 'cancelled'
        AND (e.status = 'claimed' OR NOT j.runnable OR ej.runnable AND ej.priority >= j.priority))
UNION ALL
SELECT 'charged twice', frame_id::text, count(*)::text
FROM usage WHERE entry = 0 GROUP BY frame_id HAVING count(*) > 1
UNION ALL
SELECT 'usage in another currency than its account', u.frame_id::text, u.currency
FROM usage AS u JOIN accounts AS a ON a.id = u.account_id
WHERE u.currency <> a.currency
UNION ALL
SELECT 'reversal that is not of a charge', u.frame_id::text, u.amount::text
FROM usage AS u LEFT JOIN usage AS c ON c.frame_id = u.frame_id AND c.entry = 0
WHERE u.entry = 1 AND (c.frame_id IS NULL OR c.amount <> -u.amount OR c.account_id <> u.account_id
    OR c.job_id <> u.job_id OR c.model <> u.model OR c.price_id <> u.price_id OR c.quantity <> u.quantity)
UNION ALL
SELECT CASE WHEN r.frame_id IS NULL THEN 'reversal without a reason' ELSE 'reason without a reversal' END,
       coalesce(r.frame_id, u.frame_id)::text, coalesce(r.reason, '')
FROM (SELECT frame_id, account_id FROM usage WHERE entry = 1) AS u FULL JOIN reversals AS r ON r.frame_id = u.frame_id
WHERE (u.frame_id IS NULL AND EXISTS (SELECT FROM kept_usage WHERE r.frame_id >= lower AND r.frame_id < upper))
   OR r.frame_id IS NULL OR u.account_id <> r.account_id
UNION ALL
SELECT 'usage on a line that is not its own', u.frame_id::text, format('line %s, entry %s', u.statement_line, u.entry)
FROM usage AS u LEFT JOIN statement_lines AS l ON l.id = u.statement_line
WHERE u.statement_line IS NOT NULL AND (l.id IS NULL OR l.account_id <> u.account_id OR l.currency <> u.currency
    OR l.model <> u.model OR l.method <> u.method OR l.rate <> u.rate)
UNION ALL
SELECT 'statement line differs from its usage', l.id::text,
       format('%s frames for %s on it, %s for %s in usage', l.frames, l.exact, u.frames, u.exact)
FROM statement_lines AS l
JOIN statements AS m ON m.id = l.statement_id
LEFT JOIN (
    SELECT x.statement_line, count(*) FILTER (WHERE x.entry = 0) AS frames,
           count(*) FILTER (WHERE x.entry = 1) AS reversed,
           count(*) FILTER (WHERE x.at < s.month::timestamp AT TIME ZONE 'UTC') AS late,
           sum((1 - 2 * x.entry) * x.quantity) AS quantity, sum(x.amount) AS exact,
           max(x.at) < (s.month + interval '1 month') AT TIME ZONE 'UTC' AS over
    FROM usage AS x
    JOIN statement_lines AS y ON y.id = x.statement_line
    JOIN statements AS s ON s.id = y.statement_id
    GROUP BY x.statement_line, s.month
) AS u ON u.statement_line = l.id
WHERE CASE WHEN (m.month + interval '1 month') AT TIME ZONE 'UTC' > (SELECT since FROM usage_gone)
           THEN NOT u.over OR l.frames < u.frames OR l.reversed < u.reversed OR l.late < u.late
           ELSE u.statement_line IS NULL OR NOT u.over OR l.frames <> u.frames OR l.reversed <> u.reversed
                OR l.late <> u.late OR l.quantity <> u.quantity OR l.exact <> u.exact END
UNION ALL
SELECT 'statement that does not add up', s.id::text, format('total %s, lines %s, exactly %s', s.total, l.amount, l.exact)
FROM statements AS s
CROSS JOIN LATERAL (
    SELECT coalesce(sum(amount), 0) AS amount, coalesce(sum(exact), 0) AS exact,
           coalesce(bool_and(amount IS NOT NULL), true) AS whole
    FROM statement_lines WHERE statement_id = s.id
) AS l
WHERE s.closed_at IS NOT NULL
    AND (NOT l.whole OR l.amount <> s.total OR 2 * abs(s.total - l.exact) > power(10::numeric, -s.digits))
UNION ALL
SELECT 'image of another account', f.id::text, i.key
FROM frames AS f JOIN images AS i ON i.id = f.image_id
WHERE i.account_id <> f.account_id
UNION ALL
SELECT 'deleted image of a frame that keeps its own', f.id::text, i.key
FROM images AS i JOIN frames AS f ON f.image_id = i.id JOIN jobs AS j ON j.id = f.job_id
WHERE i.deleted_at IS NOT NULL AND j.images_deleted_at IS NULL
UNION ALL
SELECT 'counts differ from frames', j.id::text,
       format('counted: %s ended, %s reused, %s waiting; frames: %s, %s, %s',
              c.ended, c.reused, c.waiting, f.ended, f.reused, f.waiting)
FROM jobs AS j
CROSS JOIN LATERAL (
    SELECT coalesce(sum(done + failed + cancelled), 0) AS ended, coalesce(sum(reused), 0) AS reused,
           coalesce(sum(waiting), 0) AS waiting
    FROM counts WHERE job_id = j.id
) AS c
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE ended_at IS NOT NULL) AS ended, count(*) FILTER (WHERE reused) AS reused,
           count(*) FILTER (WHERE status = 'waiting') AS waiting, count(*) AS frames
    FROM frames
    WHERE job_id = j.id AND id > j.id AND id <= last_frame_id(j.id)
) AS f
WHERE (c.ended <> f.ended OR c.reused <> f.reused OR c.waiting <> f.waiting OR f.frames <> j.frames)
  AND EXISTS (SELECT FROM kept_frames WHERE j.id >= lower AND j.id < upper)
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
SELECT 'budgets count another hold', h.account_id::text, format('tallied %s, held %s', sum(h.tallied), sum(h.held))
FROM (SELECT account_id, api_key_id, held AS tallied, 0 AS held FROM tallies
      UNION ALL SELECT account_id, api_key_id, 0, held FROM jobs) AS h
GROUP BY h.account_id, h.api_key_id HAVING sum(h.tallied) <> sum(h.held)
UNION ALL
SELECT 'open frames counted otherwise than by jobs', o.account_id::text,
       format('tallied %s, open %s', sum(o.tallied), sum(o.open))
FROM (SELECT account_id, open_frames AS tallied, 0 AS open FROM tallies
      UNION ALL SELECT account_id, 0, frames FROM jobs
      UNION ALL SELECT j.account_id, 0, -(c.done + c.failed + c.cancelled)
                FROM counts AS c JOIN jobs AS j ON j.id = c.job_id WHERE c.folded) AS o
GROUP BY o.account_id HAVING sum(o.tallied) <> sum(o.open)
UNION ALL -- more is right: a month of usage may have been detached
SELECT 'budgets count less than was charged', s.account_id::text,
       format('tallied %s, charged %s', sum(s.tallied), sum(s.charged))
FROM (SELECT account_id, spent AS tallied, 0 AS charged FROM tallies
      UNION ALL SELECT j.account_id, c.charged, 0 FROM counts AS c JOIN jobs AS j ON j.id = c.job_id WHERE NOT c.folded
      UNION ALL SELECT account_id, 0, amount FROM usage) AS s
GROUP BY s.account_id HAVING sum(s.tallied) < sum(s.charged)
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
  AND NOT (k.rest AND EXISTS (SELECT FROM jobs AS j WHERE j.id = f.job_id AND j.approved_at IS NULL))
