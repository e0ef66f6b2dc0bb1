-- Control: when a job may be handed out, by when it has to be done, and how much of it at once.

ALTER TABLE jobs
    ADD COLUMN start_after  timestamptz,                           -- not handed out before
    ADD COLUMN deadline     timestamptz,                           -- what is not done by then fails, or is less urgent
    ADD COLUMN on_late      text CHECK (on_late IN ('fail', 'demote')),
    ADD COLUMN late_at      timestamptz,                           -- when that was done
    ADD COLUMN max_parallel integer CHECK (max_parallel > 0),      -- frames queued and claimed at once; the others are staged
    ADD COLUMN waits        boolean NOT NULL DEFAULT false,        -- its turn has not come: the sweep ends that
    ADD COLUMN follows      boolean NOT NULL DEFAULT false,        -- job_after names jobs it comes after
    ADD CONSTRAINT jobs_deadline_check CHECK ((deadline IS NULL) = (on_late IS NULL)),
    ADD CONSTRAINT jobs_late_at_check CHECK (late_at IS NULL OR deadline IS NOT NULL),
    DROP CONSTRAINT jobs_status_check,
    ADD CONSTRAINT jobs_status_check
        CHECK (status IN ('staged', 'active', 'paused', 'late', 'cancelled', 'finished')),
    ADD CONSTRAINT jobs_late_check CHECK (status <> 'late' OR late_at IS NOT NULL AND on_late = 'fail'),
    DROP CONSTRAINT jobs_check, -- runnable = (status = 'active')
    ADD CONSTRAINT jobs_check CHECK (runnable = (status = 'active' AND NOT waits));
CREATE INDEX jobs_waits_idx ON jobs (id) WHERE waits AND ended_at IS NULL;
CREATE INDEX jobs_deadline_idx ON jobs (deadline) WHERE deadline IS NOT NULL AND late_at IS NULL AND ended_at IS NULL;
CREATE INDEX jobs_late_idx ON jobs (id) WHERE status = 'late' AND ended_at IS NULL;
CREATE INDEX jobs_capped_idx ON jobs (id) WHERE max_parallel IS NOT NULL AND ended_at IS NULL;

-- Which jobs have to end before one is handed out. They were there before it: nothing can wait for itself.
CREATE TABLE job_after (
    job_id      uuid        NOT NULL REFERENCES jobs ON DELETE CASCADE,
    after_id    uuid        NOT NULL REFERENCES jobs ON DELETE CASCADE,
    account_id  uuid        NOT NULL REFERENCES accounts,
    ok          boolean     NOT NULL, -- every frame of it has to be done
    PRIMARY KEY (job_id, after_id),
    CHECK (job_id <> after_id)
);
CREATE INDEX job_after_after_idx ON job_after (after_id);

CREATE FUNCTION after_own_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM jobs WHERE id IN (NEW.job_id, NEW.after_id) AND account_id <> NEW.account_id) THEN
        RAISE EXCEPTION 'job % cannot wait for job %, which is another account''s', NEW.job_id, NEW.after_id
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER job_after_own AFTER INSERT OR UPDATE ON job_after FOR EACH ROW EXECUTE FUNCTION after_own_jobs();

-- Frames beyond a job's max_parallel, in their order; and those of them that equal frames of the job wait for.
CREATE INDEX frames_staged_idx ON frames (job_id, id) WHERE status = 'staged';
CREATE INDEX frames_staged_equal_idx ON frames (account_id, fingerprint) WHERE seeded AND status = 'staged';
