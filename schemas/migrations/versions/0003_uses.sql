CREATE TABLE uses (
    use_id uuid NOT NULL,
    jti uuid NOT NULL,
    request_id uuid NOT NULL,
    path_hash bigint NOT NULL,
    client_id integer NOT NULL,
    side token_side NOT NULL,
    file smallint NOT NULL,
    "position" smallint NOT NULL,
    path text NOT NULL,
    external_id text NOT NULL,
    CONSTRAINT uses_pkey PRIMARY KEY (use_id)
) PARTITION BY RANGE (use_id);
CREATE INDEX uses_jti_idx ON uses (jti);
CREATE INDEX uses_path_hash_idx ON uses (path_hash);
CREATE INDEX uses_external_id_idx ON uses (hashtextextended(external_id, 0)) WHERE external_id <> '';

ALTER TABLE requests ADD COLUMN all_or_nothing boolean DEFAULT false NOT NULL;
