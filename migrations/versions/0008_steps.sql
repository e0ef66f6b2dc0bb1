-- Packs in a step engine: frames that share a shape are claimed together, and several packs are in flight at once.
-- Expand only; runs on Postgres 15 to 18.

CREATE INDEX job_keys_shape_idx ON job_keys (shape_key, job_id, key_no) WHERE open;

-- Other packs may have been on the device beside it: what took it down is then nobody's blame, also if it had one frame.
ALTER TABLE packs ADD COLUMN shared boolean NOT NULL DEFAULT false;
