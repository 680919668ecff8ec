"""The policy package for Rucio, without Rucio: what it wraps, and what it leaves alone."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from minter.rucio import hooks, wrapped


@pytest.fixture
def fts3(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module as Rucio's, with the signatures that were tested."""

    class FTS3Transfertool:
        def submit(self, transfers: Any, job_params: Any, timeout: Any = None) -> tuple[Any, ...]:
            return self, transfers, job_params, timeout

        def _file_from_transfer(self, transfer: Any, job_params: Any) -> tuple[Any, ...]:
            return self, transfer, job_params

    module: Any = ModuleType("rucio.transfertool.fts3")
    module.FTS3Transfertool = FTS3Transfertool
    monkeypatch.setitem(sys.modules, "rucio.common.exception", ModuleType("rucio.common.exception"))
    return module


def test_a_known_rucio_is_wrapped_once(fts3: Any) -> None:
    before = fts3.FTS3Transfertool.submit
    hooks.wrap(fts3)
    once = fts3.FTS3Transfertool.submit
    assert once is not before
    hooks.wrap(fts3)
    assert fts3.FTS3Transfertool.submit is once


@pytest.mark.parametrize("change", ["gone", "other"])
def test_a_rucio_that_is_not_known_stays_as_it_is(
    fts3: Any, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    if change == "gone":
        del fts3.FTS3Transfertool._file_from_transfer
    else:
        fts3.FTS3Transfertool._file_from_transfer = lambda self, transfer: (self, transfer)
    before = fts3.FTS3Transfertool.submit
    hooks.wrap(fts3)
    assert fts3.FTS3Transfertool.submit is before
    assert "this Rucio is not known" in caplog.text
    assert "_file_from_transfer" in caplog.text


@pytest.mark.parametrize(
    ("value", "is_on"), [(True, True), ("true", True), ("1", True), (False, False), ("no", False)]
)
def test_an_rse_is_switched_by_its_attribute(value: object, is_on: bool) -> None:
    assert hooks.switched({"minter": value}) == is_on
    assert not hooks.switched({})


def test_submodules_are_those_of_the_vos_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vos_policy").mkdir()
    (tmp_path / "vos_policy/__init__.py").touch()
    (tmp_path / "vos_policy/permission.py").write_text("def has_permission(): return 'of the VO'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, wrapped.Submodules("minter.errors", "vos_policy")])
    finder: Any = sys.meta_path[-1]
    spec = finder.find_spec("minter.errors.permission")
    module = spec.loader.create_module(spec)
    assert module.has_permission() == "of the VO"
    assert module is sys.modules["vos_policy.permission"]
    assert finder.find_spec("minter.errors.schema") is None
    assert finder.find_spec("other.permission") is None
