-- Lock jobs in the order of their ids. KEY SHARE conflicts with the UPDATE lock that cancel takes, and with nothing
-- that settles, folds or counts. Reads the key.
SELECT id, status FROM jobs WHERE id = ANY (CAST(:jobs AS uuid[])) ORDER BY id FOR KEY SHARE
