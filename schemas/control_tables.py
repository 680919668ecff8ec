"""Tables of what operators change, and of the running system: issuers, clients, keys, bans, providers.

Every change of a table that decisions read increments `control.version` by trigger, in the same transaction
(ADR 3).
"""

from sqlalchemy import (
    ARRAY,
    DDL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    event,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID

from schemas.columns import BAN_KINDS, Instant, key_state, metadata, now

control = Table(
    "control",
    metadata,
    Column("id", Boolean, primary_key=True, server_default=text("true")),
    Column("version", BigInteger, nullable=False, server_default=text("1")),
    CheckConstraint("id", name="one_row"),
)

issuers = Table(
    "issuers",
    metadata,
    Column("vo", Text, primary_key=True),
    Column("iss", Text, nullable=False, unique=True),
    now("created_at"),
    Column("secrets_key", LargeBinary),
    CheckConstraint("iss ~ '^https://.+$'", name="iss"),  # an IAM's may have no slash at its end
)

storages = Table(
    "storages",
    metadata,
    Column("storage_id", Integer, Identity(always=True), primary_key=True),
    Column("vo", Text, ForeignKey("issuers.vo"), nullable=False),
    Column("name", Text, nullable=False),
    Column("definition", JSONB, nullable=False),
    now("created_at"),
    Column("retired_at", Instant),
    UniqueConstraint("vo", "name"),
)

clients = Table(
    "clients",
    metadata,
    Column("client_id", Integer, Identity(always=True), primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("vo", Text, ForeignKey("issuers.vo"), nullable=False),
    Column("sub", Text, nullable=False, unique=True),
    Column("operations", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    Column("paths", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    Column("max_lifetime_seconds", Integer),
    Column("reply_queues", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    Column("jwe_key", JSONB),
    Column("secret_hash", LargeBinary),
    now("created_at"),
    Column("disabled_at", Instant),
    Column("old_secret_hash", LargeBinary),
    Column("old_secret_until", Instant),
    Column("auth_key", JSONB),
    Column("default_audience", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    Column("audiences", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    Column("scopes", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    Column("groups", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    Column("subject_token", LargeBinary),
    Column("subject_provider", Text, nullable=False, server_default=text("''")),
    Column("subject_scope", Text, nullable=False, server_default=text("''")),
    Column("subject_expires_at", Instant),
    CheckConstraint("name ~ '^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$'", name="name"),
    CheckConstraint("octet_length(sub) BETWEEN 1 AND 255 AND sub ~ '^[ -~]+$'", name="sub"),
    CheckConstraint("max_lifetime_seconds > 0", name="max_lifetime_seconds"),
    CheckConstraint("(old_secret_hash IS NULL) = (old_secret_until IS NULL)", name="old_secret"),
)

signing_keys = Table(
    "signing_keys",
    metadata,
    Column("key_id", Integer, Identity(always=True), primary_key=True),
    Column("vo", Text, ForeignKey("issuers.vo"), nullable=False),
    Column("kid", Text, nullable=False, unique=True),
    Column("algorithm", Text, nullable=False),
    Column("state", key_state, nullable=False),
    Column("public_jwk", JSONB, nullable=False),
    Column("private_key", LargeBinary),
    now("published_at"),
    Column("activated_at", Instant),
    Column("retired_at", Instant),
    Column("revoked_at", Instant),
    Column("last_exp", Instant),
    CheckConstraint("algorithm IN ('ES256', 'RS256')", name="algorithm"),
    CheckConstraint(
        "CASE state WHEN 'prepared' THEN private_key IS NOT NULL AND activated_at IS NULL"
        " WHEN 'active' THEN private_key IS NOT NULL AND activated_at IS NOT NULL"
        " WHEN 'old' THEN retired_at IS NOT NULL"
        " WHEN 'revoked' THEN revoked_at IS NOT NULL AND private_key IS NULL END",
        name="state",
    ),
    CheckConstraint("public_jwk ->> 'd' IS NULL AND public_jwk ->> 'kid' = kid", name="public_jwk"),
    Index(
        "signing_keys_one_active_idx",
        "vo",
        "algorithm",
        unique=True,
        postgresql_where=text("state = 'active'"),
    ),
)

bans = Table(
    "bans",
    metadata,
    Column("ban_id", Integer, Identity(always=True), primary_key=True),
    Column("kind", Text, nullable=False),
    Column("value", Text, nullable=False),
    Column("vo", Text, ForeignKey("issuers.vo")),
    Column("reason", Text, nullable=False),
    now("created_at"),
    Column("lifted_at", Instant),
    CheckConstraint(f"kind IN {BAN_KINDS!r}", name="kind"),
    Index(
        "bans_one_in_force_idx",
        "kind",
        "value",
        text("coalesce(vo, '')"),
        unique=True,
        postgresql_where=text("lifted_at IS NULL"),
    ),
)

audit = Table(
    "audit",
    metadata,
    Column("audit_id", BigInteger, Identity(always=True), primary_key=True),
    now("at"),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("details", JSONB, nullable=False, server_default=text("'{}'")),
    Index("audit_subject_idx", "subject", "at"),
)

# Redelivery counts of messages that may have killed a worker. Such a message is served alone, and
# dead-lettered at its fourth delivery (ADR 4).
suspects = Table(
    "suspects",
    metadata,
    Column("digest", LargeBinary, primary_key=True),
    Column("attempts", SmallInteger, nullable=False),
    now("seen_at"),
)

# The ids of the assertions that clients authenticated with (RFC 7523 §3), until they expire.
assertions = Table(
    "assertions",
    metadata,
    Column("client_id", Integer, primary_key=True),
    Column("assertion_id", Text, primary_key=True),
    Column("expires_at", Instant, nullable=False),
)

# One row for each external IAM: when the next request may leave, and its circuit breaker (ADR 12).
# `documents` are the IAM's discovery and JWKS, fetched once for all processes.
providers = Table(
    "providers",
    metadata,
    Column("name", Text, primary_key=True),
    Column("due_at", Instant, nullable=False),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("pauses", Integer, nullable=False, server_default=text("0")),
    Column("open_until", Instant),
    Column("probed_until", Instant),
    Column("documents", JSONB),
    Column("documents_at", Instant),
)

# One row for each running process, written every few seconds; `minter status` reads them.
processes = Table(
    "processes",
    metadata,
    Column("process_id", UUID(as_uuid=True), primary_key=True),
    Column("role", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("version", Text, nullable=False),
    Column("started_at", Instant, nullable=False),
    Column("seen_at", Instant, nullable=False),
    Column("skew_seconds", Float, nullable=False),
    Column("facts", JSONB, nullable=False, server_default=text("'{}'")),
)

# What each process counted in a minute, written with its heartbeats: rates of the whole cluster in one query.
# `kind` and `label` are those of `minter.database.counts`; rows of 8 days are kept.
counts = Table(
    "counts",
    metadata,
    Column("minute", Instant, primary_key=True),
    Column("process_id", UUID(as_uuid=True), primary_key=True),
    Column("vo", Text, primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("label", Text, primary_key=True),
    Column("amount", BigInteger, nullable=False),
)

# One row for each VO whose issuer is its IAM's, too: the IAM's keys, and how often in a row each was missing.
# `fetched_at` is the last good answer, `written_at` when `minter publish` last left its file as it should be.
co_issuers = Table(
    "co_issuers",
    metadata,
    Column("vo", Text, primary_key=True),
    Column("keys", JSONB, nullable=False, server_default=text("'[]'")),
    Column("missing", JSONB, nullable=False, server_default=text("'{}'")),
    Column("problem", Text, nullable=False, server_default=text("''")),
    Column("tried_at", Instant),
    Column("fetched_at", Instant),
    Column("written_at", Instant),
)

CONTROLLED = ("issuers", "storages", "clients", "bans", "signing_keys")
"""Tables of which every change increments control.version."""

BUMP = """
CREATE FUNCTION bump_control() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE control SET version = version + 1;
    RETURN NULL;
END $$"""


def bump_trigger(table: str) -> str:
    """Return the statement that creates the trigger of one controlled table."""
    return (
        f"CREATE TRIGGER bump_control AFTER INSERT OR UPDATE OR DELETE ON {table}"
        " FOR EACH STATEMENT EXECUTE FUNCTION bump_control()"
    )


PROVIDERS_BUMP = (
    "CREATE TRIGGER bump_control AFTER INSERT OR DELETE OR UPDATE OF open_until ON providers"
    " FOR EACH STATEMENT EXECUTE FUNCTION bump_control()"
)
"""A change of a budget does not increment the version; a circuit breaker that opens or closes does."""

event.listen(metadata, "before_create", DDL(BUMP.replace("%", "%%")))
event.listen(metadata, "after_create", DDL("INSERT INTO control DEFAULT VALUES"))
for _name in CONTROLLED:
    event.listen(metadata.tables[_name], "after_create", DDL(bump_trigger(_name)))
event.listen(providers, "after_create", DDL(PROVIDERS_BUMP))
