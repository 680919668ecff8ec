import re

import pytest

from tests.conftest import ROOT
from tests.write_docs import PAGES


@pytest.mark.parametrize("name", PAGES)
def test_pages_made_from_code_are_up_to_date(name):
    assert (ROOT / "docs" / name).read_text() == PAGES[name](), "run python -m tests.write_docs"


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_every_ignored_lint_rule_has_its_reason():
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("ignore = [") : text.index("[tool.ruff.lint.per-file-ignores]")]
    assert all("#" in line for line in block.splitlines() if line.strip().startswith('"'))
