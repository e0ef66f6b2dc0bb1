-- Drop up to :n deliveries that ended more than :days days ago, and callbacks of jobs that ended then and have nothing
-- left to tell. Reads deliveries_old_idx, webhooks_job_idx and deliveries_webhook_idx.
WITH old AS (
    DELETE FROM deliveries
    WHERE id = ANY (ARRAY (
        SELECT id FROM deliveries WHERE ended_at < clock_timestamp() - make_interval(days => :days)
        ORDER BY ended_at LIMIT :n))
    RETURNING id
), over AS (
    DELETE FROM webhooks
    WHERE id = ANY (ARRAY (
        SELECT w.id FROM webhooks AS w JOIN jobs AS j ON j.id = w.job_id
        WHERE w.job_id IS NOT NULL AND j.ended_at < clock_timestamp() - make_interval(days => :days)
          AND NOT EXISTS (SELECT FROM deliveries AS d WHERE d.webhook_id = w.id)
        LIMIT :n))
    RETURNING id
)
SELECT (SELECT count(*) FROM old) + (SELECT count(*) FROM over)
