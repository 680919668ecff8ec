"""Tables of requests and tokens, and of their life.

`requests`, `tokens`, `uses` and `token_states` are partitioned by the day that their UUIDv7 holds, without a
default partition; `minter.database` makes the partitions.
"""

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID

from schemas.columns import REQUEST_KINDS, Instant, metadata, now, token_mode, token_side, token_state

# The decision behind a token, apart from its file: one row for each combination; token rows refer to it (I8).
rules = Table(
    "rules",
    metadata,
    Column("rule_id", Integer, Identity(always=True), primary_key=True),
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("route", Text, nullable=False),
    Column("storage", Text, nullable=False),
    Column("operations", ARRAY(Text), nullable=False),
    Column("steps", JSONB, nullable=False),
    now("created_at"),
    CheckConstraint("octet_length(digest) = 32", name="digest"),
)

# The request that filled an FTS job, so that FTS's ids lead to tokens. For each file of the submitted job,
# `files` has its number in the request, and `file_ids` its id in FTS.
jobs = Table(
    "jobs",
    metadata,
    Column("job_id", UUID(as_uuid=True), primary_key=True),
    Column("request_id", UUID(as_uuid=True), nullable=False),
    Column("client_id", Integer, primary_key=True),
    Column("files", ARRAY(SmallInteger), nullable=False),
    Column("file_ids", ARRAY(BigInteger), nullable=False, server_default=text("'{}'")),
    now("reported_at"),
    Column("replica_files", ARRAY(SmallInteger), nullable=False, server_default=text("'{}'")),
    Column("replica_ids", ARRAY(BigInteger), nullable=False, server_default=text("'{}'")),
    Index("jobs_reported_at_idx", "reported_at"),
    Index("jobs_request_id_idx", "request_id"),
)

