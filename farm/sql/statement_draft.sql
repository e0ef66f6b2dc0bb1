-- What would be on an account's statement of the month [:since, :until) if it closed now, and is on no line yet: usage
-- of that month, and what came late for those closed up to :closed. Reads usage_unstated_idx.
SELECT model, method, rate, count(*) FILTER (WHERE entry = 0) AS frames, count(*) FILTER (WHERE entry = 1) AS reversed,
       count(*) FILTER (WHERE at < :since) AS late, sum((1 - 2 * entry) * quantity) AS quantity, sum(amount) AS exact
FROM usage
WHERE account_id = :account_id AND statement_line IS NULL AND at < :until
  AND (at >= :since OR at < CAST(:closed AS timestamptz))
GROUP BY model, method, rate
ORDER BY model, method, rate
