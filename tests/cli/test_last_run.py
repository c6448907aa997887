# SPDX-License-Identifier: Apache-2.0
"""Which run ``symbolize`` and ``export`` are about when ``--run`` is left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bridge.cli.last_run import DEFAULT_RUN, remember
from bridge.config import Settings
from bridge.sources.pcs import BlockTable


def _run(directory: Path, name: str) -> Path:
    """A run directory with one block, in a file of this name."""
    directory.mkdir(parents=True)
    table = BlockTable.from_sources({f"pkg/{name}.py": "a = 1\n"})
    table.save(directory / "blocks.tsv")
    (directory / "pcs.txt").write_text("".join(f"{pc:#x}\n" for pc, _ in table))
    return directory


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def _symbolize(*options: str, stdin: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bridge", "symbolize", *options]
    if stdin is None:
        return subprocess.run(command, input="", capture_output=True, text=True)
    with stdin.open() as file:
        return subprocess.run(command, stdin=file, capture_output=True, text=True)


def test_run_directory_of_a_redirected_file_is_its_own(tmp_path: Path) -> None:
    wrote, last = _run(tmp_path / "wrote", "wrote"), _run(tmp_path / "last", "last")
    remember(last)
    done = _symbolize(stdin=wrote / "pcs.txt")
    assert done.returncode == 0, done.stderr
    assert "pkg/wrote.py" in done.stdout
    assert f"run directory: {wrote} (its pcs.txt is read; --run DIR" in done.stderr


def test_run_directory_of_a_pipe_is_the_last_runs(tmp_path: Path) -> None:
    _run(tmp_path / DEFAULT_RUN, "default")
    remember(_run(tmp_path / "last", "last"))
    done = _symbolize("--all")
    assert "pkg/last.py" in done.stdout
    assert f"run directory: {tmp_path / 'last'} (the last run;" in done.stderr


def test_run_directory_without_a_last_run_is_the_default(tmp_path: Path) -> None:
    assert Settings().out == DEFAULT_RUN.absolute()
    _run(tmp_path / DEFAULT_RUN, "default")
    remember(tmp_path / "no" / "results")
    assert "pkg/default.py" in _symbolize("--all").stdout


def test_run_directory_that_was_removed_is_not_used(tmp_path: Path) -> None:
    _run(tmp_path / DEFAULT_RUN, "default")
    last = _run(tmp_path / "last", "last")
    remember(last)
    (last / "blocks.tsv").unlink()
    assert "pkg/default.py" in _symbolize("--all").stdout


def test_run_directory_that_is_given_is_used_in_silence(tmp_path: Path) -> None:
    remember(_run(tmp_path / "last", "last"))
    given = _run(tmp_path / "given", "given")
    done = _symbolize("--all", "--run", str(given))
    assert "pkg/given.py" in done.stdout
    assert done.stderr == ""


def test_remember_in_a_cache_that_cannot_be_written_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path / "file" / "cache"))
    remember(_run(tmp_path / "last", "last"))
    assert (tmp_path / "file").read_text() == "in the way"
