-- Admit a job: its row with the hold, its places in lanes, its distinct keys, its idempotency key and the event, in
-- one statement. The frames follow by COPY, the lanes by open_lanes.sql.
WITH job AS (
    INSERT INTO jobs (id, account_id, api_key_id, name, status, priority, runnable, frames, currency, quoted, held,
                      rerender_of, start_after, deadline, on_late, max_parallel, waits, follows, proof)
    VALUES (:job_id, :account_id, :api_key_id, :name, 'active', :priority, NOT CAST(:waits AS boolean), :frames, :currency,
            :quoted, :quoted, CAST(:rerender_of AS uuid), CAST(:start_after AS timestamptz),
            CAST(:deadline AS timestamptz), CAST(:on_late AS text), CAST(:max_parallel AS integer), :waits, :follows,
            CAST(:proof AS integer))
), lane AS (
    INSERT INTO job_lanes (job_id, model, account_id, priority, runnable, open)
    SELECT CAST(:job_id AS uuid), model, CAST(:account_id AS uuid), CAST(:priority AS smallint),
           NOT CAST(:waits AS boolean), bool_or(open)
    FROM unnest(CAST(:models AS text[]), CAST(:open AS boolean[])) AS m (model, open)
    GROUP BY model
), key AS (
    INSERT INTO job_keys (job_id, key_no, model, account_id, shape_key, call_key, pixels, open, reuse_price_id, rest)
    SELECT :job_id, k.no - 1, k.model, :account_id, k.shape_key, k.call_key, k.pixels, k.open, k.reuse_price_id, k.rest
    FROM unnest(CAST(:models AS text[]), CAST(:shape_keys AS text[]), CAST(:call_keys AS text[]),
                CAST(:pixels AS integer[]), CAST(:open AS boolean[]), CAST(:reuse_price_ids AS integer[]),
                CAST(:rests AS boolean[]))
         WITH ORDINALITY AS k (model, shape_key, call_key, pixels, open, reuse_price_id, rest, no)
), once AS (
    INSERT INTO idempotency_keys (account_id, key, body_sha256, job_id)
    SELECT :account_id, CAST(:idempotency_key AS text), :body_sha256, :job_id
    WHERE CAST(:idempotency_key AS text) IS NOT NULL
)
INSERT INTO outbox (account_id, job_id, kind, data)
VALUES (:account_id, :job_id, 'job.accepted',
        jsonb_build_object('frames', CAST(:frames AS integer), 'priority', CAST(:priority AS smallint)))