# A request's tokens have the jtis first_jti, first_jti + 1, …, so they need no index by request (ADR 2).
requests = Table(
    "requests",
    metadata,
    Column("request_id", UUID(as_uuid=True), primary_key=True),
    Column("client_id", Integer, primary_key=True),
    Column("first_jti", UUID(as_uuid=True), nullable=False),
    now("received_at"),
    Column("tokens", Integer, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("kind", Text, nullable=False),
    Column("activity", Text, nullable=False),
    Column("on_behalf_of", Text, nullable=False),
    Column("error", JSONB),
    Column("refusals", JSONB),
    Column("renews", UUID(as_uuid=True)),
    Column("all_or_nothing", Boolean, nullable=False, server_default=text("false")),
    CheckConstraint("octet_length(digest) = 32", name="digest"),
    CheckConstraint("tokens >= 0 AND (error IS NULL OR tokens = 0)", name="tokens"),
    CheckConstraint(f"kind IN {REQUEST_KINDS!r}", name="kind"),
    CheckConstraint("(kind = 'renew') = (renews IS NOT NULL)", name="renews"),
    postgresql_partition_by="RANGE (request_id)",
)

# Columns are in order of falling alignment, and no column of a minted row is NULL: a row needs no padding and
# no null bitmap.
tokens = Table(
    "tokens",
    metadata,
    Column("jti", UUID(as_uuid=True), primary_key=True),
    Column("request_id", UUID(as_uuid=True), nullable=False),
    Column("expires_at", Instant, nullable=False),
    Column("path_hash", BigInteger, nullable=False),
    Column("fts_token_id", BigInteger),
    Column("client_id", Integer, nullable=False),
    Column("storage_id", Integer, nullable=False),
    Column("key_id", Integer),
    Column("state", token_state, nullable=False),
    Column("mode", token_mode, nullable=False),
    Column("side", token_side, nullable=False),
    Column("file", SmallInteger, nullable=False),
    Column("position", SmallInteger, nullable=False),
    Column("external_id", Text, nullable=False),
    Column("payload", Text),
    Column("rule_id", Integer),
    CheckConstraint(
        "mode <> 'mint' OR (key_id IS NOT NULL AND payload IS NOT NULL AND fts_token_id IS NOT NULL)",
        name="minted",
    ),
    CheckConstraint("mode <> 'mint' OR state NOT IN ('queued', 'failed')", name="mint_state"),
    Index("tokens_path_hash_idx", "path_hash"),
    Index("tokens_fts_token_id_idx", "fts_token_id"),
    # An entry has 8 bytes instead of 33; queries compare the text, too.
    Index(
        "tokens_external_id_idx",
        text("hashtextextended(external_id, 0)"),
        postgresql_where=text("external_id <> ''"),
    ),
    postgresql_partition_by="RANGE (jti)",
)

# The uses of shared and managed tokens: one row for each file and side, with an id in its request's range.
# The token itself has a row in `tokens`, with file -1 (ADR 10).
uses = Table(
    "uses",
    metadata,
    Column("use_id", UUID(as_uuid=True), primary_key=True),
    Column("jti", UUID(as_uuid=True), nullable=False),
    Column("request_id", UUID(as_uuid=True), nullable=False),
    Column("path_hash", BigInteger, nullable=False),
    Column("client_id", Integer, nullable=False),
    Column("side", token_side, nullable=False),
    Column("file", SmallInteger, nullable=False),
    Column("position", SmallInteger, nullable=False),
    Column("path", Text, nullable=False),
    Column("external_id", Text, nullable=False),
    Column("consumer", Text, nullable=False, server_default=text("''")),
    Column("queue", Text, nullable=False, server_default=text("''")),
    Column("instead_of", UUID(as_uuid=True)),
    Index("uses_jti_idx", "jti"),
    Index("uses_instead_of_idx", "instead_of", postgresql_where=text("instead_of IS NOT NULL")),
    Index("uses_path_hash_idx", "path_hash"),
    Index(
        "uses_external_id_idx",
        text("hashtextextended(external_id, 0)"),
        postgresql_where=text("external_id <> ''"),
    ),
    postgresql_partition_by="RANGE (use_id)",
)

# The state of each token or use that left the state it was recorded in. The table is apart from `tokens`,
# because a new version of a wide token row, with its index entries, costs ten times as much (ADR 7).
token_states = Table(
    "token_states",
    metadata,
    Column("jti", UUID(as_uuid=True), primary_key=True),
    Column("active_at", Instant),
    Column("ended_at", Instant),
    Column("state", token_state, nullable=False),
    CheckConstraint(
        "CASE state WHEN 'active' THEN active_at IS NOT NULL AND ended_at IS NULL"
        " WHEN 'finished' THEN ended_at IS NOT NULL WHEN 'cancelled' THEN ended_at IS NOT NULL"
        " ELSE false END",
        name="state",
    ),
    postgresql_partition_by="RANGE (jti)",
)

# A family has all refresh tokens that descend from one exchange; they are signed, not stored. `generation` is
# the newest one handed out; the generation before works until the newest is used (ADR 11).
families = Table(
    "families",
    metadata,
    Column("family_id", UUID(as_uuid=True), primary_key=True),
    Column("client_id", Integer, ForeignKey("clients.client_id"), nullable=False),
    Column("subject_jti", UUID(as_uuid=True), nullable=False),
    Column("subject_client", Text, nullable=False),
    Column("on_behalf_of", Text, nullable=False),
    Column("activity", Text, nullable=False),
    Column("sub", Text, nullable=False),
    Column("act", JSONB),
    Column("scope", Text, nullable=False),
    Column("audience", ARRAY(Text), nullable=False),
    Column("rule", Text, nullable=False),
    Column("ends_at", Instant, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("rotated_at", Instant, nullable=False),
    Column("revoked_at", Instant),
    CheckConstraint("generation > 0", name="generation"),
    Index("families_ends_at_idx", "ends_at"),
    Index("families_subject_jti_idx", "subject_jti"),
)

# The access tokens that came with the refresh tokens of a family: they end with it (RFC 7009 §2.1).
family_tokens = Table(
    "family_tokens",
    metadata,
    Column(
        "family_id",
        UUID(as_uuid=True),
        ForeignKey("families.family_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("jti", UUID(as_uuid=True), primary_key=True),
)

# The changing part of a managed token, beside its rows in `tokens` and `uses` (ADR 12). Secrets are encrypted
# and removed when the token is finished. The token is due `lead_seconds` before `needed_at`; both are NULL
# when nothing is left to do. Each new token is pushed to the queues of its uses; that is done when
# `pushed_id` equals `fts_token_id`, which is 0 for a failure. One refresher process holds a `lease`;
# `spent` says that a refresh token was sent and that its answer is not known.
managed = Table(
    "managed",
    metadata,
    Column("jti", UUID(as_uuid=True), primary_key=True),
    Column("client_id", Integer, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("provider", Text, nullable=False),
    Column("mode", token_mode, nullable=False),
    Column("state", token_state, nullable=False),
    Column("scope", Text, nullable=False),
    Column("audience", ARRAY(Text), nullable=False),
    Column("storage", Text, nullable=False),
    Column("on_behalf_of", Text, nullable=False),
    Column("activity", Text, nullable=False),
    Column("fallback", ARRAY(Text), nullable=False),
    Column("uses", Integer, nullable=False),
    Column("cap_seconds", Integer, nullable=False),
    Column("least_seconds", Integer, nullable=False),
    Column("deadline", Instant, nullable=False),
    Column("lead_seconds", Integer),
    Column("needed_at", Instant),
    Column("retry_at", Instant),
    Column("leased_until", Instant),
    Column("lease", UUID(as_uuid=True)),
    Column("tries", Integer, nullable=False, server_default=text("0")),
    Column("spent", Boolean, nullable=False, server_default=text("false")),
    Column("subject", LargeBinary),
    Column("refresh", LargeBinary),
    Column("access", LargeBinary),
    Column("expires_at", Instant),
    Column("granted_scope", Text, nullable=False, server_default=text("''")),
    Column("fts_token_id", BigInteger),
    Column("error", JSONB),
    Column("pushes", Boolean, nullable=False, server_default=text("false")),
    Column("pushed_id", BigInteger),
    Column("pushing_until", Instant),
    CheckConstraint("octet_length(digest) = 32", name="digest"),
    CheckConstraint("mode <> 'mint'", name="mode"),
    CheckConstraint("(lead_seconds IS NULL) = (needed_at IS NULL)", name="lead"),
    CheckConstraint("(lease IS NULL) = (leased_until IS NULL)", name="lease"),
    CheckConstraint("(access IS NULL) OR (expires_at IS NOT NULL)", name="access"),
    CheckConstraint(
        "CASE state WHEN 'queued' THEN access IS NULL WHEN 'issued' THEN access IS NOT NULL"
        " WHEN 'failed' THEN lead_seconds IS NULL AND error IS NOT NULL"
        " WHEN 'finished' THEN lead_seconds IS NULL AND access IS NULL AND refresh IS NULL"
        " AND subject IS NULL"
        " ELSE false END",
        name="state",
    ),
    Index(
        "managed_one_alive_idx", "digest", unique=True, postgresql_where=text("state IN ('queued', 'issued')")
    ),
    Index(
        "managed_needed_idx", "provider", "lead_seconds", "needed_at",
        postgresql_where=text("(lead_seconds IS NOT NULL) AND (retry_at IS NULL)"),
    ),
    Index(
        "managed_again_idx", "provider", "lead_seconds", "needed_at", "retry_at",
        postgresql_where=text("(lead_seconds IS NOT NULL) AND (retry_at IS NOT NULL)"),
    ),
    Index("managed_leased_idx", "provider", postgresql_where=text("lease IS NOT NULL")),
    Index(
        "managed_unpushed_idx", "jti",
        postgresql_where=text("pushes AND (fts_token_id IS DISTINCT FROM pushed_id)"),
    ),
    Index("managed_deadline_idx", "deadline"),
    Index(
        "managed_unfinished_idx", "deadline",
        postgresql_where=text("(access IS NOT NULL) OR (lead_seconds IS NOT NULL)"),
    ),
    Index("managed_fts_token_id_idx", "fts_token_id", postgresql_where=text("fts_token_id IS NOT NULL")),
)  # fmt: skip
