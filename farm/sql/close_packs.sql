-- Close the packs that hold no frame any more. What they took on the device is kept where it is known: frames of theirs
-- may have been delivered before the last ones came back.
UPDATE packs AS p
SET closed_at = clock_timestamp(), outcome = :outcome, gpu_ms = coalesce(g.gpu_ms, p.gpu_ms)
FROM unnest(CAST(:packs AS bigint[]), CAST(:gpu_ms AS integer[])) AS g (pack_id, gpu_ms)
WHERE p.id = ANY (CAST(:packs AS bigint[])) AND p.id = g.pack_id AND p.closed_at IS NULL
  AND NOT EXISTS (SELECT FROM frames AS f WHERE f.pack_id = p.id)
RETURNING p.id
