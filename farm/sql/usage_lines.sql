-- An account's usage in [:since, :until), one line for each model, method, currency and rate. Reads usage_account_idx.
SELECT model, method, currency, rate, count(*) FILTER (WHERE entry = 0) AS frames,
       sum((1 - 2 * entry) * quantity) AS quantity, sum(amount) AS amount
FROM usage
WHERE account_id = :account_id
  AND at >= coalesce(CAST(:since AS timestamptz), '-infinity')
  AND at < coalesce(CAST(:until AS timestamptz), 'infinity')
  AND (CAST(:job_id AS uuid) IS NULL OR job_id = CAST(:job_id AS uuid))
GROUP BY model, method, currency, rate
ORDER BY model, method, currency, rate
