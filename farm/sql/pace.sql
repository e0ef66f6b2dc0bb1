-- How fast workers were of late, by model: the time that packs settled in the last hour were on a device, and what was in
-- them. A pack's id is the moment it was claimed: what is older is not read.
SELECT model, sum(work) AS work,
       sum(greatest(1, coalesce(gpu_ms, extract(epoch FROM closed_at - claimed_at) * 1000)))::bigint AS ms
FROM packs
WHERE id > ((extract(epoch FROM now() - interval '1 hour') * 1000000)::bigint << 12) AND outcome = 'settled'
GROUP BY model
