-- The ledger of nodes' lives, which may be read while it is written:  sqlite3 -readonly -header ledger.sqlite3 < ledger.sql
-- The last word on every life. log_e_max is the natural logarithm of the largest e-value: 6.9 and more is fraud.
SELECT public_key, preset, build, max(seq) AS entry, count(*) AS audits, sum(nonces) AS nonces, verdict,
       round(log_e_max, 2) AS log_e_max
FROM evidence GROUP BY public_key, digest, build, preset ORDER BY log_e_max DESC;

-- Audits of the last day.
SELECT datetime(time, 'unixepoch') AS time, public_key, block_hash, nonces, excluded, verdict
FROM evidence WHERE time > unixepoch('now', '-1 day') ORDER BY seq;

-- The head: publish it where you cannot take it back.
SELECT count, hash FROM ledger;
