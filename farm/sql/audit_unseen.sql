-- What the audit does not see: months of frames and of usage that were detached, of which jobs are still there, and events
-- before the oldest. A month is that of the jobs' ids, by which it was partitioned.
SELECT format('%s of %s', t.name, to_char(m.month, 'YYYY-MM')) AS what,
       format('detached: %s jobs with %s done frames, charged %s', count(*), sum(c.done), trim_scale(sum(c.charged)))
           AS detail
FROM jobs AS j
CROSS JOIN (VALUES ('frames'), ('usage')) AS t (name)
CROSS JOIN LATERAL (
    SELECT date_trunc('month', to_timestamp(('x' || left(replace(j.id::text, '-', ''), 12))::bit(48)::bigint / 1000.0)
                               AT TIME ZONE 'UTC') AS month
) AS m
CROSS JOIN LATERAL (
    SELECT coalesce(sum(done), 0) AS done, coalesce(sum(charged), 0) AS charged FROM counts WHERE job_id = j.id
) AS c
WHERE NOT EXISTS (SELECT FROM attached(t.name::regclass) AS a WHERE j.id >= a.lower AND j.id < a.upper)
GROUP BY t.name, m.month
UNION ALL
SELECT 'events', format('those before number %s, of %s UTC', number, to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'))
FROM (SELECT number, at FROM events ORDER BY number LIMIT 1) AS e
WHERE number > 1
ORDER BY 1
