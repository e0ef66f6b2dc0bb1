-- Of these images, those no frame of a job that keeps its images points to: from here on a tombstone each.
-- The caller has locked their rows in an earlier statement. Reads frames_image_idx, and jobs_pkey.
UPDATE images AS i SET deleted_at = clock_timestamp(), purged_at = NULL
WHERE i.id = ANY (CAST(:images AS bigint[])) AND i.deleted_at IS NULL
  AND NOT EXISTS (
      SELECT FROM frames AS f JOIN jobs AS j ON j.id = f.job_id
      WHERE f.image_id = i.id AND j.images_deleted_at IS NULL
  )
