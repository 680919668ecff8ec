"""Mutations of valid messages: JSON trees, forms and bytes with odd parts, drawn by a seeded generator."""

import copy
import json
import os
import random
import secrets
from collections.abc import Iterator
from typing import Any

SEED = int(os.environ.get("MINTER_FUZZ_SEED") or secrets.randbits(32))
CASES = int(os.environ.get("MINTER_FUZZ_CASES") or 100_000)
"""Cases of all fuzz tests together."""

DEEP = "[" * 5_000 + "]" * 5_000
ODD: list[Any] = [
    None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, -0.0, "", " ", "\x00", "\n",
    "x" * 10_000, "ü" * 300, "\U0001f600", "../../etc/passwd", "%00", "%", "a b", "null", "true", "-1", "1e999",
    "eyJhbGciOiJub25lIn0.e30.", "https://[::1", "davs://se.example.org:99999/x", "davs:///", "//", "http://a@b/c",
    "2026-11-25T00:00:00Z", "9999999999999999999", "' OR 1=1 --", "{{7*7}}", "${jndi:ldap://x}", "\ufeff", "\u202e",
    [], {}, [[]], [{}], {"": ""}, [None], ["a"] * 50, {"a": {"b": {"c": {}}}}, {"$ref": "#"},
]  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from _places(value[index], (*path, index))


def mutated(rng: random.Random, value: Any) -> Any:
    """Return a copy of a JSON value with one to three changes: replaced, removed, added, copied members."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(list(_places(value)))
        if not path:
            if rng.random() < 0.1:
                value = copy.deepcopy(rng.choice(ODD))
            continue
        parent = value
        for step in path[:-1]:
            parent = parent[step]
        kind = rng.random()
        if kind < 0.6:
            parent[path[-1]] = copy.deepcopy(rng.choice(ODD))
        elif kind < 0.75:
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[str(rng.choice(ODD))[:100]] = copy.deepcopy(rng.choice([*ODD, parent[path[-1]]]))
        else:
            parent.insert(rng.randint(0, len(parent)), copy.deepcopy(parent[path[-1]]))
    return value


def spoiled(rng: random.Random, body: bytes) -> bytes:
    """Return bytes that may be no JSON any more: cut, with changed bytes, or with deep or repeated parts."""
    kind = rng.random()
    if kind < 0.3:
        return body[: rng.randint(0, len(body))]
    if kind < 0.7:
        changed = bytearray(body)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind < 0.8:
        return body.replace(b":", b":" + DEEP.encode() + b",", 1)
    at = rng.randint(0, len(body))
    return body[:at] + body + body[at:]


def body(rng: random.Random, value: Any) -> bytes:
    """Return the JSON of a mutated value, in one of four cases spoiled."""
    raw = json.dumps(mutated(rng, value)).encode()
    return spoiled(rng, raw) if rng.random() < 0.25 and raw else raw


def form(rng: random.Random, fields: dict[str, str]) -> bytes:
    """Return a mutated form, percent-encoded or not."""
    from urllib.parse import urlencode

    pairs = list(fields.items())
    for _ in range(rng.randint(1, 3)):
        odd = rng.choice(ODD)
        text = odd if isinstance(odd, str) else json.dumps(odd)
        place = rng.randrange(len(pairs))
        kind = rng.random()
        if kind < 0.5:
            pairs[place] = (pairs[place][0], text)
        elif kind < 0.6:
            pairs.append((text, pairs[place][1]))
        elif kind < 0.75:
            pairs.append(pairs[place])
        elif kind < 0.9 and len(pairs) > 1:
            del pairs[place]
        else:
            pairs[place] = (pairs[place][0], pairs[place][1] + text)
    if rng.random() < 0.2:
        raw = "&".join(f"{name}={value}" for name, value in pairs).encode("utf-8", "surrogatepass")
        return spoiled(rng, raw) if raw and rng.random() < 0.5 else raw
    return urlencode(pairs).encode()
