-- Frames that have not ended, of one account and of all, and what the account has been allowed. Reads tallies_open_idx:
-- one row for each key with open frames, and those appended since the sweep last folded them; never frames, nor jobs.
SELECT (SELECT open_frames FROM limits WHERE account_id = :account_id AND api_key_id IS NULL) AS allowed,
       coalesce(sum(t.open_frames) FILTER (WHERE t.account_id = :account_id), 0)::bigint AS account,
       coalesce(sum(t.open_frames), 0)::bigint AS farm
FROM tallies AS t
WHERE t.open_frames <> 0
