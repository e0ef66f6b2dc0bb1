-- The same checks as before, each statement of them only where its rows are there: a claim opened the indexes of every
-- partition of usage, and settling those of packs, for nothing.
CREATE OR REPLACE FUNCTION frames_agree() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    any_done boolean;
    any_claimed boolean;
    wrong record;
BEGIN
    SELECT bool_or(c.status = 'done'), bool_or(c.status = 'claimed') INTO any_done, any_claimed FROM changed AS c;
    IF any_done THEN
        SELECT * INTO wrong
        FROM (
            SELECT c.id, CASE
                WHEN (SELECT u.entry FROM usage AS u WHERE u.frame_id = c.id AND u.entry = 0) IS NULL
                    THEN 'done without a charge'
                WHEN (SELECT i.account_id FROM images AS i WHERE i.id = c.image_id) IS DISTINCT FROM c.account_id
                    THEN 'done with an image that is not its account''s' END AS fault
            FROM changed AS c
            WHERE c.status = 'done'
        ) AS f
        WHERE f.fault IS NOT NULL
        LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'frame % is %', wrong.id, wrong.fault USING ERRCODE = 'integrity_constraint_violation';
        END IF;
    END IF;
    IF any_claimed THEN
        SELECT c.id INTO wrong
        FROM changed AS c
        WHERE c.status = 'claimed'
          AND (SELECT p.id FROM packs AS p WHERE p.id = c.pack_id AND p.closed_at IS NULL) IS NULL
        LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'frame % is claimed by a pack that is not open', wrong.id
                USING ERRCODE = 'integrity_constraint_violation';
        END IF;
    END IF;
    RETURN NULL;
END $$;
