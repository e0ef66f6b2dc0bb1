-- Put up to :n unstated rows of an account's usage, from before :until, on their lines of :statement.
--
-- By a flag, never by an id: ids and times become visible in any order, and what commits later is taken by the next
-- batch or the next month. The caller holds the account's advisory lock, so that nobody else takes these rows.
-- Reads usage_unstated_idx, and usage's keys.
WITH due AS MATERIALIZED (
    SELECT frame_id, entry, model, method, currency, rate, quantity, amount, at
    FROM usage
    WHERE account_id = :account_id AND statement_line IS NULL AND at < :until
    ORDER BY at
    LIMIT :n
), line AS (
    INSERT INTO statement_lines AS l
        (statement_id, account_id, currency, model, method, rate, frames, reversed, late, quantity, exact)
    SELECT :statement_id, :account_id, currency, model, method, rate, count(*) FILTER (WHERE entry = 0),
           count(*) FILTER (WHERE entry = 1), count(*) FILTER (WHERE at < :since),
           sum((1 - 2 * entry) * quantity), sum(amount)
    FROM due
    GROUP BY currency, model, method, rate
    ON CONFLICT (statement_id, model, method, rate) DO UPDATE
    SET frames = l.frames + excluded.frames, reversed = l.reversed + excluded.reversed, late = l.late + excluded.late,
        quantity = l.quantity + excluded.quantity, exact = l.exact + excluded.exact
    RETURNING l.id, l.currency, l.model, l.method, l.rate
), placed AS MATERIALIZED (
    SELECT d.frame_id, d.entry, l.id AS line
    FROM due AS d JOIN line AS l USING (currency, model, method, rate)
    ORDER BY d.frame_id -- rows of usage and their key are then written in the order they lie in
), stated AS (
    UPDATE usage AS u
    SET statement_line = p.line
    FROM placed AS p
    WHERE u.frame_id = ANY (ARRAY (SELECT frame_id FROM due))
      AND u.frame_id >= (SELECT frame_id FROM due ORDER BY frame_id LIMIT 1)
      AND u.frame_id <= (SELECT frame_id FROM due ORDER BY frame_id DESC LIMIT 1)
      AND u.frame_id = p.frame_id AND u.entry = p.entry
    RETURNING 1
)
SELECT (SELECT count(*) FROM due) AS due, (SELECT count(*) FROM stated) AS stated
