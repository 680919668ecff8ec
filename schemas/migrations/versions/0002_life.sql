ALTER TABLE issuers ADD COLUMN secrets_key bytea;
ALTER TABLE clients ADD COLUMN old_secret_hash bytea, ADD COLUMN old_secret_until timestamptz;
ALTER TABLE clients ADD CONSTRAINT clients_old_secret_check
    CHECK ((old_secret_hash IS NULL) = (old_secret_until IS NULL));

CREATE TABLE rules (
    rule_id integer GENERATED ALWAYS AS IDENTITY,
    digest bytea NOT NULL,
    route text NOT NULL,
    storage text NOT NULL,
    operations text[] NOT NULL,
    steps jsonb NOT NULL,
    created_at timestamptz DEFAULT now() NOT NULL,
    CONSTRAINT rules_pkey PRIMARY KEY (rule_id),
    CONSTRAINT rules_digest_check CHECK (octet_length(digest) = 32),
    CONSTRAINT rules_digest_key UNIQUE (digest)
);

CREATE TABLE jobs (
    job_id uuid NOT NULL,
    request_id uuid NOT NULL,
    client_id integer NOT NULL,
    files smallint[] NOT NULL,
    file_ids bigint[] DEFAULT '{}' NOT NULL,
    reported_at timestamptz DEFAULT now() NOT NULL,
    CONSTRAINT jobs_pkey PRIMARY KEY (job_id)
);
CREATE INDEX jobs_reported_at_idx ON jobs (reported_at);
CREATE INDEX jobs_request_id_idx ON jobs (request_id);

ALTER TABLE requests ADD COLUMN renews uuid;
ALTER TABLE requests DROP CONSTRAINT requests_kind_check;
ALTER TABLE requests ADD CONSTRAINT requests_kind_check CHECK (kind IN ('mint', 'fill_job', 'renew'));
ALTER TABLE requests ADD CONSTRAINT requests_renews_check CHECK ((kind = 'renew') = (renews IS NOT NULL));

ALTER TABLE tokens ADD COLUMN rule_id integer;
CREATE INDEX tokens_external_id_idx ON tokens (hashtextextended(external_id, 0)) WHERE external_id <> '';

CREATE TABLE token_states (
    jti uuid NOT NULL,
    active_at timestamptz,
    ended_at timestamptz,
    state token_state NOT NULL,
    CONSTRAINT token_states_pkey PRIMARY KEY (jti),
    CONSTRAINT token_states_state_check CHECK (CASE state
        WHEN 'active' THEN active_at IS NOT NULL AND ended_at IS NULL
        WHEN 'finished' THEN ended_at IS NOT NULL
        WHEN 'cancelled' THEN ended_at IS NOT NULL
        ELSE false END)
) PARTITION BY RANGE (jti);
