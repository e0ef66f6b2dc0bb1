-- What was charged and is held under the budgets of :accounts; of :key alone and of all keys together, if one is named.
-- One snapshot: a job admitted by this transaction is in it. Reads tallies_account_idx: one row for each key and month,
-- and those appended since the sweep last folded them; never frames, nor jobs.
WITH moment AS MATERIALIZED (
    SELECT date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC')::date AS month
)
SELECT b.id, b.account_id, b.api_key_id, b.period, b.currency, b.amount, m.month, u.spent, u.held,
       (SELECT min(t.percent) FROM budget_thresholds AS t
        WHERE t.budget_id = b.id AND t.action <> 'notify' AND 100 * u.spent >= t.percent * b.amount) AS stopped
FROM budgets AS b
CROSS JOIN moment AS m
CROSS JOIN LATERAL (
    SELECT coalesce(sum(t.spent) FILTER (WHERE b.period = 'total' OR t.month = m.month), 0) AS spent,
           coalesce(sum(t.held), 0) AS held
    FROM tallies AS t
    WHERE t.account_id = b.account_id AND (b.api_key_id IS NULL OR t.api_key_id = b.api_key_id)
) AS u
WHERE b.account_id = ANY (CAST(:accounts AS uuid[]))
  AND (CAST(:key AS uuid) IS NULL OR b.api_key_id IS NULL OR b.api_key_id = CAST(:key AS uuid))
ORDER BY b.account_id, b.api_key_id NULLS FIRST, b.period
