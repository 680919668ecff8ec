"""The direction of imports between packages, and the modules that pure packages must not import."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FLOORS = [
    {"alive", "backoff", "bounded_http", "errors", "jws", "lines", "logs", "wrapping"},
    {"private_files"},
    {"scopes"},
    {"contract"},
    {"broker"},
    {"client", "storages"},
    {"dirac", "rucio"},
    {"policy"},
    {"fts", "providers"},
    {"tokens"},
    {"database"},
    {"tasks"},
    {"sections"},
    {"settings"},
    {"checks", "metrics", "refresher"},
    {"service"},
    {"key_status"},
    {"heartbeats", "probe", "search", "status"},
    {"issuer"},
    {"console"},
    {"local"},
    {"cli"},
    {"__main__"},
    {"workers"},
]
"""From the ground up: a package imports only itself and packages on floors below its own."""
FLOOR = {package: number for number, packages in enumerate(FLOORS) for package in packages}
PURE = {"errors", "scopes", "contract", "policy"}
CLIENT_NEEDS = {
    "backoff",
    "errors",
    "private_files",
    "scopes",
    "contract",
    "broker",
    "client",
    "rucio",
    "dirac",
    "wrapping",
}
FORBIDDEN = {"sqlalchemy", "celery", "kombu", "httpx", "prometheus_client", "psycopg", "os", "time"}

FILES = [*(ROOT / "minter").rglob("*.py"), *(ROOT / "workers").glob("*.py")]
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}


def _package(name: str) -> str:
    parts = name.removesuffix(".py").split("/")
    return parts[0] if parts[0] == "workers" else parts[1]


def _inside(packages: Iterable[str]) -> list[str]:
    return [name for name in TREES if _package(name) in packages]


def _imported(tree: ast.AST) -> Iterator[str]:
    """Return the dotted names of everything that a module imports, at any place in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _packages_imported(tree: ast.AST) -> Iterator[str]:
    for name in _imported(tree):
        root, _, rest = name.partition(".")
        package = root if root == "workers" else rest.partition(".")[0]
        if root in ("minter", "workers") and package in FLOOR:
            yield package


@pytest.mark.parametrize("name", _inside(FLOOR))
def test_imports_go_down_only(name: str) -> None:
    package = _package(name)
    allowed = {other for other, floor in FLOOR.items() if floor < FLOOR[package]} | {package}
    imported = set(_packages_imported(TREES[name]))
    assert imported <= allowed, f"{name} imports from a floor above: {imported - allowed}"


@pytest.mark.parametrize("name", _inside(PURE))
def test_the_pure_packages_touch_nothing_of_the_world(name: str) -> None:
    assert not FORBIDDEN & {imported.partition(".")[0] for imported in _imported(TREES[name])}
    assert "datetime.now" not in (ROOT / name).read_text()


@pytest.mark.parametrize("name", _inside(CLIENT_NEEDS))
def test_the_client_needs_nothing_of_the_engine(name: str) -> None:
    assert set(_packages_imported(TREES[name])) <= CLIENT_NEEDS


@pytest.mark.parametrize("name", [n for n in TREES if _package(n) not in ("database", "policy")])
def test_sql_stands_in_the_database_package_only(name: str) -> None:
    strings = (
        n.value for n in ast.walk(TREES[name]) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )
    assert not [
        s for s in strings if re.match(r"\s*(SELECT|INSERT INTO|UPDATE \w+ SET|DELETE FROM|WITH \w+ AS)\b", s)
    ]


def test_no_two_classes_share_a_name() -> None:
    found: dict[str, list[str]] = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(name)
    twice = {name: files for name, files in found.items() if len(files) > 1}
    assert not twice
