-- What a request of this key was answered. One row or none, by the primary key.
SELECT body_sha256, status, headers, answer
FROM kept_answers
WHERE account_id = :account_id AND operation = :operation AND key = :key
