ALTER TABLE clients
    ADD COLUMN auth_key jsonb,
    ADD COLUMN default_audience text[] DEFAULT '{}' NOT NULL,
    ADD COLUMN audiences text[] DEFAULT '{}' NOT NULL,
    ADD COLUMN scopes text[] DEFAULT '{}' NOT NULL,
    ADD COLUMN groups text[] DEFAULT '{}' NOT NULL;

ALTER TABLE requests DROP CONSTRAINT requests_kind_check;
ALTER TABLE requests ADD CONSTRAINT requests_kind_check
    CHECK (kind IN ('mint', 'fill_job', 'renew', 'token', 'exchange', 'refresh'));

CREATE TABLE families (
    family_id uuid NOT NULL,
    client_id integer NOT NULL,
    subject_jti uuid NOT NULL,
    subject_client text NOT NULL,
    on_behalf_of text NOT NULL,
    activity text NOT NULL,
    sub text NOT NULL,
    act jsonb,
    scope text NOT NULL,
    audience text[] NOT NULL,
    rule text NOT NULL,
    ends_at timestamptz NOT NULL,
    generation integer NOT NULL,
    rotated_at timestamptz NOT NULL,
    revoked_at timestamptz,
    CONSTRAINT families_pkey PRIMARY KEY (family_id),
    CONSTRAINT families_client_id_fkey FOREIGN KEY (client_id) REFERENCES clients (client_id),
    CONSTRAINT families_generation_check CHECK (generation > 0)
);
CREATE INDEX families_ends_at_idx ON families (ends_at);

CREATE TABLE assertions (
    client_id integer NOT NULL,
    assertion_id text NOT NULL,
    expires_at timestamptz NOT NULL,
    CONSTRAINT assertions_pkey PRIMARY KEY (client_id, assertion_id)
);
