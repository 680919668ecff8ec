"""Signing keys in the database: creation, rotation, revocation, destruction and re-encryption.

Each change is one transaction that holds the control lock exclusively, so the next recording transaction
of every worker sees the whole change (I6). The change is audited in the same transaction (I8).
`minter.tokens.keys` computes the states of the keys.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import psycopg
from msgspec import structs
from psycopg.types.json import Jsonb
from sqlalchemy.engine import Engine as Pool

from minter.database.connection import LONG_SECONDS, transaction
from minter.database.control import read_keys
from minter.database.control_changes import controlling
from minter.storages.dialects import Algorithm
from minter.tokens import keys
from minter.tokens.keys import Key, RotationPolicy
from minter.tokens.keystore import PEPPER, SIGNING_KEY, Keystore


def create(
    pool: Pool,
    keystore: Keystore,
    vo: str,
    algorithms: Sequence[Algorithm],
    actor: str,
    *,
    at_once: bool = True,
) -> list[Key]:
    """Make, encrypt and store a key of each algorithm in one transaction; return them.

    The first keys of an issuer, which no verifier can have missed, are active at once; others are standbys.
    With `at_once` false the first ones are standbys, too: verifiers know the issuer already.
    """
    signers = [keys.generate(algorithm) for algorithm in algorithms]
    details = {"vo": vo, "algorithms": list(algorithms)}
    with controlling(pool, actor, "key.create", " ".join(s.kid for s in signers), details) as tx:
        first = at_once and not any(key.vo == vo for key in read_keys(tx))
        for signer in signers:
            tx.execute(
                "INSERT INTO signing_keys (vo, kid, algorithm, state, public_jwk, private_key, activated_at)"
                " VALUES (%(vo)s, %(kid)s, %(algorithm)s, %(state)s::key_state, %(jwk)s, %(sealed)s,"
                " CASE WHEN %(first)s THEN now() END)",
                {
                    "vo": vo, "kid": signer.kid, "algorithm": signer.algorithm, "first": first,
                    "state": "active" if first else "prepared",
                    "jwk": Jsonb(signer.public_jwk), "sealed": keystore.seal(vo, signer),
                },
            )  # fmt: skip
        made = {signer.kid for signer in signers}
        return [key for key in read_keys(tx) if key.kid in made]


def rotate(
    pool: Pool, vo: str, algorithm: Algorithm, now: datetime, policy: RotationPolicy, actor: str
) -> Key:
    """Make a ready standby of an algorithm the active key, and return it. Raises NoUsableKey without one."""
    details: dict[str, object] = {"algorithm": algorithm}
    with controlling(pool, actor, "key.rotate", vo, details) as tx:
        ring = read_keys(tx)
        after = keys.rotate(ring, vo, algorithm, now, policy)
        details |= _save(tx, ring, after, now)
    return keys.active(after, vo)[algorithm]


def revoke(pool: Pool, kid: str, now: datetime, policy: RotationPolicy, actor: str, reason: str) -> list[Key]:
    """Revoke a key and destroy its private half; return the key ring after the change.

    If the key is active, a ready standby replaces it in the same transaction; without a ready standby
    nothing is changed and NoUsableKey is raised. Raises UnknownKey if no key has the kid or the key is
    revoked already.
    """
    details: dict[str, object] = {"reason": reason}
    with controlling(pool, actor, "key.revoke", kid, details) as tx:
        ring = read_keys(tx)
        after = keys.revoke(ring, kid, now, policy)
        details |= _save(tx, ring, after, now)
    return after


def destroy_spent(pool: Pool, now: datetime, policy: RotationPolicy, actor: str) -> list[str]:
    """Destroy the private halves of old keys that may no longer re-sign tokens; return their kids."""
    with transaction(pool, LONG_SECONDS) as connection:
        held = connection.execute("SELECT kid FROM signing_keys WHERE private_key IS NOT NULL").fetchall()
        spent = {k.kid for k in keys.spent(read_keys(connection), now, policy)} & {kid for (kid,) in held}
    for kid in sorted(spent):
        with controlling(pool, actor, "key.destroy", kid, {}) as tx:
            tx.execute("UPDATE signing_keys SET private_key = NULL WHERE kid = %s", (kid,))
    return sorted(spent)


_SEALED: tuple[tuple[str, str, str, Callable[[Keystore, str, str, bytes], bytes]], ...] = (
    ("signing_keys", "private_key", "kid", lambda store, vo, kid, s: store.reseal(vo, SIGNING_KEY, kid, s)),
    ("issuers", "secrets_key", "vo", lambda store, vo, _, s: store.reseal(vo, PEPPER, vo, s)),
    (
        "clients", "subject_token", "name",
        lambda store, vo, name, s: store.reseal_token(vo, name, "client_subject", s),
    ),
)  # fmt: skip
"""Encrypted columns: table, column, the column that names a row, and the function that encrypts anew."""


def rewrap(pool: Pool, keystore: Keystore, vo: str, actor: str) -> int:
    """Re-encrypt a VO's secrets under the first of its master keys; return the number of secrets."""
    details: dict[str, object] = {}
    count = 0
    with controlling(pool, actor, "master_key.rewrap", vo, details) as tx:
        for table, column, name, anew in _SEALED:
            held = tx.execute(
                f"SELECT {name}, {column} FROM {table} WHERE vo = %s AND {column} IS NOT NULL", (vo,)
            ).fetchall()
            for named, sealed in held:
                tx.execute(
                    f"UPDATE {table} SET {column} = %s WHERE {name} = %s",
                    (anew(keystore, vo, named, bytes(sealed)), named),
                )
            count += len(held)
        count += _rewrap_managed(tx, keystore, vo)
        details["secrets"] = count
    return count


