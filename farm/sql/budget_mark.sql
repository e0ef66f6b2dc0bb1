-- Mark the thresholds that were reached, clear those that no longer are (a month began, a limit was raised), and tell of
-- the first. Month by month a threshold is reached anew. Reads budgets, which are few, and tallies_account_idx.
WITH moment AS MATERIALIZED (
    SELECT date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC')::date AS month
), used AS MATERIALIZED (
    SELECT b.id, b.api_key_id, b.period, b.currency, b.amount, m.month,
           (SELECT coalesce(sum(t.spent), 0) FROM tallies AS t
            WHERE t.account_id = b.account_id AND (b.api_key_id IS NULL OR t.api_key_id = b.api_key_id)
              AND t.month IS NOT NULL AND (b.period = 'total' OR t.month = m.month)) AS spent
    FROM budgets AS b CROSS JOIN moment AS m
    WHERE EXISTS (SELECT FROM budget_thresholds WHERE budget_id = b.id)
), judged AS MATERIALIZED (
    SELECT t.budget_id, t.percent, t.action, 100 * u.spent >= t.percent * u.amount AS reached,
           CASE u.period WHEN 'month' THEN u.month END AS month
    FROM budget_thresholds AS t JOIN used AS u ON u.id = t.budget_id
), changed AS (
    UPDATE budget_thresholds AS t
    SET reached_at = CASE WHEN j.reached THEN clock_timestamp() END, month = CASE WHEN j.reached THEN j.month END
    FROM judged AS j
    WHERE t.budget_id = j.budget_id AND t.percent = j.percent AND t.action = j.action
      AND (j.reached <> (t.reached_at IS NOT NULL) OR (j.reached AND t.month IS DISTINCT FROM j.month))
    RETURNING t.budget_id, t.account_id, t.percent, t.action, j.reached
), told AS (
    INSERT INTO outbox (account_id, kind, data)
    SELECT c.account_id, 'budget.' || c.action,
           jsonb_build_object('percent', c.percent, 'period', u.period, 'limit', trim_scale(u.amount)::text,
                              'spent', trim_scale(u.spent)::text, 'currency', u.currency)
           || CASE u.period WHEN 'month' THEN jsonb_build_object('month', to_char(u.month, 'YYYY-MM')) ELSE '{}' END
           || CASE WHEN u.api_key_id IS NULL THEN '{}'
              ELSE jsonb_build_object('key', 'key_' || replace(u.api_key_id::text, '-', '')) END
    FROM changed AS c JOIN used AS u ON u.id = c.budget_id
    WHERE c.reached
    ORDER BY c.budget_id, c.percent, c.action
)
SELECT count(*) FROM changed
