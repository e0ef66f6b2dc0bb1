-- Count the images that the next :n events tell of, by model. Events are numbered after commit, without a gap, so that
-- whoever goes on after the last number misses none. The caller holds the sweep's advisory lock.
-- Reads events_pkey and usage's key.
WITH span AS MATERIALIZED (
    SELECT number, kind, frame_id FROM events
    WHERE number > (SELECT number FROM delivered_upto)
    ORDER BY number
    LIMIT :n
), told AS (
    SELECT u.model, count(*) AS images
    FROM span AS s JOIN usage AS u ON u.frame_id = s.frame_id AND u.entry = 0
    WHERE s.kind = 'frame.done'
    GROUP BY u.model
), added AS (
    INSERT INTO delivered AS d (model, images)
    SELECT model, images FROM told
    ON CONFLICT (model) DO UPDATE SET images = d.images + excluded.images
), moved AS (
    UPDATE delivered_upto SET number = (SELECT max(number) FROM span) WHERE EXISTS (SELECT FROM span)
)
SELECT count(*) FROM span
