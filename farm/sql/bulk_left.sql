-- An upload that was refused or discarded and has frames left, locked: oldest first. Reads bulk_uploads_left_idx.
SELECT id FROM bulk_uploads
WHERE status IN ('refused', 'discarded') AND stored > 0
ORDER BY id
LIMIT 1
FOR NO KEY UPDATE SKIP LOCKED
