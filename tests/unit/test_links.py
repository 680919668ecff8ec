"""Every link of the documents leads somewhere, and every invariant and decision named in code is in the book."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob(".github/**/*.md"),
    ]
)
SOURCES = sorted(
    path
    for folder in ("minter", "workers", "schemas", "tests", "benchmarks", "examples", "deploy", "docs", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md", ".toml", ".yml", ".sql", ".service", "") and path.is_file()
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
DECISIONS = {path.name[:4].lstrip("0") for path in (ROOT / "docs/adr").glob("*.md")}
INVARIANTS = set(re.findall(r"^## (I\d) ", (ROOT / "docs/design.md").read_text(), re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.replace("`", "").strip().lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(page.read_text()):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


def test_every_invariant_and_decision_that_is_named_is_in_the_book() -> None:
    assert len(INVARIANTS) == 9
    unknown = []
    for path in SOURCES:
        text = path.read_text(errors="replace")
        named = set(re.findall(r"\b(I\d+)(?=[),;: –])", " ".join(re.findall(r"\([^()]*\bI\d[^()]*\)", text))))
        unknown += [f"{path.relative_to(ROOT)}: {name}" for name in named - INVARIANTS]
        adrs = set(re.findall(r"\bADR (\d+)\b", text))
        unknown += [f"{path.relative_to(ROOT)}: ADR {name}" for name in adrs - DECISIONS]
    assert not unknown


def test_every_page_is_in_the_books_contents() -> None:
    contents = (ROOT / "mkdocs.yml").read_text()
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    assert sorted(p for p in pages if f" {p}\n" not in contents) == []
