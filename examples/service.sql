-- The database of a service, which may be read while it runs:  sqlite3 -readonly -header data/service.sqlite3 < service.sql
-- Rounds with their rates, the newest first.
SELECT id, block_hash, public_key, preset, checked, valid, round(1.0 * valid / max(checked, 1), 4) AS rate,
       round(checked / max(seconds, 0.001), 1) AS nonces_per_second
FROM rounds ORDER BY id DESC;

-- The smallest distances of every round.
SELECT round_id, nonce, distance FROM (
    SELECT round_id, nonce, distance, row_number() OVER (PARTITION BY round_id ORDER BY distance) AS place
    FROM records WHERE distance IS NOT NULL
) WHERE place <= 3 ORDER BY round_id, place;

-- Callbacks by their fate, and how long the delivered ones took.
SELECT status, count(*) AS callbacks, sum(nonces) AS nonces, max(attempts) AS attempts,
       round(avg(finished_at - created_at), 3) AS seconds
FROM outbox GROUP BY status;

-- Nonces whose received distance was farthest from the recomputed one.
SELECT public_key, nonce, received, computed, abs(received - computed) AS residual
FROM checks ORDER BY residual DESC LIMIT 10;
