CREATE TYPE token_state AS ENUM ('queued', 'issued', 'active', 'finished', 'cancelled', 'failed');

CREATE TYPE token_mode AS ENUM ('mint', 'exchange', 'client_credentials');

CREATE TYPE token_side AS ENUM ('source', 'destination', 'operation', 'service');

CREATE TYPE key_state AS ENUM ('prepared', 'active', 'old', 'revoked');

CREATE FUNCTION bump_control() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE control SET version = version + 1;
    RETURN NULL;
END $$;

CREATE TABLE control (
	id BOOLEAN DEFAULT true NOT NULL, 
	version BIGINT DEFAULT 1 NOT NULL, 
	CONSTRAINT control_pkey PRIMARY KEY (id), 
	CONSTRAINT control_one_row_check CHECK (id)
);

CREATE TABLE issuers (
	vo TEXT NOT NULL, 
	iss TEXT NOT NULL, 
	created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL, 
	CONSTRAINT issuers_pkey PRIMARY KEY (vo), 
	CONSTRAINT issuers_iss_check CHECK (iss ~ '^https://.+/$'), 
	CONSTRAINT issuers_iss_key UNIQUE (iss)
);

CREATE TRIGGER bump_control AFTER INSERT OR UPDATE OR DELETE ON issuers FOR EACH STATEMENT EXECUTE FUNCTION bump_control();

CREATE TABLE audit (
	audit_id BIGINT GENERATED ALWAYS AS IDENTITY, 
	at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL, 
	actor TEXT NOT NULL, 
	action TEXT NOT NULL, 
	subject TEXT NOT NULL, 
	details JSONB DEFAULT '{}' NOT NULL, 
	CONSTRAINT audit_pkey PRIMARY KEY (audit_id)
);

CREATE INDEX audit_subject_idx ON audit (subject, at);

CREATE TABLE suspects (
	digest BYTEA NOT NULL, 
	attempts SMALLINT NOT NULL, 
	seen_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL, 
	CONSTRAINT suspects_pkey PRIMARY KEY (digest)
);

CREATE TABLE requests (
	request_id UUID NOT NULL, 
	client_id INTEGER NOT NULL, 
	first_jti UUID NOT NULL, 
	received_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL, 
	tokens INTEGER NOT NULL, 
	digest BYTEA NOT NULL, 
	kind TEXT NOT NULL, 
	activity TEXT NOT NULL, 
	on_behalf_of TEXT NOT NULL, 
	error JSONB, 
	refusals JSONB, 
	CONSTRAINT requests_pkey PRIMARY KEY (request_id, client_id), 
	CONSTRAINT requests_digest_check CHECK (octet_length(digest) = 32), 
	CONSTRAINT requests_tokens_check CHECK (tokens >= 0 AND (error IS NULL OR tokens = 0)), 
	CONSTRAINT requests_kind_check CHECK (kind IN ('mint', 'fill_job'))
)
 PARTITION BY RANGE (request_id);

CREATE TABLE tokens (
	jti UUID NOT NULL, 
	request_id UUID NOT NULL, 
	expires_at TIMESTAMP WITH TIME ZONE NOT NULL, 
	path_hash BIGINT NOT NULL, 
	fts_token_id BIGINT, 
	client_id INTEGER NOT NULL, 
	storage_id INTEGER NOT NULL, 
	key_id INTEGER, 
	state token_state NOT NULL, 
	mode token_mode NOT NULL, 
	side token_side NOT NULL, 
	file SMALLINT NOT NULL, 
	position SMALLINT NOT NULL, 
	external_id TEXT NOT NULL, 
	payload TEXT, 
	CONSTRAINT tokens_pkey PRIMARY KEY (jti), 
	CONSTRAINT tokens_minted_check CHECK (mode <> 'mint' OR (key_id IS NOT NULL AND payload IS NOT NULL AND fts_token_id IS NOT NULL)), 
	CONSTRAINT tokens_mint_state_check CHECK (mode <> 'mint' OR state NOT IN ('queued', 'failed'))
)
 PARTITION BY RANGE (jti);

CREATE INDEX tokens_path_hash_idx ON tokens (path_hash);

CREATE INDEX tokens_fts_token_id_idx ON tokens (fts_token_id);

CREATE TABLE storages (
	storage_id INTEGER GENERATED ALWAYS AS IDENTITY, 
	vo TEXT NOT NULL, 
	name TEXT NOT NULL, 
	definition JSONB NOT NULL, 
	created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL, 
	retired_at TIMESTAMP WITH TIME ZONE, 
	CONSTRAINT storages_pkey PRIMARY KEY (storage_id), 
	CONSTRAINT storages_vo_name_key UNIQUE (vo, name), 
	CONSTRAINT storages_vo_fkey FOREIGN KEY(vo) REFERENCES issuers (vo)
);

