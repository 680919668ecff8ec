DROP INDEX signing_keys_one_active_idx;
CREATE UNIQUE INDEX signing_keys_one_active_idx ON signing_keys (vo, algorithm) WHERE state = 'active';
