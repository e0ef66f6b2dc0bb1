-- What a submission begins with: frames that have not ended, of the account and of all, and what the account has been
-- allowed; whether it has a budget; when this transaction began, and what the clock says: ids rise by it.
-- Reads tallies_open_idx, as open_frames.sql does.
SELECT (SELECT open_frames FROM limits WHERE account_id = :account_id AND api_key_id IS NULL) AS allowed,
       coalesce(sum(t.open_frames) FILTER (WHERE t.account_id = :account_id), 0)::bigint AS account,
       coalesce(sum(t.open_frames), 0)::bigint AS farm,
       EXISTS (SELECT FROM budgets WHERE account_id = :account_id) AS has_budget,
       now() AS began, (extract(epoch FROM clock_timestamp()) * 1000)::bigint AS ms
FROM tallies AS t
WHERE t.open_frames <> 0
