-- The job that was accepted under an idempotency key. One row or none, by the primary key.
SELECT job_id, body_sha256 FROM idempotency_keys WHERE account_id = :account_id AND key = :key
