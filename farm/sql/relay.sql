-- Move up to :n rows from the outbox to events, numbered without a gap. The caller holds the sweep's advisory lock:
-- two relays would give one number twice, which the key refuses.
WITH gone AS (
    DELETE FROM outbox
    WHERE id = ANY (ARRAY (SELECT id FROM outbox ORDER BY id LIMIT :n))
    RETURNING *
), numbered AS (
    INSERT INTO events (number, account_id, job_id, frame_id, kind, data, at)
    SELECT coalesce((SELECT max(number) FROM events), 0) + row_number() OVER (ORDER BY g.id),
           g.account_id, g.job_id, g.frame_id, g.kind, g.data, g.at
    FROM gone AS g
    RETURNING number
)
SELECT count(*) AS events, max(number) AS last FROM numbered
