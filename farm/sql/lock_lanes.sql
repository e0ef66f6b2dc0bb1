-- Lock the first :n active lanes of these models in the order head.sql tries them, to retire the empty ones.
-- SKIP LOCKED: a lane that somebody fills or charges just now is not empty for long.
SELECT model, priority, account_id
FROM lanes
WHERE active AND model = ANY (CAST(:models AS text[]))
ORDER BY priority DESC, served, account_id, model
LIMIT :n
FOR NO KEY UPDATE SKIP LOCKED
