-- What a worker should know of its open packs between two extensions of their leases: each frame it still has, whether
-- its job was cancelled, and how urgent that is now; and whether to drain. Reads the packs' key and frames_pack_idx.
SELECT p.id AS pack_id, f.id AS frame_id, j.status = 'cancelled' AS cancelled, j.priority,
       EXISTS (SELECT FROM workers WHERE id = :worker AND state = 'draining') AS drain
FROM packs AS p
LEFT JOIN frames AS f ON f.pack_id = p.id
LEFT JOIN jobs AS j ON j.id = f.job_id
WHERE p.id = ANY (CAST(:packs AS bigint[])) AND p.worker = :worker AND p.closed_at IS NULL
