-- Up to when every row of usage is visible: no transaction that may still commit one began before. A minute is taken
-- off, for one that just began and is not shown yet.
SELECT least(clock_timestamp(), min(xact_start)) - interval '1 minute'
FROM pg_stat_activity
WHERE datname = current_database() AND xact_start IS NOT NULL AND pid <> pg_backend_pid()
  AND backend_type = 'client backend'
