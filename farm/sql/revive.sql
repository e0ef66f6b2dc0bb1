-- Of images that were deleted once, those whose file was stored anew: since their pack was claimed, or since a later
-- time that the worker asked for, and that was :margin_s after the old file was gone. Such a row is an image's again.
-- All times are the database's.
-- In the order of keys, as settle.sql locks them. Reads images_key_key, packs_pkey.
WITH stored AS MATERIALIZED (
    SELECT DISTINCT ON (s.key) s.key, decode(s.pixel_sha256, 'hex') AS pixel_sha256, s.bytes, s.width, s.height,
           coalesce(s.since, p.claimed_at) AS since
    FROM json_to_recordset(CAST(:stored AS json))
         AS s (pack_id bigint, key text, pixel_sha256 text, bytes integer, width integer, height integer,
               since timestamptz)
    JOIN packs AS p ON p.id = s.pack_id
    ORDER BY s.key, coalesce(s.since, p.claimed_at)
), dead AS MATERIALIZED (
    SELECT i.id, i.key, i.purged_at FROM images AS i
    WHERE i.key = ANY (ARRAY (SELECT key FROM stored)) AND i.deleted_at IS NOT NULL
    ORDER BY i.key
    FOR NO KEY UPDATE
), alive AS (
    UPDATE images AS i
    SET deleted_at = NULL, purged_at = NULL, pixel_sha256 = s.pixel_sha256, bytes = s.bytes, width = s.width,
        height = s.height
    FROM stored AS s JOIN dead AS d ON d.key = s.key
    WHERE i.id = d.id AND d.purged_at + make_interval(secs => :margin_s) < s.since
    RETURNING i.id
)
SELECT d.id, d.key, a.id IS NOT NULL AS alive FROM dead AS d LEFT JOIN alive AS a USING (id)
