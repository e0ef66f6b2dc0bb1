-- Claim one pack: the head frame and its kin, up to :frames of them. First from the head's own lane, then from
-- any runnable job with the same key in a class above :above, oldest first; a suspect alone. Both searches look at
-- 256 jobs at most: if they find nothing (its job was paused since, or stands behind that many), the head frame goes
-- alone. A model that packs by shape is claimed with shape_key in place of k.call_key, which farm/queue.py puts there.
--
-- SKIP LOCKED: two workers neither wait for nor get the same frame. Lanes are charged in the order of their keys:
-- in no order that gave 10 deadlocks in 20,000 frames (DESIGN.md). By a function, with a snapshot of its own for each:
-- where a rival charged one meanwhile, this whole statement was set up again to check its row, twice.
-- UPDATE by id = ANY(ARRAY(…)): as a join the planner guessed thousands of rows and read the whole table.
-- The bounds on id keep it within the partitions at hand. Reads job_lanes_head_idx, job_keys_call_idx,
-- frames_queued_idx. emptied: this took the last queued frame of its key.
WITH own AS MATERIALIZED (
    SELECT f.id, f.account_id, j.priority, f.work
    FROM (
        SELECT jl.priority, k.job_id, k.key_no
        FROM job_lanes AS jl
        JOIN job_keys AS k ON k.job_id = jl.job_id AND k.call_key = :call_key AND k.open
        WHERE jl.model = :model AND jl.priority = :priority AND jl.account_id = :account_id
          AND jl.runnable AND jl.open
        ORDER BY jl.job_id
        LIMIT 256
    ) AS j
    CROSS JOIN LATERAL (
        SELECT f.id, f.account_id, f.work
        FROM frames AS f
        WHERE f.job_id = j.job_id AND f.key_no = j.key_no AND f.status = 'queued' AND NOT f.suspect
          AND f.id > j.job_id AND f.id <= last_frame_id(j.job_id)
        LIMIT :frames
        FOR UPDATE SKIP LOCKED
    ) AS f
    WHERE NOT :alone
    LIMIT :frames
), others AS MATERIALIZED (
    SELECT f.id, f.account_id, j.priority, f.work
    FROM (
        SELECT jl.priority, k.job_id, k.key_no
        FROM job_keys AS k
        JOIN job_lanes AS jl ON jl.job_id = k.job_id AND jl.model = k.model AND jl.runnable
        WHERE k.call_key = :call_key AND k.open
          AND (jl.account_id, jl.priority) <> (:account_id, :priority) AND jl.priority > CAST(:above AS smallint)
        ORDER BY k.job_id
        LIMIT 256
    ) AS j
    CROSS JOIN LATERAL (
        SELECT f.id, f.account_id, f.work
        FROM frames AS f
        WHERE f.job_id = j.job_id AND f.key_no = j.key_no AND f.status = 'queued' AND NOT f.suspect
          AND f.id > j.job_id AND f.id <= last_frame_id(j.job_id)
        LIMIT :frames
        FOR UPDATE SKIP LOCKED
    ) AS f
    WHERE NOT :alone
    LIMIT greatest(0, :frames - (SELECT count(*) FROM own))
), picked AS MATERIALIZED (
    SELECT id, account_id, priority, work FROM own
    UNION ALL
    SELECT id, account_id, priority, work FROM others
    UNION ALL
    SELECT CAST(:frame_id AS uuid), CAST(:account_id AS uuid), CAST(:priority AS smallint), CAST(:work AS bigint)
    WHERE :alone OR NOT EXISTS (SELECT FROM own) AND NOT EXISTS (SELECT FROM others)
), pack AS (
    INSERT INTO packs (worker, model, call_key, priority, frames, work, lease_until, engine, shared)
    SELECT :worker, :model, :call_key, :priority, count(*), sum(work),
           clock_timestamp() + make_interval(secs => :lease_s), CAST(:engine AS jsonb), :shared
    FROM picked
    RETURNING id, lease_until
), taken AS (
    UPDATE frames AS f
    SET status = 'claimed', pack_id = (SELECT id FROM pack)
    WHERE f.id = ANY (ARRAY (SELECT id FROM picked))
      AND f.id >= (SELECT id FROM picked ORDER BY id LIMIT 1)
      AND f.id <= (SELECT id FROM picked ORDER BY id DESC LIMIT 1)
    RETURNING f.id, f.job_id, f.index AS frame_index, f.key_no, f.account_id, f.seed, f.work,
              CAST(f.spec AS text) AS spec
), cost AS (
    SELECT p.priority, p.account_id, CAST(sum(p.work) / a.weight AS bigint) AS served
    FROM picked AS p
    JOIN accounts AS a ON a.id = p.account_id
    GROUP BY p.priority, p.account_id, a.weight
), charged AS MATERIALIZED (
    SELECT charge_lanes(:model, array_agg(priority ORDER BY priority, account_id),
                        array_agg(account_id ORDER BY priority, account_id),
                        array_agg(served ORDER BY priority, account_id))
    FROM cost
), emptied AS MATERIALIZED (
    SELECT k.job_id, k.key_no
    FROM (SELECT DISTINCT job_id, key_no FROM taken) AS k
    WHERE NOT EXISTS (
        SELECT FROM frames AS f
        WHERE f.job_id = k.job_id AND f.key_no = k.key_no AND f.status = 'queued'
          AND f.id > k.job_id AND f.id <= last_frame_id(k.job_id)
          AND f.id <> ALL (ARRAY (SELECT id FROM picked))
    )
)
SELECT pack.id AS pack_id, pack.lease_until, t.*, p.priority, a.prompt_in_images AS prompt,
       (t.job_id, t.key_no) IN (SELECT job_id, key_no FROM emptied) AS emptied
FROM taken AS t CROSS JOIN pack CROSS JOIN charged JOIN picked AS p ON p.id = t.id
JOIN accounts AS a ON a.id = t.account_id
ORDER BY t.id
