-- Find the head frame: of the most urgent class the lane served least, of that lane the oldest job's first
-- queued frame. A lane unserved for the ageing time comes before every class, if :ageing allows it. Only classes
-- above :above; suspects only with :suspects. Only the first :lanes lanes of that order are looked at, all of them
-- where it is NULL: nine in ten are never reached, and sorting them took most of the time. Among those so near their
-- turn, and of one class, lanes of the model :warm come first.
--
-- The frame is locked (SKIP LOCKED: rivals take the next one), the lanes are only read: they are charged by
-- claim.sql, in the order of their keys. Jobs and keys are put in order before they are joined: a sort above the
-- lock took 32 jobs' frames from the rivals, and left them nothing. No ORDER BY inside a key: its index gives the
-- oldest first anyway, and a sort over partitions would read all of them. Reads lanes_active_idx,
-- job_lanes_head_idx, job_keys_open_idx, frames_queued_idx. last_frame_id() keeps the search within the job's own
-- partition.
WITH nearest AS MATERIALIZED (
    SELECT l.model, l.priority, l.account_id, l.aged, l.served, CASE WHEN l.aged THEN l.waiting_at END AS since
    FROM (
        SELECT *, :ageing AND waiting_at < clock_timestamp() - make_interval(secs => :ageing_s) AS aged
        FROM lanes
        WHERE active AND model = ANY (CAST(:models AS text[])) AND priority > CAST(:above AS smallint)
    ) AS l
    ORDER BY l.aged DESC, since, l.priority DESC, l.served, l.account_id, l.model
    LIMIT CAST(:lanes AS integer)
), ordered AS MATERIALIZED (
    SELECT model, priority, account_id, aged
    FROM nearest
    ORDER BY aged DESC, since, priority DESC, model IS DISTINCT FROM CAST(:warm AS text), served, account_id, model
)
SELECT set_config('synchronous_commit', 'off', true), -- a claim that a crash undoes was never made
       o.model, o.priority, o.account_id, o.aged,
       h.frame_id, h.suspect, h.call_key, h.shape_key, h.pixels, h.work
FROM ordered AS o
CROSS JOIN LATERAL (
    SELECT f.id AS frame_id, f.suspect, k.call_key, k.shape_key, k.pixels, f.work
    FROM (
        SELECT jl.job_id
        FROM job_lanes AS jl
        WHERE jl.model = o.model AND jl.priority = o.priority AND jl.account_id = o.account_id
          AND jl.runnable AND jl.open
        ORDER BY jl.job_id
    ) AS jl
    CROSS JOIN LATERAL (
        SELECT k.job_id, k.key_no, k.call_key, k.shape_key, k.pixels
        FROM job_keys AS k
        WHERE k.job_id = jl.job_id AND k.model = o.model AND k.open
        ORDER BY k.key_no
    ) AS k
    CROSS JOIN LATERAL (
        SELECT f.id, f.suspect, f.work
        FROM frames AS f
        WHERE f.job_id = k.job_id AND f.key_no = k.key_no AND f.status = 'queued'
          AND f.id > k.job_id AND f.id <= last_frame_id(k.job_id) AND (:suspects OR NOT f.suspect)
        LIMIT 1
        FOR UPDATE SKIP LOCKED
    ) AS f
    LIMIT 1
) AS h
LIMIT 1