def _rewrap_managed(tx: "psycopg.Connection[Any]", keystore: Keystore, vo: str) -> int:
    """Re-encrypt the secrets of managed tokens; return their number. Refreshers wait for the locked rows."""
    rows = tx.execute(
        "SELECT m.jti, m.subject, m.refresh, m.access FROM managed m JOIN clients c USING (client_id)"
        " WHERE c.vo = %s AND coalesce(m.subject, m.refresh, m.access) IS NOT NULL"
        " ORDER BY m.jti FOR UPDATE OF m",
        (vo,),
    ).fetchall()
    names = ("subject", "refresh", "access")
    anew = [
        [
            s if s is None else keystore.reseal_token(vo, jti, n, bytes(s))
            for n, s in zip(names, held, strict=True)
        ]
        for jti, *held in rows
    ]
    tx.execute(
        "UPDATE managed m SET subject = r.s, refresh = r.f, access = r.a"
        " FROM unnest(%s::uuid[], %s::bytea[], %s::bytea[], %s::bytea[]) AS r (jti, s, f, a)"
        " WHERE m.jti = r.jti",
        ([jti for jti, *_ in rows], *([one[n] for one in anew] for n in range(3))),
    )
    return sum(s is not None for one in anew for s in one)


def _save(
    tx: "psycopg.Connection[Any]", before: Sequence[Key], after: Sequence[Key], now: datetime
) -> dict[str, object]:
    """Write the changed keys, the newly active key last, because an issuer has only one active key."""
    changed = [a for b, a in zip(before, after, strict=True) if structs.asdict(a) != structs.asdict(b)]
    for key in sorted(changed, key=lambda k: k.state == "active"):
        revoked = key.state == "revoked"
        tx.execute(
            "UPDATE signing_keys SET state = %s, activated_at = %s, retired_at = %s, last_exp = %s,"
            " revoked_at = %s, private_key = CASE WHEN %s THEN NULL ELSE private_key END WHERE kid = %s",
            (
                key.state, key.activated_at, key.retired_at, key.last_exp,
                now if revoked else None, revoked, key.kid,
            ),
        )  # fmt: skip
    return {"states": {key.kid: key.state for key in changed}}
