# SPDX-License-Identifier: Apache-2.0
"""The default workload, on file systems of this machine: what is no finding there is none."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

WORKLOAD = Path(__file__).resolve().parents[1] / "guest" / "workload" / "files.sh"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory like the ones that targets serve, with a blank in a name."""
    top = tmp_path / "tree"
    (top / "sub" / "deeper").mkdir(parents=True)
    (top / "README").write_text("a line\n")
    (top / "sub" / "empty").touch()
    (top / "sub" / "with blank").write_bytes(bytes(range(256)) * 20)
    (top / "sub" / "deeper" / "large").write_bytes(b"0123456\n" * 5000)
    return top


def run(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(
        ["sh", str(WORKLOAD), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def contents(top: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(top)): path.read_bytes() if path.is_file() else None
        for path in top.rglob("*")
    }


def test_workload_posix_file_system_passes_and_is_left_as_it_was(tree: Path) -> None:
    before = contents(tree)
    done = run(str(tree))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^3\d ok, 0 findings, 0 failed$", done.stdout, re.MULTILINE), done.stdout
    for deed in ("list", "walk", "stat and read 4 files", "create", "rename", "remove", "append"):
        assert re.search(rf"^ok +{deed}", done.stdout, re.MULTILINE), deed
    assert done.stderr == ""
    assert contents(tree) == before


def test_workload_no_directory_is_wrong_usage(tree: Path) -> None:
    done = run(str(tree / "README"))
    assert done.returncode == 2
    assert "is no directory" in done.stderr


def fake(directory: Path, name: str, script: str) -> str:
    directory.mkdir(exist_ok=True)
    program = directory / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(directory)


def test_workload_wrong_sizes_fail(tree: Path, tmp_path: Path) -> None:
    path = fake(tmp_path / "bin", "stat", '/usr/bin/stat "$@" | sed "s/^7 /8 /"')
    done = run(str(tree), path=path)
    assert done.returncode == 1
    assert "FAIL     stat and read disagree on a size" in done.stdout
    assert re.search(r"\b1 failed$", done.stdout, re.MULTILINE)


def test_workload_different_copy_fails(tree: Path, tmp_path: Path) -> None:
    path = fake(tmp_path / "bin", "cp", '/bin/cp "$@"; for last; do :; done; echo >>"$last/README"')
    done = run(str(tree), path=path)
    assert done.returncode == 1
    assert "FAIL     the copied tree differs" in done.stdout


def test_workload_refused_operation_is_a_finding(tree: Path, tmp_path: Path) -> None:
    refuse = 'echo "refused: Operation not permitted" >&2; exit 1'
    for name in ("mkdir", "chmod", "mv", "ln", "truncate"):
        fake(tmp_path / "bin", name, refuse)
    done = run(str(tree), path=str(tmp_path / "bin"))
    assert done.returncode == 0, done.stdout
    for text in ("make a directory", "chmod 600", "rename", "hard link", "truncate to 10 bytes"):
        assert f"finding  {text} is refused: refused: Operation not permitted" in done.stdout
    assert "5 findings, 0 failed" in done.stdout
