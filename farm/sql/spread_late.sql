-- Make up for webhooks that were behind and have caught up by half: deliveries of what :n more of their account's
-- events are, from behind_from on. The caller holds the lock of spread.sql.
-- Reads webhooks_behind_idx, events_account_idx and deliveries_pending_idx.
WITH late AS MATERIALIZED (
    SELECT w.id, w.account_id, w.job_id, w.kinds, w.behind_from, r.room
    FROM webhooks AS w
    CROSS JOIN LATERAL (
        SELECT CAST(:waiting AS integer) - count(*) AS room FROM (
            SELECT FROM deliveries AS d WHERE d.webhook_id = w.id AND d.status = 'pending'
            LIMIT CAST(:waiting AS integer)) AS p
    ) AS r
    WHERE w.behind_from IS NOT NULL AND w.disabled_at IS NULL AND r.room * 2 >= CAST(:waiting AS integer)
    ORDER BY w.id
    LIMIT 20
), page AS MATERIALIZED (
    SELECT l.id, l.account_id, l.kinds, l.room, e.number, e.kind
    FROM late AS l
    CROSS JOIN LATERAL (
        SELECT e.number, e.kind FROM events AS e
        WHERE e.account_id = l.account_id AND (l.job_id IS NULL OR e.job_id = l.job_id)
          AND e.number >= l.behind_from AND e.number <= (SELECT number FROM deliveries_upto)
        ORDER BY e.number
        LIMIT :n
    ) AS e
), hit AS MATERIALIZED (
    SELECT p.*, row_number() OVER (PARTITION BY p.id ORDER BY p.number) AS nth
    FROM page AS p
    WHERE EXISTS (
        SELECT FROM unnest(p.kinds) AS k (kind)
        WHERE k.kind = p.kind OR (right(k.kind, 1) = '*' AND starts_with(p.kind, left(k.kind, -1))))
), put AS (
    INSERT INTO deliveries (webhook_id, account_id, event, kind)
    SELECT id, account_id, number, kind FROM hit WHERE nth <= room ORDER BY number
    ON CONFLICT (webhook_id, event) DO NOTHING
), told AS (
    UPDATE webhooks AS w
    SET behind_from = coalesce(b.beyond, CASE WHEN b.events = :n THEN b.last + 1 END),
        next_at = least(w.next_at, greatest(clock_timestamp(), w.paused_until))
    FROM (
        SELECT l.id,
               (SELECT count(*) FROM page AS p WHERE p.id = l.id) AS events,
               (SELECT max(p.number) FROM page AS p WHERE p.id = l.id) AS last,
               (SELECT min(h.number) FROM hit AS h WHERE h.id = l.id AND h.nth > h.room) AS beyond
        FROM late AS l
    ) AS b
    WHERE w.id = b.id AND w.id = ANY (ARRAY (SELECT id FROM late))
)
SELECT count(*) FROM page
