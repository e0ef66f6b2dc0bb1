-- Store some frames of a job that submit.sql admitted. Many go by COPY: this takes one round trip, and that three.
INSERT INTO frames (id, job_id, index, key_no, account_id, status, seed, work, quantity, price_id, fingerprint, spec, seeded)
SELECT id, :job_id, index, key_no, :account_id, status, seed, work, quantity, price_id, fingerprint, spec, seeded
FROM unnest(CAST(:ids AS uuid[]), CAST(:indices AS integer[]), CAST(:key_nos AS integer[]), CAST(:statuses AS text[]),
            CAST(:seeds AS bigint[]), CAST(:works AS bigint[]), CAST(:quantities AS bigint[]),
            CAST(:price_ids AS integer[]), CAST(:fingerprints AS bytea[]), CAST(:specs AS jsonb[]),
            CAST(:seededs AS boolean[]))
     AS f (id, index, key_no, status, seed, work, quantity, price_id, fingerprint, spec, seeded)
ORDER BY id
