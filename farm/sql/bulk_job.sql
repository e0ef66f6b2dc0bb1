-- Add frames to a job that is being uploaded, and what they cost to its hold; the first time make it. By its key.
INSERT INTO jobs AS j (id, account_id, api_key_id, name, status, priority, runnable, frames, currency, quoted, held, proof)
VALUES (:job_id, :account_id, :api_key_id, :name, 'staged', :priority, false, :frames, :currency, :quoted, :quoted,
        CAST(:proof AS integer))
ON CONFLICT (id) DO UPDATE
SET frames = j.frames + excluded.frames, quoted = j.quoted + excluded.quoted, held = j.held + excluded.held
