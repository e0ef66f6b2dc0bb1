-- Lease up to :n webhooks that have something due, those due first. SKIP LOCKED: two that deliver never wait for each
-- other, and each webhook is told by one of them. Left out are receivers and accounts that are being told of enough.
-- Reads webhooks_due_idx.
UPDATE webhooks
SET leased_until = clock_timestamp() + make_interval(secs => :lease_s)
WHERE id = ANY (ARRAY (
    SELECT id FROM webhooks
    WHERE next_at <= clock_timestamp() AND disabled_at IS NULL
      AND (leased_until IS NULL OR leased_until < clock_timestamp())
      AND account_id <> ALL (CAST(:full AS uuid[]))
      AND account_id || ' ' || receiver <> ALL (CAST(:busy AS text[]))
    ORDER BY next_at
    LIMIT :n
    FOR NO KEY UPDATE SKIP LOCKED))
RETURNING id, account_id, receiver
