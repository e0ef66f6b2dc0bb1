-- Up to 64 open job keys of these models without a queued frame. Run when a claim found nothing: then all that is open
-- is empty, or others are at it. Reads lanes_active_idx, job_lanes_head_idx, job_keys_open_idx, frames_queued_idx.
SELECT k.job_id, k.key_no
FROM lanes AS l
JOIN job_lanes AS jl ON jl.model = l.model AND jl.priority = l.priority AND jl.account_id = l.account_id
JOIN job_keys AS k ON k.job_id = jl.job_id AND k.model = jl.model
WHERE l.active AND l.model = ANY (CAST(:models AS text[])) AND jl.runnable AND jl.open AND k.open AND NOT EXISTS (
    SELECT FROM frames AS f
    WHERE f.job_id = k.job_id AND f.key_no = k.key_no AND f.status = 'queued'
      AND f.id > k.job_id AND f.id <= last_frame_id(k.job_id)
)
ORDER BY k.job_id, k.key_no
LIMIT 64
