ALTER TABLE clients
    ADD COLUMN subject_token bytea,
    ADD COLUMN subject_provider text DEFAULT '' NOT NULL,
    ADD COLUMN subject_scope text DEFAULT '' NOT NULL,
    ADD COLUMN subject_expires_at timestamptz;

ALTER TABLE uses
    ADD COLUMN consumer text DEFAULT '' NOT NULL,
    ADD COLUMN queue text DEFAULT '' NOT NULL,
    ADD COLUMN instead_of uuid;
CREATE INDEX uses_instead_of_idx ON uses (instead_of) WHERE instead_of IS NOT NULL;

CREATE TABLE providers (
    name text NOT NULL,
    due_at timestamptz NOT NULL,
    failures integer DEFAULT 0 NOT NULL,
    pauses integer DEFAULT 0 NOT NULL,
    open_until timestamptz,
    probed_until timestamptz,
    documents jsonb,
    documents_at timestamptz,
    CONSTRAINT providers_pkey PRIMARY KEY (name)
);
CREATE TRIGGER bump_control AFTER INSERT OR DELETE OR UPDATE OF open_until ON providers
    FOR EACH STATEMENT EXECUTE FUNCTION bump_control();

CREATE TABLE managed (
    jti uuid NOT NULL,
    client_id integer NOT NULL,
    digest bytea NOT NULL,
    provider text NOT NULL,
    mode token_mode NOT NULL,
    state token_state NOT NULL,
    scope text NOT NULL,
    audience text[] NOT NULL,
    storage text NOT NULL,
    on_behalf_of text NOT NULL,
    activity text NOT NULL,
    fallback text[] NOT NULL,
    uses integer NOT NULL,
    cap_seconds integer NOT NULL,
    least_seconds integer NOT NULL,
    deadline timestamptz NOT NULL,
    lead_seconds integer,
    needed_at timestamptz,
    retry_at timestamptz,
    leased_until timestamptz,
    lease uuid,
    tries integer DEFAULT 0 NOT NULL,
    spent boolean DEFAULT false NOT NULL,
    subject bytea,
    refresh bytea,
    access bytea,
    expires_at timestamptz,
    granted_scope text DEFAULT '' NOT NULL,
    fts_token_id bigint,
    error jsonb,
    pushes boolean DEFAULT false NOT NULL,
    pushed_id bigint,
    pushing_until timestamptz,
    CONSTRAINT managed_pkey PRIMARY KEY (jti),
    CONSTRAINT managed_digest_check CHECK (octet_length(digest) = 32),
    CONSTRAINT managed_mode_check CHECK (mode <> 'mint'),
    CONSTRAINT managed_lead_check CHECK ((lead_seconds IS NULL) = (needed_at IS NULL)),
    CONSTRAINT managed_lease_check CHECK ((lease IS NULL) = (leased_until IS NULL)),
    CONSTRAINT managed_access_check CHECK ((access IS NULL) OR (expires_at IS NOT NULL)),
    CONSTRAINT managed_state_check CHECK (
        CASE state WHEN 'queued' THEN access IS NULL WHEN 'issued' THEN access IS NOT NULL
        WHEN 'failed' THEN lead_seconds IS NULL AND error IS NOT NULL
        WHEN 'finished' THEN lead_seconds IS NULL AND access IS NULL AND refresh IS NULL AND subject IS NULL
        ELSE false END)
);
CREATE UNIQUE INDEX managed_one_alive_idx ON managed (digest) WHERE state IN ('queued', 'issued');
CREATE INDEX managed_needed_idx ON managed (provider, lead_seconds, needed_at) WHERE lead_seconds IS NOT NULL;
CREATE INDEX managed_leased_idx ON managed (provider) WHERE lease IS NOT NULL;
CREATE INDEX managed_deadline_idx ON managed (deadline);
CREATE INDEX managed_fts_token_id_idx ON managed (fts_token_id) WHERE fts_token_id IS NOT NULL;
CREATE INDEX managed_unpushed_idx ON managed (jti) WHERE pushes AND (fts_token_id IS DISTINCT FROM pushed_id);
CREATE INDEX managed_unfinished_idx ON managed (deadline) WHERE (access IS NOT NULL) OR (lead_seconds IS NOT NULL);
