-- Fold what was appended to tallies: one row for each account, key and month. Only the sweep folds, one at a time; who
-- sums meanwhile sees either the parts or their sum. Reads tallies_unfolded_idx and tallies_account_idx.
WITH due AS MATERIALIZED (
    SELECT DISTINCT account_id, api_key_id, month FROM tallies WHERE NOT folded
), taken AS (
    DELETE FROM tallies AS t USING due AS d
    WHERE t.account_id = d.account_id AND t.api_key_id IS NOT DISTINCT FROM d.api_key_id
      AND t.month IS NOT DISTINCT FROM d.month
    RETURNING t.*
), put AS (
    INSERT INTO tallies (account_id, api_key_id, month, held, spent, open_frames, folded)
    SELECT account_id, api_key_id, month, sum(held), sum(spent), sum(open_frames), true
    FROM taken
    GROUP BY account_id, api_key_id, month
)
SELECT count(*) FROM taken WHERE NOT folded
