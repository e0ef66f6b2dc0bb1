-- Make a delivery of each of the next :n events for each webhook that asks for it. Events are numbered after commit,
-- without a gap, so that whoever goes on after the last number misses none. The caller holds an advisory lock.
-- Of a webhook at most :waiting wait: what is beyond that stays an event, and behind_from remembers where it begins.
-- Reads events_pkey, webhooks_account_idx, webhooks_job_idx and deliveries_pending_idx.
WITH span AS MATERIALIZED (
    SELECT number, account_id, job_id, kind, at FROM events
    WHERE number > (SELECT number FROM deliveries_upto)
    ORDER BY number
    LIMIT :n
), hit AS MATERIALIZED (
    SELECT w.id, w.account_id, s.number, s.kind, row_number() OVER (PARTITION BY w.id ORDER BY s.number) AS nth
    FROM span AS s
    CROSS JOIN LATERAL (
        SELECT id, account_id, kinds FROM webhooks
        WHERE account_id = s.account_id AND job_id IS NULL AND disabled_at IS NULL AND behind_from IS NULL
          AND created_at <= s.at
        UNION ALL
        SELECT id, account_id, kinds FROM webhooks
        WHERE job_id = s.job_id AND disabled_at IS NULL AND behind_from IS NULL
    ) AS w
    WHERE EXISTS (
        SELECT FROM unnest(w.kinds) AS k (kind)
        WHERE k.kind = s.kind OR (right(k.kind, 1) = '*' AND starts_with(s.kind, left(k.kind, -1))))
), room AS MATERIALIZED (
    SELECT h.id, CAST(:waiting AS integer) - (
        SELECT count(*) FROM (
            SELECT FROM deliveries AS d WHERE d.webhook_id = h.id AND d.status = 'pending'
            LIMIT CAST(:waiting AS integer)) AS p) AS room
    FROM (SELECT DISTINCT id FROM hit) AS h
), put AS (
    INSERT INTO deliveries (webhook_id, account_id, event, kind)
    SELECT h.id, h.account_id, h.number, h.kind
    FROM hit AS h JOIN room AS r ON r.id = h.id
    WHERE h.nth <= r.room
    ORDER BY h.number
    ON CONFLICT (webhook_id, event) DO NOTHING
), told AS (
    UPDATE webhooks AS w
    SET behind_from = b.number, next_at = least(w.next_at, greatest(clock_timestamp(), w.paused_until))
    FROM (
        SELECT h.id, min(h.number) FILTER (WHERE h.nth > r.room) AS number
        FROM hit AS h JOIN room AS r ON r.id = h.id
        GROUP BY h.id
    ) AS b
    WHERE w.id = b.id AND w.id = ANY (ARRAY (SELECT id FROM room))
), moved AS (
    UPDATE deliveries_upto SET number = (SELECT max(number) FROM span) WHERE EXISTS (SELECT FROM span)
)
SELECT count(*) FROM span
