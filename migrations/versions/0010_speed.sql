-- What rows of frames, usage and images must agree on is checked once a statement, not once a row: foreign keys and row
-- triggers ran some 110 statements for a pack of 16, and its key locks on one account and one price met those of
-- every other worker. All of it holds still, and a little more; at the end of the statement, no more at commit.
-- The lookups are scalar subqueries: each is one probe of a key, whatever number of rows a plan was made for.

ALTER TABLE usage
    DROP CONSTRAINT usage_account_id_fkey,
    DROP CONSTRAINT usage_price_id_method_currency_rate_fkey;
ALTER TABLE images DROP CONSTRAINT images_account_id_fkey;
ALTER TABLE frames
    DROP CONSTRAINT frames_pack_id_fkey,
    DROP CONSTRAINT frames_image_id_fkey;

DROP TRIGGER frames_charged ON frames;
DROP FUNCTION done_is_charged();

CREATE TRIGGER frames_begin AFTER INSERT ON frames FOR EACH ROW WHEN (NEW.status IN ('done', 'claimed'))
    EXECUTE FUNCTION refuse('a frame begins as queued, waiting or staged');

-- Done needs a charge and an image of the account's, claimed an open pack.
CREATE FUNCTION frames_agree() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    wrong record;
BEGIN
    SELECT * INTO wrong
    FROM (
        SELECT c.id, CASE c.status
            WHEN 'done' THEN CASE
                WHEN (SELECT u.entry FROM usage AS u WHERE u.frame_id = c.id AND u.entry = 0) IS NULL
                    THEN 'done without a charge'
                WHEN (SELECT i.account_id FROM images AS i WHERE i.id = c.image_id) IS DISTINCT FROM c.account_id
                    THEN 'done with an image that is not its account''s' END
            WHEN 'claimed' THEN CASE
                WHEN (SELECT p.id FROM packs AS p WHERE p.id = c.pack_id AND p.closed_at IS NULL) IS NULL
                    THEN 'claimed by a pack that is not open' END
            END AS fault
        FROM changed AS c
        WHERE c.status IN ('done', 'claimed')
    ) AS f
    WHERE f.fault IS NOT NULL
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'frame % is %', wrong.id, wrong.fault USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER frames_agree AFTER UPDATE ON frames REFERENCING NEW TABLE AS changed FOR EACH STATEMENT
    EXECUTE FUNCTION frames_agree();

DROP TRIGGER usage_done ON usage;
DROP FUNCTION charge_is_done();

CREATE FUNCTION usage_agrees() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    wrong record;
BEGIN
    SELECT * INTO wrong
    FROM (
        SELECT c.frame_id, CASE
            WHEN (
                SELECT f.status = 'done' AND f.account_id = c.account_id
                       AND CASE WHEN f.reused
                           THEN c.method = 'reuse' AND c.quantity = 1 AND c.price_id = (
                               SELECT k.reuse_price_id FROM job_keys AS k
                               WHERE k.job_id = f.job_id AND k.key_no = f.key_no)
                           ELSE c.method <> 'reuse' AND c.quantity = f.quantity AND c.price_id = f.price_id END
                FROM frames AS f WHERE f.id = c.frame_id
            ) IS NOT TRUE THEN 'which is not done at that price'
            WHEN (
                SELECT (p.method, p.currency, p.rate) = (c.method, c.currency, c.rate)
                FROM prices AS p WHERE p.id = c.price_id
            ) IS NOT TRUE THEN 'at another rate than its price''s' END AS fault
        FROM charged AS c
    ) AS f
    WHERE f.fault IS NOT NULL
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'charge for frame %, %', wrong.frame_id, wrong.fault
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER usage_agrees AFTER INSERT ON usage REFERENCING NEW TABLE AS charged FOR EACH STATEMENT
    EXECUTE FUNCTION usage_agrees();
