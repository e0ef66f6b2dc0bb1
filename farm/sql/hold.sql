-- Lock open packs and then their jobs, each in the order of their ids: from here on no other transaction touches the
-- packs' frames or cancels the jobs. Returns both: what comes after sees them as they are.
--
-- A statement of its own: the next one's snapshot is younger than the locks. NO KEY UPDATE is what extending and closing
-- a pack takes; KEY SHARE conflicts with the UPDATE lock that cancel takes, and with nothing that settles, folds or
-- counts. UNION ALL runs its parts in turn. Reads the keys.
SELECT p.id AS pack_id, NULL AS job_id, NULL AS status
FROM (
    SELECT id FROM packs WHERE id = ANY (CAST(:packs AS bigint[])) AND closed_at IS NULL ORDER BY id FOR NO KEY UPDATE
) AS p
UNION ALL
SELECT NULL, j.id, j.status
FROM (SELECT id, status FROM jobs WHERE id = ANY (CAST(:jobs AS uuid[])) ORDER BY id FOR KEY SHARE) AS j
