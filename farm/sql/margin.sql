-- Revenue and GPU time in [:since, :until), by account, currency, model and pool; account NULL is the farm's own.
--
-- A pack's GPU time is split among all its frames by their work, in microseconds, by largest remainder, so that the
-- shares of a pack are exactly its gpu_ms. What was delivered is its account's, at the time of its charge; the rest of
-- the pack, which came back or was cancelled, is the farm's, at the time the pack closed. So shares of adjacent times
-- add up too. The packs are found by their ids, which are the moments they were claimed at; a pack's charges lie
-- between its claim and its end. Joins are by hash or merge (farm/margin.py): how many rows a part has is not foreseen,
-- and one loop within another took eight minutes for 50,000 charges.
WITH pack AS MATERIALIZED (
    SELECT p.id, p.model, coalesce(w.pool, '?') AS pool, p.work, p.gpu_ms::numeric * 1000 AS gpu_us, p.claimed_at,
           p.closed_at
    FROM packs AS p LEFT JOIN workers AS w ON w.id = p.worker
    WHERE p.id >= (extract(epoch FROM CAST(:since AS timestamptz) - interval '1 day') * 1000000)::bigint << 12
      AND p.id < (extract(epoch FROM CAST(:until AS timestamptz)) * 1000000)::bigint << 12
      AND p.closed_at >= CAST(:since AS timestamptz) AND p.gpu_ms IS NOT NULL
), charge AS MATERIALIZED (
    SELECT u.frame_id, u.entry, u.account_id, u.currency, u.model, u.amount, u.pack_id, u.at
    FROM accounts AS a
    CROSS JOIN LATERAL (
        SELECT * FROM usage AS x
        WHERE x.account_id = a.id AND x.at >= least(:since, (SELECT min(claimed_at) FROM pack))
          AND x.at < greatest(:until, (SELECT max(closed_at) FROM pack))
    ) AS u
), part AS (
    SELECT p.id AS pack_id, f.id AS frame_id, f.work::numeric AS work
    FROM pack AS p
    JOIN charge AS c ON c.pack_id = p.id AND c.entry = 0
    JOIN frames AS f ON f.id = c.frame_id AND f.id >= (SELECT frame_id FROM charge ORDER BY frame_id LIMIT 1)
         AND f.id <= (SELECT frame_id FROM charge ORDER BY frame_id DESC LIMIT 1)
), whole AS (
    SELECT pack_id, frame_id, work FROM part
    UNION ALL
    SELECT p.id, NULL, p.work - coalesce(d.work, 0)
    FROM pack AS p LEFT JOIN (SELECT pack_id, sum(work) AS work FROM part GROUP BY pack_id) AS d ON d.pack_id = p.id
), cut AS (
    SELECT w.pack_id, w.frame_id, p.gpu_us, div(p.gpu_us * w.work, p.work) AS us,
           row_number() OVER (PARTITION BY w.pack_id ORDER BY mod(p.gpu_us * w.work, p.work) DESC, w.frame_id NULLS LAST)
               AS place,
           p.gpu_us - sum(div(p.gpu_us * w.work, p.work)) OVER (PARTITION BY w.pack_id) AS missing
    FROM whole AS w JOIN pack AS p ON p.id = w.pack_id
), share AS MATERIALIZED (
    SELECT pack_id, frame_id, us + CASE WHEN place <= missing THEN 1 ELSE 0 END AS us FROM cut
)
SELECT c.account_id, c.currency, c.model, coalesce(w.pool, CASE WHEN c.pack_id IS NULL THEN '–' ELSE '?' END) AS pool,
       count(*) FILTER (WHERE c.entry = 0) AS frames, count(*) FILTER (WHERE c.entry = 1) AS reversed,
       sum(c.amount) AS revenue, coalesce(sum(s.us) FILTER (WHERE c.entry = 0), 0) AS gpu_us
FROM charge AS c
LEFT JOIN packs AS p ON p.id = c.pack_id
LEFT JOIN workers AS w ON w.id = p.worker
LEFT JOIN share AS s ON s.frame_id = c.frame_id AND c.entry = 0
WHERE c.at >= :since AND c.at < :until
GROUP BY 1, 2, 3, 4
UNION ALL
SELECT NULL, NULL, p.model, p.pool, 0, 0, 0, sum(s.us)
FROM share AS s JOIN pack AS p ON p.id = s.pack_id
WHERE s.frame_id IS NULL AND p.closed_at >= :since AND p.closed_at < :until
GROUP BY p.model, p.pool
