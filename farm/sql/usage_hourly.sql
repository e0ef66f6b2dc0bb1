-- An account's usage in [:since, :until), one row for each hour, model, method, currency and rate. A reversal counts in
-- its own hour. Both times are starts of hours (ledger.hour_of): a part of an hour would go out under the id of the whole.
-- Reads usage_account_idx.
SELECT date_trunc('hour', at, 'UTC') AS hour, model, method, currency, rate,
       count(*) FILTER (WHERE entry = 0) AS frames, count(*) FILTER (WHERE entry = 1) AS reversed,
       sum((1 - 2 * entry) * quantity) AS quantity, sum(amount) AS amount
FROM usage
WHERE account_id = :account_id AND at >= :since AND at < :until
GROUP BY 1, model, method, currency, rate
ORDER BY 1, model, method, currency, rate
