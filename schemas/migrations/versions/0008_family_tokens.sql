CREATE TABLE family_tokens (
    family_id uuid NOT NULL REFERENCES families ON DELETE CASCADE,
    jti uuid NOT NULL,
    PRIMARY KEY (family_id, jti)
);
