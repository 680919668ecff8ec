import re
from pathlib import Path

import pytest

from minter import metrics
from tests.conftest import ROOT
from tests.write_docs import PAGES


@pytest.mark.parametrize("name", PAGES)
def test_pages_made_from_code_are_up_to_date(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == PAGES[name](), "run python -m tests.write_docs"


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_every_ignored_lint_rule_has_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("ignore = [") : text.index("[tool.ruff.lint.per-file-ignores]")]
    assert all("#" in line for line in block.splitlines() if line.strip().startswith('"'))


def test_every_alert_names_a_metric_of_ours_and_a_section_of_the_on_call_page() -> None:
    rules = (ROOT / "deploy/prometheus-rules.yml").read_text()
    series = {
        name for spec in metrics.SPECS for name in (spec.name, f"{spec.name}_total", f"{spec.name}_bucket")
    }
    assert set(re.findall(r"\bminter_\w+", rules)) - series == set()
    page = (ROOT / "docs/on-call.md").read_text()
    sections = {title.lower().replace(" ", "-") for title in re.findall(r"^## (.+)$", page, re.MULTILINE)}
    assert set(re.findall(r"page: ([\w-]+)\}", rules)) - sections == set()
