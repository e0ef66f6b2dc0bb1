-- Frames a second that the farm finished of late, in packs claimed within ten minutes; NULL: none. A pack's id is the
-- moment it was claimed: what is older is not read.
SELECT sum(frames) / greatest(1, extract(epoch FROM max(closed_at) - min(claimed_at)))::double precision AS frames_per_s
FROM packs
WHERE id > ((extract(epoch FROM now() - interval '10 minutes') * 1000000)::bigint << 12) AND outcome = 'settled'
