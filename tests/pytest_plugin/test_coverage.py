# SPDX-License-Identifier: Apache-2.0
"""Lines join the data of a coverage.py that measures, and change nothing of what it measures."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import coverage
import pytest

from bridge.pytest_plugin.coverage import ContextLines, join, write_configured

TEXT = (
    "def first():\n    return 1\n\n\ndef second():\n    return 2\n\n\ndef third():\n    return 3\n"
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package ``joined`` with two modules; the working directory is another one."""
    directory = tmp_path / "source/joined"
    directory.mkdir(parents=True)
    (directory / "__init__.py").touch()
    for name in ("kept.py", "left_out.py"):
        (directory / name).write_text(TEXT)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.syspath_prepend(directory.parent)
    monkeypatch.delenv("COVERAGE_FILE", raising=False)
    yield directory
    for name in [name for name in sys.modules if name.partition(".")[0] == "joined"]:
        del sys.modules[name]


def load() -> ModuleType:
    return importlib.import_module("joined.kept")


@pytest.mark.parametrize("branch", [False, True], ids=["lines", "branches"])
@pytest.mark.parametrize("whole", [False, True], ids=["package", "everything"])
def test_join_active_coverage_gets_the_files_that_it_measures_in_their_contexts(
    package: Path, branch: bool, whole: bool
) -> None:
    kept, left_out = str(package / "kept.py"), str(package / "left_out.py")
    outside = package.parents[1] / "outside.py"
    outside.write_text(TEXT)
    lines = ContextLines()
    lines.add("a test|run", {kept: {2, 10}, left_out: {2}, str(outside): {2}})
    lines.add("", {kept: {6}})
    lines.add("a test|run", {kept: {10}, "/nowhere/\udcff.py": {1}})
    measured = coverage.Coverage(
        data_file="data",
        config_file=False,
        branch=branch,
        source_pkgs=None if whole else ["joined"],
        omit=["*/left_out.py"],
    )
    measured.start()
    try:
        module = load()
        measured.switch_context("mine")
        module.first()
        join(measured, lines)
        module.second()
    finally:
        measured.stop()
    data = measured.get_data()
    assert {Path(file).name for file in data.measured_files()} >= {"kept.py"}
    assert left_out not in data.measured_files()
    assert (str(outside) in data.measured_files()) is whole
    contexts = {line: set(found) for line, found in data.contexts_by_lineno(kept).items()}
    assert contexts[2] == {"mine", "a test|run"}
    assert contexts[6] == {"mine", ""}
    assert contexts[10] == {"a test|run"}
    assert data.has_arcs() is branch
    if branch:
        # What was measured alone says from where to where.
        arcs = data.arcs(kept) or []
        assert (10, 10) in arcs
        assert not [arc for arc in arcs if 10 in arc and arc != (10, 10)]
    data.close(force=True)


def test_join_report_of_joined_lines_counts_them_once(package: Path) -> None:
    kept = str(package / "kept.py")
    measured = coverage.Coverage(data_file="data", config_file=False, source_pkgs=["joined"])
    measured.start()
    try:
        load().first()
        lines = ContextLines()
        lines.update({"a|run": {kept: [2, 6]}, "b|run": {kept: [2]}})
        join(measured, lines)
        join(measured, lines)
    finally:
        measured.stop()
    measured.save()
    _, statements, _, missing, _ = measured.analysis2(kept)
    assert (statements, missing) == ([1, 2, 5, 6, 9, 10], [10])


def test_write_configured_follows_the_configuration_of_coverage(package: Path) -> None:
    Path(".coveragerc").write_text(
        "[run]\nbranch = true\nparallel = true\ncontext = nightly\ndata_file = there/data\n"
    )
    lines = ContextLines()
    lines.add("a test|run", {str(package / "kept.py"): {2}})
    file = write_configured(lines)
    assert file.parent == Path("there").absolute()
    assert file.name.startswith("data.")
    data = coverage.CoverageData(basename=str(file))
    data.read()
    assert data.has_arcs()
    assert data.contexts_by_lineno(str(package / "kept.py")) == {2: ["nightly|a test|run"]}
    data.close(force=True)
    # What coverage.py itself would do with it.
    joined = coverage.Coverage()
    joined.combine()
    assert joined.get_data().measured_contexts() == {"nightly|a test|run"}
    joined.get_data().close(force=True)
