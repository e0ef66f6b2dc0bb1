-- Close the packs that hold no frame any more.
UPDATE packs AS p
SET closed_at = clock_timestamp(), outcome = :outcome
WHERE p.id = ANY (CAST(:packs AS bigint[])) AND p.closed_at IS NULL
  AND NOT EXISTS (SELECT FROM frames AS f WHERE f.pack_id = p.id)
RETURNING p.id
