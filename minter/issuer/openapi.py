"""The OpenAPI document of the HTTP service, from the same structs as the JSON Schemas."""

from typing import Any

import msgspec

from minter.contract import names
from minter.contract.followups import CancelRequest, FetchRequest, RenewRequest, ReportRequest
from minter.contract.messages import Answer, FillRequest, MintRequest, URLsRequest
from minter.errors import BY_REASON
from minter.issuer.well_known import GRANTS

_TEXT = {"type": "string"}
TASKS: dict[str, tuple[type, str]] = {
    names.MINT: (MintRequest, "Tokens for each source, destination and operation of each file"),
    names.FILL_JOB: (FillRequest, "An FTS job, filled with tokens"),
    names.URLS: (URLsRequest, "URLs with which anybody may read one file each for a time"),
    names.RENEW: (RenewRequest, "New tokens for a resubmission"),
    names.FETCH: (FetchRequest, "The recorded tokens of an earlier request, the same bytes"),
    names.REPORT: (ReportRequest, "Report submitted jobs and active or finished files"),
    names.CANCEL: (CancelRequest, "Cancel tokens that are no longer needed"),
}
_ID, _SE = "01980000-0000-7000-8000-000000000001", "davs://se.example.org:443/data/vo"
_COPY = {
    "sources": [f"{_SE}/a"],
    "destinations": ["davs://other.example.org:2880/pnfs/vo/a"],
    "size": 3_000_000_000,
}
EXAMPLES: dict[str, dict[str, Any]] = {
    names.MINT: {
        "request_id": _ID,
        "activity": "Production Output",
        "files": [{**_COPY, "external_id": "42"}],
    },
    names.FILL_JOB: {
        "request_id": _ID,
        "fts": "fts3.example.org",
        "job": {
            "files": [
                {
                    "sources": _COPY["sources"],
                    "destinations": _COPY["destinations"],
                    "filesize": 3_000_000_000,
                }
            ],
            "params": {"overwrite": True},
        },
    },
    names.URLS: {"request_id": _ID, "urls": [f"{_SE}/a"], "lifetime_seconds": 3600},
    names.RENEW: {"request_id": _ID, "renews": "01980000-0000-7000-8000-000000000000", "files": [0]},
    names.FETCH: {"request_id": _ID},
    names.REPORT: {"files": [{"state": "finished", "external_id": "42"}]},
    names.CANCEL: {"external_ids": ["42"]},
}
"""A body for each task."""
_TRANSFERS, _TOKENS = "transfers", "tokens (OAuth)"
_ERRORS = {
    "400": "the request has to be changed",
    "401": "client authentication failed",
    "403": "a ban, a limit or a rule forbids the request",
    "404": "no such request, or no such path",
    "405": "the path does not support this method",
    "409": "the request_id was used with other content",
    "410": "the recorded tokens can no longer be used",
    "429": "too many requests; see Retry-After",
    "500": "internal error; the operators have the log",
    "503": "nothing was recorded; the same request may be sent again",
}
OAUTH_ERROR = {
    "description": "RFC 6749 §5.2",
    "type": "object",
    "required": ["error", "error_description"],
    "properties": {
        "error": _TEXT,
        "error_description": _TEXT,
        "reason": {"enum": sorted(BY_REASON)},
    },
}
TOKEN_ANSWER = {
    "description": "RFC 6749 §5.1, RFC 8693 §2.2.1",
    "type": "object",
    "required": ["access_token", "token_type", "expires_in", "scope"],
    "properties": {
        "access_token": _TEXT,
        "token_type": {"const": "Bearer"},
        "expires_in": {"type": "integer", "minimum": 1},
        "scope": _TEXT,
        "refresh_token": _TEXT,
        "issued_token_type": _TEXT,
    },
}
_TOKEN_FORM = {
    "type": "object",
    "required": ["grant_type"],
    "properties": {
        "grant_type": {"enum": sorted(GRANTS)},
        **dict.fromkeys(
            (
                "scope", "audience", "resource", "refresh_token", "subject_token", "subject_token_type",
                "requested_token_type", "client_id", "client_secret", "client_assertion",
                "client_assertion_type",
            ),
            _TEXT,
        ),
    },
}  # fmt: skip
_ONE_TOKEN = {
    "type": "object",
    "required": ["token"],
    "properties": {"token": _TEXT, "token_type_hint": _TEXT},
}
_STATE = {"type": "object", "required": ["active"], "properties": {"active": {"type": "boolean"}}}
_TRACES = {"type": "object", "required": ["tokens"], "properties": {"tokens": {"type": "array"}}}


