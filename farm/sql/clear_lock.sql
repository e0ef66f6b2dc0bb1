-- The images that frames of one job from :first to :last point to, as far as nobody is about to point to one.
--
-- FOR UPDATE: who makes a frame point to an image holds its row (settle.sql updates it, the foreign key's check and a
-- reuse take KEY SHARE), until that is committed. So what is free here has no reference that the next statement
-- cannot see; what is not free is skipped, and `there` tells: the page is then looked at again.
-- Reads frames' primary key in one partition, and images_pkey.
WITH pointed AS MATERIALIZED (
    SELECT DISTINCT image_id AS id FROM frames WHERE id >= :first AND id <= :last AND image_id IS NOT NULL
), free AS (
    SELECT i.id FROM images AS i
    WHERE i.id = ANY (ARRAY (SELECT id FROM pointed)) AND i.deleted_at IS NULL
    FOR UPDATE SKIP LOCKED
)
SELECT (SELECT count(*) FROM images WHERE id = ANY (ARRAY (SELECT id FROM pointed)) AND deleted_at IS NULL) AS there,
       ARRAY (SELECT id FROM free) AS free
