"""docs/cluster.md says what `make cluster` measured."""

import json

from tests.cluster.__main__ import table
from tests.conftest import ROOT


def test_the_book_has_the_reports_table() -> None:
    report = json.loads((ROOT / "benchmarks/results-cluster.json").read_text())
    assert table(report) in (ROOT / "docs/cluster.md").read_text()
    assert all(campaign["audit"]["tokens"] for campaign in report["campaigns"])
