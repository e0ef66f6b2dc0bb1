-- Remove the job of an upload whose frames are all gone. Its keys, lanes, counts and inputs go with it.
DELETE FROM jobs WHERE id = :job AND status = 'staged'
