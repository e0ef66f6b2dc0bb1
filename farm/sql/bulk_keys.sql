-- Store the keys that a part of an upload brings, with their places in lanes, and open those of its keys that were closed
-- until now. Its job is not runnable: nobody else looks at these rows.
WITH lane AS (
    INSERT INTO job_lanes (job_id, model, account_id, priority, runnable)
    SELECT DISTINCT CAST(:job_id AS uuid), m.model, CAST(:account_id AS uuid), CAST(:priority AS smallint), false
    FROM unnest(CAST(:models AS text[])) AS m (model)
    ON CONFLICT (job_id, model) DO NOTHING
), key AS (
    INSERT INTO job_keys (job_id, key_no, model, account_id, shape_key, call_key, pixels, open, reuse_price_id, rest)
    SELECT :job_id, k.key_no, k.model, :account_id, k.shape_key, k.call_key, k.pixels, k.open, k.reuse_price_id, k.rest
    FROM unnest(CAST(:key_nos AS integer[]), CAST(:models AS text[]), CAST(:shape_keys AS text[]),
                CAST(:call_keys AS text[]), CAST(:pixels AS integer[]), CAST(:open AS boolean[]),
                CAST(:reuse_price_ids AS integer[]), CAST(:rests AS boolean[]))
         AS k (key_no, model, shape_key, call_key, pixels, open, reuse_price_id, rest)
)
UPDATE job_keys SET open = true
WHERE job_id = :job_id AND key_no = ANY (CAST(:opened AS integer[]))