CREATE TRIGGER bump_control AFTER INSERT OR UPDATE OR DELETE ON storages FOR EACH STATEMENT EXECUTE FUNCTION bump_control();

CREATE TABLE clients (
	client_id INTEGER GENERATED ALWAYS AS IDENTITY, 
	name TEXT NOT NULL, 
	vo TEXT NOT NULL, 
	sub TEXT NOT NULL, 
	operations TEXT[] DEFAULT '{}' NOT NULL, 
	paths TEXT[] DEFAULT '{}' NOT NULL, 
	max_lifetime_seconds INTEGER, 
	reply_queues TEXT[] DEFAULT '{}' NOT NULL, 
	jwe_key JSONB, 
	secret_hash BYTEA, 
	created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL, 
	disabled_at TIMESTAMP WITH TIME ZONE, 
	CONSTRAINT clients_pkey PRIMARY KEY (client_id), 
	CONSTRAINT clients_name_check CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$'), 
	CONSTRAINT clients_sub_check CHECK (octet_length(sub) BETWEEN 1 AND 255 AND sub ~ '^[ -~]+$'), 
	CONSTRAINT clients_max_lifetime_seconds_check CHECK (max_lifetime_seconds > 0), 
	CONSTRAINT clients_name_key UNIQUE (name), 
	CONSTRAINT clients_vo_fkey FOREIGN KEY(vo) REFERENCES issuers (vo), 
	CONSTRAINT clients_sub_key UNIQUE (sub)
);

CREATE TRIGGER bump_control AFTER INSERT OR UPDATE OR DELETE ON clients FOR EACH STATEMENT EXECUTE FUNCTION bump_control();

CREATE TABLE signing_keys (
	key_id INTEGER GENERATED ALWAYS AS IDENTITY, 
	vo TEXT NOT NULL, 
	kid TEXT NOT NULL, 
	algorithm TEXT NOT NULL, 
	state key_state NOT NULL, 
	public_jwk JSONB NOT NULL, 
	private_key BYTEA, 
	published_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL, 
	activated_at TIMESTAMP WITH TIME ZONE, 
	retired_at TIMESTAMP WITH TIME ZONE, 
	revoked_at TIMESTAMP WITH TIME ZONE, 
	last_exp TIMESTAMP WITH TIME ZONE, 
	CONSTRAINT signing_keys_pkey PRIMARY KEY (key_id), 
	CONSTRAINT signing_keys_algorithm_check CHECK (algorithm IN ('ES256', 'RS256')), 
	CONSTRAINT signing_keys_state_check CHECK (CASE state WHEN 'prepared' THEN private_key IS NOT NULL AND activated_at IS NULL WHEN 'active' THEN private_key IS NOT NULL AND activated_at IS NOT NULL WHEN 'old' THEN retired_at IS NOT NULL WHEN 'revoked' THEN revoked_at IS NOT NULL AND private_key IS NULL END), 
	CONSTRAINT signing_keys_public_jwk_check CHECK (public_jwk ->> 'd' IS NULL AND public_jwk ->> 'kid' = kid), 
	CONSTRAINT signing_keys_vo_fkey FOREIGN KEY(vo) REFERENCES issuers (vo), 
	CONSTRAINT signing_keys_kid_key UNIQUE (kid)
);

CREATE UNIQUE INDEX signing_keys_one_active_idx ON signing_keys (vo) WHERE state = 'active';

CREATE TRIGGER bump_control AFTER INSERT OR UPDATE OR DELETE ON signing_keys FOR EACH STATEMENT EXECUTE FUNCTION bump_control();

CREATE TABLE bans (
	ban_id INTEGER GENERATED ALWAYS AS IDENTITY, 
	kind TEXT NOT NULL, 
	value TEXT NOT NULL, 
	vo TEXT, 
	reason TEXT NOT NULL, 
	created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL, 
	lifted_at TIMESTAMP WITH TIME ZONE, 
	CONSTRAINT bans_pkey PRIMARY KEY (ban_id), 
	CONSTRAINT bans_kind_check CHECK (kind IN ('client', 'on_behalf_of', 'vo', 'activity', 'storage', 'path')), 
	CONSTRAINT bans_vo_fkey FOREIGN KEY(vo) REFERENCES issuers (vo)
);

CREATE UNIQUE INDEX bans_one_in_force_idx ON bans (kind, value, coalesce(vo, '')) WHERE lifted_at IS NULL;

CREATE TRIGGER bump_control AFTER INSERT OR UPDATE OR DELETE ON bans FOR EACH STATEMENT EXECUTE FUNCTION bump_control();

INSERT INTO control DEFAULT VALUES;
