-- Of these fingerprints, those that an image answers, or that an equal frame in flight will: it is on a device, or queued
-- in a class as urgent and not behind a proof, or of the job :within that is being uploaded. Images are locked against being deleted (farm/retention.py). The caller holds the locks of submissions that look for the same. Reads known_images_pkey and
-- frames_equal_idx.
SELECT x.no - 1 AS no, k.image_id IS NOT NULL AS known
FROM unnest(CAST(:fingerprints AS bytea[]), CAST(:formats AS text[])) WITH ORDINALITY AS x (fingerprint, format, no)
LEFT JOIN LATERAL (
    SELECT k.image_id
    FROM known_images AS k
    JOIN images AS i ON i.id = k.image_id AND i.deleted_at IS NULL
    JOIN accounts AS a ON a.id = k.account_id AND a.prompt_in_images = k.prompt
    WHERE k.account_id = :account_id AND k.fingerprint = x.fingerprint AND k.format = x.format
    FOR KEY SHARE OF i
) AS k ON true
WHERE k.image_id IS NOT NULL OR EXISTS (
    SELECT FROM frames AS f
    JOIN jobs AS j ON j.id = f.job_id
    WHERE f.account_id = :account_id AND f.fingerprint = x.fingerprint AND f.seeded
      AND f.status IN ('queued', 'claimed') AND f.spec ->> 'format' = x.format
      AND CASE f.status WHEN 'claimed' THEN j.status <> 'cancelled' ELSE j.runnable AND j.priority >= :priority
          AND (j.proof IS NULL OR j.approved_at IS NOT NULL OR f.index < j.proof) OR j.id = CAST(:within AS uuid) END
)
