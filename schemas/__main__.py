"""Write the JSON Schemas of the contract from the typed structs: `make schemas`."""

import json
from inspect import cleandoc
from pathlib import Path
from typing import Any

import msgspec

from minter.contract import names
from minter.contract.messages import Answer
from minter.errors import BY_REASON
from minter.issuer.openapi import TASKS
from minter.policy.limits import HARD_MAX_SECONDS, MAX_CLAIM_CHARACTERS

_DIALECT = "https://json-schema.org/draft/2020-12/schema"

_TEXT = {"type": "string"}
_NUMERIC_DATE = {"type": "integer", "minimum": 0}

ERROR = {
    "$schema": _DIALECT,
    "title": "Error",
    "description": "A typed error; fields beyond these three are what a caller can act on.",
    "type": "object",
    "required": ["error", "reason", "error_description"],
    "properties": {
        "error": {"enum": sorted({cls.code for cls in BY_REASON.values()})},
        "reason": {"enum": sorted(BY_REASON)},
        "error_description": _TEXT,
    },
}

TOKEN = {
    "$schema": _DIALECT,
    "title": "Claims of a minted token",
    "description": f"WLCG Common JWT Profile 1.3 §2.1; exp - iat is at most {HARD_MAX_SECONDS} s.",
    "type": "object",
    "required": ["wlcg.ver", "iss", "sub", "aud", "scope", "client_id", "iat", "nbf", "exp", "jti"],
    "additionalProperties": False,
    "properties": {
        "wlcg.ver": {"const": "1.0"},
        "iss": {"type": "string", "pattern": "^https://.+/$"},
        "sub": {"type": "string", "minLength": 1, "maxLength": 255},
        "aud": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 2}]},
        "scope": {"type": "string", "minLength": 1, "maxLength": MAX_CLAIM_CHARACTERS},
        "client_id": _TEXT,
        "iat": _NUMERIC_DATE,
        "nbf": _NUMERIC_DATE,
        "exp": _NUMERIC_DATE,
        "jti": {"type": "string", "format": "uuid"},
    },
}


def generate() -> dict[str, dict[str, Any]]:
    """Return every schema by its file name."""
    files: dict[str, type] = {names.SCHEMAS[task]: struct for task, (struct, _) in TASKS.items()}
    made = {
        name: {"$schema": _DIALECT, **_clean(msgspec.json.schema(struct))}
        for name, struct in (files | {"answer.json": Answer}).items()
    }
    return {**made, "error.json": ERROR, "token.json": TOKEN}


def _clean(schema: Any) -> Any:
    """Return a schema without the indentation of docstrings, which msgspec before 0.23 leaves in."""
    if isinstance(schema, dict):
        return {
            k: cleandoc(v) if k == "description" and isinstance(v, str) else _clean(v)
            for k, v in schema.items()
        }
    return [_clean(part) for part in schema] if isinstance(schema, list) else schema


def write(folder: Path) -> None:
    """Write all schemas into `folder`."""
    for name, schema in generate().items():
        text = json.dumps(schema, indent=2, sort_keys=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parent)
