-- Count the images that the next :n events tell of, by model. Events are numbered after commit, without a gap, so that
-- whoever goes on after the last number misses none. The caller holds the sweep's advisory lock.
-- Reads events_pkey and usage's key.
WITH span AS MATERIALIZED (
    SELECT number, kind, frame_id FROM events
    WHERE number > (SELECT number FROM delivered_upto)
    ORDER BY number
    LIMIT :n
), done AS MATERIALIZED (
    SELECT frame_id FROM span WHERE kind = 'frame.done'
), told AS ( -- = ANY, not joined: the partition was looked for once a frame
    SELECT u.model, count(*) AS images
    FROM usage AS u
    WHERE u.frame_id = ANY (ARRAY (SELECT frame_id FROM done)) AND u.entry = 0
      AND u.frame_id >= (SELECT frame_id FROM done ORDER BY frame_id LIMIT 1)
      AND u.frame_id <= (SELECT frame_id FROM done ORDER BY frame_id DESC LIMIT 1)
    GROUP BY u.model
), added AS (
    INSERT INTO delivered AS d (model, images)
    SELECT model, images FROM told
    ON CONFLICT (model) DO UPDATE SET images = d.images + excluded.images
), moved AS (
    UPDATE delivered_upto SET number = (SELECT max(number) FROM span) WHERE EXISTS (SELECT FROM span)
)
SELECT count(*) FROM span
