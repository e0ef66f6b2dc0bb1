-- An account's next :n events after :cursor, with the row of usage that an event told of, if it told of one.
--
-- Usage itself has no order in which it became visible; events have: they are numbered after commit, without a gap,
-- and each charge and each reversal has one. Who remembers the last number misses no row and gets none twice.
-- Reads events_account_idx and usage's key.
SELECT e.number, u.frame_id, u.entry, u.job_id, u.model, u.method, u.currency, u.rate, u.quantity, u.amount, u.at
FROM (
    SELECT number, kind, frame_id FROM events
    WHERE account_id = :account_id AND number > :cursor
    ORDER BY number
    LIMIT :n
) AS e
LEFT JOIN LATERAL (
    SELECT * FROM usage AS x
    WHERE x.frame_id = e.frame_id AND x.entry = CASE e.kind WHEN 'usage.reversed' THEN 1 ELSE 0 END
      AND e.kind IN ('frame.done', 'usage.reversed')
) AS u ON true
ORDER BY e.number
