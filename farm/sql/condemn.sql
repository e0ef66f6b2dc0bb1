-- Of these keys, those that no image has get a tombstone, new or again, so that the purge takes their file.
--
-- It stands before the file goes: whoever stores and books the same bytes meanwhile finds the key taken (ON CONFLICT
-- in settle.sql waits for this row, or this one for that). A key of an account nobody knows is not ours to delete.
-- Reads images_key_key, accounts_pkey.
INSERT INTO images AS i (account_id, key, format, sha256, deleted_at)
SELECT a.id, k.key, k.format, decode(k.sha256, 'hex'), clock_timestamp()
FROM unnest(CAST(:keys AS text[]), CAST(:accounts AS uuid[]), CAST(:formats AS text[]), CAST(:hashes AS text[]))
     AS k (key, account_id, format, sha256)
JOIN accounts AS a ON a.id = k.account_id
WHERE NOT EXISTS (
    SELECT FROM images AS o WHERE o.key = k.key AND (o.deleted_at IS NULL OR o.purged_at IS NULL)
)
ORDER BY k.key
ON CONFLICT (key) DO UPDATE SET deleted_at = clock_timestamp(), purged_at = NULL
    WHERE i.deleted_at IS NOT NULL AND i.purged_at IS NOT NULL
RETURNING i.key
