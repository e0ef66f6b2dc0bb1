-- Of these keys, those no image has. Reads images_key_key.
SELECT k.key
FROM unnest(CAST(:keys AS text[])) AS k (key)
WHERE NOT EXISTS (SELECT FROM images AS i WHERE i.key = k.key)
