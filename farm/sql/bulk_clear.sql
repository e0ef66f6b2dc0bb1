-- Remove the last :n frames of an upload's job, with their names; hold, number and counts go down by what they were. The
-- last of them take the job along, in bulk_gone.sql. Nobody else touches these rows: the job is staged, and its upload
-- locked. Reads the keys of frames and frame_names.
WITH going AS MATERIALIZED (
    SELECT f.id, f.index, f.status, f.quantity, f.price_id
    FROM frames AS f
    WHERE f.id > CAST(:job AS uuid) AND f.id <= last_frame_id(CAST(:job AS uuid))
    ORDER BY f.id DESC
    LIMIT :n
), gone AS (
    DELETE FROM frames AS f
    WHERE f.id >= (SELECT id FROM going ORDER BY id LIMIT 1) AND f.id <= (SELECT id FROM going ORDER BY id DESC LIMIT 1)
), named AS (
    DELETE FROM frame_names WHERE job_id = :job AND index >= (SELECT min(index) FROM going)
), total AS MATERIALIZED (
    SELECT count(*)::integer AS frames, count(*) FILTER (WHERE g.status = 'waiting')::integer AS waiting,
           coalesce(sum(g.quantity * p.rate * CASE p.method WHEN 'mpx_step' THEN 0.00000095367431640625 ELSE 1 END), 0)
               AS held
    FROM going AS g JOIN prices AS p ON p.id = g.price_id
), counted AS (
    INSERT INTO counts (job_id, waiting)
    SELECT :job, -t.waiting FROM total AS t JOIN jobs AS j ON j.id = :job WHERE t.waiting > 0 AND j.frames > t.frames
), lowered AS (
    UPDATE jobs AS j SET frames = j.frames - t.frames, held = j.held - t.held
    FROM total AS t
    WHERE j.id = :job AND j.frames > t.frames
), left_over AS (
    UPDATE bulk_uploads AS u SET stored = u.stored - t.frames FROM total AS t WHERE u.id = :job
)
SELECT t.frames, NOT EXISTS (SELECT FROM jobs AS j WHERE j.id = :job AND j.frames > t.frames) AS over FROM total AS t
