-- Seconds that each pool's workers were there in [:since, :until): sittings that ended, and those that go on.
SELECT pool, sum(extract(epoch FROM least(ended_at, :until) - greatest(started_at, :since))) AS up_s
FROM (
    SELECT pool, started_at, ended_at FROM sittings
    UNION ALL
    SELECT pool, started_at, seen_at FROM workers
) AS s
WHERE ended_at > :since AND started_at < :until
GROUP BY pool
