CREATE TABLE co_issuers (
    vo text PRIMARY KEY,
    keys jsonb NOT NULL DEFAULT '[]',
    missing jsonb NOT NULL DEFAULT '{}',
    problem text NOT NULL DEFAULT '',
    tried_at timestamptz,
    fetched_at timestamptz,
    written_at timestamptz
);

-- The issuer of an IAM is as the IAM spells it; the settings ask for a slash at the end of Minter's own.
ALTER TABLE issuers DROP CONSTRAINT issuers_iss_check;
ALTER TABLE issuers ADD CONSTRAINT issuers_iss_check CHECK (iss ~ '^https://.+$');
