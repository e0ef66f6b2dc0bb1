-- Extend the leases of a worker's open packs; answer which of them it still has, which of their frames belong to
-- a cancelled job, and whether the worker is to drain. Reads the packs' key and frames_pack_idx.
WITH mine AS (
    UPDATE packs
    SET lease_until = clock_timestamp() + make_interval(secs => :lease_s)
    WHERE id = ANY (CAST(:packs AS bigint[])) AND worker = :worker AND closed_at IS NULL
    RETURNING id
)
SELECT mine.id AS pack_id,
       ARRAY (SELECT f.id FROM frames AS f JOIN jobs AS j ON j.id = f.job_id
              WHERE f.pack_id = mine.id AND j.status = 'cancelled') AS cancelled,
       EXISTS (SELECT FROM workers WHERE id = :worker AND state = 'draining') AS drain
FROM mine