def document(issuer: str) -> dict[str, Any]:
    """Return the document of one issuer's endpoints."""
    structs = [struct for struct, _ in TASKS.values()]
    schemas, components = msgspec.json.schema_components(
        [*structs, Answer], ref_template="#/components/schemas/{name}"
    )
    *bodies, answer = schemas
    paths = {
        f"/v1/{names.endpoint(task)}": {
            "post": _operation(
                names.endpoint(task),
                _TRANSFERS,
                what,
                {"application/json": {"schema": body, "example": EXAMPLES[task]}},
                answer,
                answer,
            )
        }
        for (task, (_, what)), body in zip(TASKS.items(), bodies, strict=True)
    }
    questions = [
        {"name": name, "in": "query", "schema": _TEXT}
        for name in ("jti", "path", "external_id", "request_id")
    ]
    what = "Traces of the caller's own tokens; give exactly one parameter"
    traced = _operation("trace", _TRANSFERS, what, None, _TRACES)
    paths["/v1/trace"] = {"get": {**traced, "parameters": questions}}
    paths |= _oauth_paths()
    return {
        "openapi": "3.1.0",
        "info": {"title": "Minter", "version": "1", "license": {"name": "Apache-2.0"}},
        "servers": [{"url": issuer.removesuffix("/")}],
        "security": [{"basic": []}],
        "tags": [
            {"name": _TRANSFERS, "description": "The tasks of the contract, as over AMQP (schemas/)"},
            {"name": _TOKENS, "description": "The token endpoint and its neighbours"},
        ],
        "paths": dict(sorted(paths.items())),
        "components": {
            "securitySchemes": {"basic": {"type": "http", "scheme": "basic"}},
            "schemas": {**components, "OAuthError": OAUTH_ERROR},
        },
    }


def _oauth_paths() -> dict[str, Any]:
    paths: dict[str, Any] = {}
    asked = {
        "grant_type": "client_credentials",
        "audience": "https://se.example.org",
        "scope": "storage.read:/vo/a",
    }
    one = {"token": "eyJhbGciOiJFUzI1NiIsImtpZCI6Ii4uLiJ9..."}
    for path, form, example, told, what in (
        ("token", _TOKEN_FORM, asked, TOKEN_ANSWER, "Client credentials, exchange (RFC 8693), refresh"),
        ("introspect", _ONE_TOKEN, one, _STATE, "Whether a token is active (RFC 7662)"),
        ("revoke", _ONE_TOKEN, one, {"type": "object"}, "Revoke a token that is no longer needed (RFC 7009)"),
    ):
        content = {"application/x-www-form-urlencoded": {"schema": form, "example": example}}
        paths[f"/{path}"] = {"post": _operation(path, _TOKENS, what, content, told)}
    return paths


def _operation(
    name: str,
    tag: str,
    summary: str,
    content: dict[str, Any] | None,
    told: dict[str, Any],
    error: dict[str, Any] | None = None,
) -> dict[str, Any]:
    def answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
        return {"description": description, "content": {"application/json": {"schema": schema}}}

    refused = {"$ref": "#/components/schemas/OAuthError"}
    wrong = {"anyOf": [error, refused]} if error else refused
    made: dict[str, Any] = {
        "operationId": name,
        "tags": [tag],
        "summary": summary,
        "responses": {"200": answer("done", told)} | {s: answer(d, wrong) for s, d in _ERRORS.items()},
    }
    return {**made, "requestBody": {"required": True, "content": content}} if content else made
