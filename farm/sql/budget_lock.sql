-- Let one admission of an account that has a budget in at a time; the lock is held until the transaction ends. Nothing
-- comes back, and nobody waits, if it has none. What is read next has a snapshot younger than the lock.
SELECT pg_advisory_xact_lock(:lock, hashtext(CAST(CAST(:account_id AS uuid) AS text))) IS NOT NULL
FROM (SELECT FROM budgets WHERE account_id = :account_id LIMIT 1) AS b
