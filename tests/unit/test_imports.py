"""The direction of imports, and what the pure part must not touch (style.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ROWS = [
    {"errors"},
    {"scopes", "contract", "dialects"},
    {"keys", "storages", "clients"},
    {"routes", "rucio", "sites", "wishes", "exchanges", "providers", "budgets"},
    {"requests", "dirac"},
    {"plans", "followups", "fts_events"},
    {"policy", "claims", "sharing"},
    {"capabilities", "managed"},
    {"records"},
    {"outcomes"},
    {"mint"},
    {"answers", "renewals"},
    {"keystore", "bounded"},
    {
        "database",
        "embedded",
        "settings",
        "amqp",
        "migrations",
        "rabbitmq",
        "logs",
        "publish",
        "iam",
        "fake_iam",
    },
    {"health"},
    {"keeping"},
    {"catalogue", "housekeeping", "recording", "lives", "alive", "stories", "gather", "ratelimits"},
    {"keyring", "metrics", "archive", "dispatch", "credentials", "documents"},
    {"pushes", "subjects"},
    {"stand_ins"},
    {"keeper"},
    {"transport", "transport_http"},
    {"wiring", "client"},
    {"stack", "web"},
    {"transfers", "issuer"},
    {"serve"},
    {"console"},
    {"demo", "drill", "cli_clients", "cli_control", "cli_publish", "cli_storages", "cli_trace"},
    {"cli"},
]
PURE = set().union(*ROWS[:11])
MAY_IMPORT_BESIDE = {("rabbitmq", "contract"), ("amqp", "contract")}
CLIENT_NEEDS = {
    "amqp",
    "contract",
    "errors",
    "requests",
    "followups",
    "dialects",
    "transport",
    "transport_http",
    "wishes",
}
FORBIDDEN_NAMES = {"sqlalchemy", "celery", "kombu", "httpx", "prometheus_client", "psycopg", "os", "time"}


def _modules():
    return {p.stem: ast.parse(p.read_text()) for p in (ROOT / "minter").glob("*.py") if p.stem != "__init__"}


def _imports(tree):
    """Names imported anywhere in a module: ours without the prefix, others by their top name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                alias.name.split(".")[-1 if alias.name.startswith("minter.") else 0] for alias in node.names
            )
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "minter":
                yield from (alias.name for alias in node.names)
            else:
                yield node.module.split(".")[-1 if node.module.startswith("minter.") else 0]


MODULES = _modules()


def test_every_module_has_its_row():
    assert set(MODULES) == set().union(*ROWS)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_up_only(name):
    row = next(i for i, names in enumerate(ROWS) if name in names)
    above = set().union(*ROWS[:row])
    ours = {n for n in _imports(MODULES[name]) if n in MODULES}
    assert ours <= above, f"{name} imports below or beside itself: {ours - above}"


@pytest.mark.parametrize("name", sorted(PURE))
def test_the_pure_part_touches_nothing_of_the_world(name):
    assert not FORBIDDEN_NAMES & set(_imports(MODULES[name]))
    source = (ROOT / "minter" / f"{name}.py").read_text()
    assert "datetime.now" not in source


def test_the_client_stands_alone():
    assert {n for n in _imports(MODULES["client"]) if n in MODULES} <= CLIENT_NEEDS
    for name in CLIENT_NEEDS:
        assert {n for n in _imports(MODULES[name]) if n in MODULES} <= CLIENT_NEEDS


def test_nothing_in_minter_knows_the_workers():
    assert not [n for n, tree in MODULES.items() if "workers" in set(_imports(tree))]
