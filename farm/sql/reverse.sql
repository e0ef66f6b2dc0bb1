-- Take back the charge of :frame_id: a reversing row of usage, with who did it and why. The frame stays done.
--
-- reversals' key lets one of two at once through; the other waits, and returns nothing. The job's charged amount goes
-- down by a delta, as it went up. Reads usage's key.
WITH charge AS MATERIALIZED (
    SELECT u.*, f.index FROM usage AS u JOIN frames AS f ON f.id = u.frame_id
    WHERE u.frame_id = :frame_id AND f.id = :frame_id AND u.entry = 0
), reason AS (
    INSERT INTO reversals (frame_id, account_id, api_key_id, reason)
    SELECT frame_id, account_id, :api_key_id, :reason FROM charge
    ON CONFLICT (frame_id) DO NOTHING
    RETURNING frame_id
), reversal AS (
    INSERT INTO usage (frame_id, entry, account_id, job_id, model, method, currency, price_id, rate, quantity, amount,
                       pack_id)
    SELECT c.frame_id, 1, c.account_id, c.job_id, c.model, c.method, c.currency, c.price_id, c.rate, c.quantity,
           -c.amount, c.pack_id
    FROM charge AS c JOIN reason AS r ON r.frame_id = c.frame_id
    RETURNING frame_id, account_id, job_id, currency, amount, at
), counted AS (
    INSERT INTO counts (job_id, charged)
    SELECT r.job_id, r.amount FROM reversal AS r JOIN jobs AS j ON j.id = r.job_id
), told AS (
    INSERT INTO outbox (account_id, job_id, frame_id, kind, data)
    SELECT r.account_id, r.job_id, r.frame_id, 'usage.reversed',
           jsonb_build_object('index', c.index, 'amount', trim_scale(r.amount)::text, 'reason', CAST(:reason AS text))
    FROM reversal AS r JOIN charge AS c ON c.frame_id = r.frame_id
)
SELECT c.account_id, c.currency, c.amount, r.at
FROM charge AS c LEFT JOIN reversal AS r ON r.frame_id = c.frame_id
