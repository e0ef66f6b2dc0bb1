-- The waiting frames these rows of waiters_due ask to look at, :n a row at most, each in the order of their ids. Those of
-- uploads, and those behind a proof, wait whatever becomes of their equals: accepting and approving ask to look again.
-- Reads frames_equal_idx and frames_waiting_idx.
SELECT d.id AS due, f.id, f.job_id
FROM waiters_due AS d
CROSS JOIN LATERAL (
    SELECT f.id, f.job_id
    FROM frames AS f
    WHERE f.account_id = d.account_id AND f.fingerprint = ANY (d.fingerprints) AND f.seeded AND f.status = 'waiting'
      AND f.id > coalesce(d.after, '00000000-0000-0000-0000-000000000000')
      AND NOT EXISTS (SELECT FROM jobs AS j WHERE j.id = f.job_id AND (j.status = 'staged'
                      OR j.proof IS NOT NULL AND j.approved_at IS NULL AND f.index >= j.proof))
    ORDER BY f.id
    LIMIT :n
) AS f
WHERE d.id = ANY (CAST(:due AS bigint[])) AND d.fingerprints IS NOT NULL
UNION ALL
SELECT d.id, f.id, f.job_id
FROM waiters_due AS d
CROSS JOIN LATERAL (
    SELECT f.id, f.job_id
    FROM frames AS f
    WHERE f.account_id = d.account_id AND f.status = 'waiting'
      AND f.id > coalesce(d.after, '00000000-0000-0000-0000-000000000000')
      AND NOT EXISTS (SELECT FROM jobs AS j WHERE j.id = f.job_id AND (j.status = 'staged'
                      OR j.proof IS NOT NULL AND j.approved_at IS NULL AND f.index >= j.proof))
    ORDER BY f.id
    LIMIT :n
) AS f
WHERE d.id = ANY (CAST(:due AS bigint[])) AND d.fingerprints IS NULL
