"""Write the documents that are generated from code: `python -m tests.write_docs`. A test compares them."""

import json
from urllib.parse import urlencode

import msgspec

from minter import metrics, sections
from minter.contract import operations
from minter.issuer import openapi
from minter.policy.exchanges import Exchange
from minter.policy.routes import FTSInstance, Route
from minter.providers.dialects import PROVIDER_DIALECTS, Provider
from minter.storages import dialects
from minter.storages.directory import Endpoint, Storage
from minter.storages.from_rucio import RSERule
from minter.tokens.keys import RotationPolicy
from tests.conftest import ROOT


def dialects_page() -> str:
    lines = [
        "# Storage dialects",
        "",
        "Written from `minter/storages/dialects.py` by `python -m tests.write_docs`; a test compares. A cell names what an operation",
        "needs in one token; *parent* is the file's directory. *Tried* means run against the real software.",
        "",
        "| dialect | software | "
        + " | ".join(operations.OPERATIONS)
        + " | paths | matching | audience | token bytes | tried |",
        "|" + "---|" * (7 + len(operations.OPERATIONS)),
    ]
    for d in dialects.DIALECTS.values():
        cells = [
            ", ".join(
                n.scope.removeprefix("storage.") + (" *parent*" if n.where == "parent" else "")
                for n in d.scopes[o]
            )
            for o in operations.OPERATIONS
        ]
        lines.append(
            f"| `{d.name}` | {d.software} | {' | '.join(cells)} | {d.encoding} | {d.matching} | {d.audience_form} | "
            f"{d.max_token_bytes} | {'yes' if d.tried else 'no'} |"
        )
    lines += ["", "## Sources and quirks", ""]
    for d in dialects.DIALECTS.values():
        lines.append(f"- `{d.name}`: {d.source}")
        lines += [
            f"  - **{q.name}**: {q.meaning} ({q.source}; {'tried' if q.tried else 'not tried'})"
            for q in d.quirks
        ]
    lines += [
        "",
        "## External IAMs",
        "",
        "Written from `minter/providers/dialects.py`. *Target* is the parameter for audiences (of an exchange / of client credentials);",
        "*offline* how a refresh token is asked for; *reuse* whether a refresh token whose answer was lost works again.",
        "",
        "| dialect | software | target | offline | reuse | source | tried |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in PROVIDER_DIALECTS.values():
        several = ", one each" if p.separate else ""
        offline = " and ".join(
            name for name, on in (("requested_token_type", p.refresh_type), ("scope", p.offline_scope)) if on
        )
        lines.append(
            f"| `{p.name}` | {p.software} | {p.target} / {p.credentials_target}{several} | {offline} | {p.reuse} | "
            f"{p.source} | {'yes' if p.tried else 'no'} |"
        )
    return "\n".join(lines) + "\n"


PARTS: dict[str, type[msgspec.Struct]] = {
    "": sections.Settings,
    "[database]": sections.DatabaseSettings,
    "[broker]": sections.BrokerSettings,
    "[worker]": sections.WorkerSettings,
    "[http]": sections.HttpSettings,
    "[console]": sections.ConsoleSettings,
    "[metrics]": sections.MetricsSettings,
    "[rotation]": RotationPolicy,
    "[issuers.VO]": sections.IssuerSettings,
    "[issuers.VO.co_issuer]": sections.CoIssuerSettings,
    "[[storages]]": Storage,
    "[[storages.endpoints]]": Endpoint,
    "[[providers]]": Provider,
    "[[rucio]]": sections.RucioSettings,
    "[[rucio.rses]]": RSERule,
    "[[routes]]": Route,
    "[[fts]]": FTSInstance,
    "[[exchanges]]": Exchange,
    "[[fts_events]]": sections.FTSEventsSettings,
    "[drill]": sections.DrillSettings,
}


def settings_page() -> str:
    lines = [
        "# Settings",
        "",
        "Written from the code by `python -m tests.write_docs`; a test compares. Durations are in seconds, rates in bytes a",
        "second, where the name says so. Unknown keys are refused.",
        "",
    ]
    for table, part in PARTS.items():
        lines += [
            f"## {table or 'top level'}",
            "",
            " ".join((part.__doc__ or "").split()),
            "",
            "| key | default |",
            "|---|---|",
        ]
        for field in msgspec.structs.fields(part):
            required = field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT
            shown = (
                "*required*"
                if required
                else "the shipped routes"
                if field.name == "routes"
                else _toml(field.default)
            )
            lines.append(f"| `{field.name}` | {shown} |")
        lines.append("")
    return "\n".join(lines)


def _toml(value: object) -> str:
    if isinstance(value, msgspec.Struct):
        return "see below"
    if value is None:
        return "not set"
    return f"`{msgspec.json.encode(value).decode()}`"


def metrics_page() -> str:
    lines = [
        "# Metrics",
        "",
        "Written from `minter/metrics.py` by `python -m tests.write_docs`; a test compares. Each process serves its own at",
        "`/metrics` on the first free port of its role (`[metrics]` in docs/settings.md); counters end in `_total`. Durations are in seconds. Labels are bounded:",
        "none holds a sub, a jti, a path or a request_id.",
        "",
        "| metric | type | labels | what it says |",
        "|---|---|---|---|",
    ]
    for spec in metrics.SPECS:
        name = spec.name + ("_total" if spec.kind == "counter" else "")
        lines.append(f"| `{name}` | {spec.kind} | {', '.join(spec.labels) or '–'} | {spec.help} |")
    return "\n".join(lines) + "\n"


def http_page() -> str:
    told = openapi.document("https://tokens.example.org/vo/")
    lines = [
        "# HTTP",
        "",
        "Written from `minter/issuer/openapi.py` by `python -m tests.write_docs`; a test compares. Each issuer has these endpoints below its URL, and the",
        "whole description, with the schemas of bodies and answers, at `openapi.json` (OpenAPI 3.1). A client authenticates by HTTP Basic, by `client_secret_post`",
        "at the OAuth endpoints, or by an assertion (RFC 7523). Errors have the form of RFC 6749 §5.2 with a `reason` of [errors](errors.md).",
    ]
    for tag in told["tags"]:
        lines += ["", f"## {tag['name']}", "", f"{tag['description']}."]
        for path, methods in told["paths"].items():
            for method, operation in methods.items():
                if operation["tags"] != [tag["name"]]:
                    continue
                lines += ["", f"### {method.upper()} `{path}`", "", f"{operation['summary']}."]
                for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                    shown = json.dumps(content["example"], indent=2)
                    if kind != "application/json":
                        shown = urlencode(content["example"], safe=":/")
                    lines += ["", f"`{kind}`:", "", *(f"    {line}" for line in shown.splitlines())]
                if parameters := operation.get("parameters"):
                    lines += ["", "Parameters: " + ", ".join(f"`{p['name']}`" for p in parameters) + "."]
    answers = told["paths"]["/token"]["post"]["responses"]
    lines += ["", "## Status codes", "", "| status | meaning |", "|---|---|"]
    lines += [f"| {status} | {answer['description']} |" for status, answer in answers.items()]
    return "\n".join(lines) + "\n"


PAGES = {
    "reference/http.md": http_page,
    "dialects.md": dialects_page,
    "metrics.md": metrics_page,
    "settings.md": settings_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")
