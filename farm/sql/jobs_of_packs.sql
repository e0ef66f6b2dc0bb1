-- The jobs whose frames these packs hold. Reads frames_pack_idx.
SELECT DISTINCT job_id FROM frames WHERE pack_id = ANY (CAST(:packs AS bigint[]))
