-- Models with runnable work, how urgent it is, and how many workers that serve them hold no pack; what one claimed before
-- it was started again is not in its hands any more, and what is off the device does not keep it busy. One that is sick, or
-- cannot load the model, is not woken for it until it may try again: it would claim nothing, once a second.
SELECT l.model, max(l.priority) AS priority, w.idle
FROM lanes AS l
JOIN LATERAL (
    SELECT count(*) AS idle FROM workers AS w
    WHERE l.model = ANY (w.models) AND w.state = 'up'
      AND w.seen_at > clock_timestamp() - make_interval(secs => :lost_s)
      AND NOT EXISTS (SELECT FROM packs AS p WHERE p.worker = w.id AND p.closed_at IS NULL
                      AND p.lease_until > clock_timestamp() AND p.claimed_at >= w.started_at AND p.gpu_ms IS NULL)
      AND NOT EXISTS (SELECT FROM ailments AS a WHERE a.worker = w.id AND a.model IN ('', l.model)
                      AND a.until > clock_timestamp())
) AS w ON w.idle > 0
WHERE l.active AND (CAST(:models AS text[]) IS NULL OR l.model = ANY (CAST(:models AS text[])))
GROUP BY l.model, w.idle
