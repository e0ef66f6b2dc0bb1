-- Wait for who works on the same request under the same idempotency key: until that transaction ends, or five seconds.
-- What is read next, in a statement of its own, has a snapshot younger than the lock.
SELECT set_config('lock_timeout', '5s', true) AS before, pg_advisory_xact_lock(hashtextextended(:name, 0)) IS NOT NULL,
       set_config('lock_timeout', '0', true) AS after
