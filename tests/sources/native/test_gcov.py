# SPDX-License-Identifier: Apache-2.0
"""The same work in a program for the bridge and in one for gcov: the same code."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bridge.sources.native.source import NativeSource
from tests.sources.native.test_compilers import PROGRAM
from tests.support.native import build, functions, lines, needs_clang, run

WORK = (["small"], ["thread"], ["fork", "small"], ["small", "thread"])


def of_gcov(directory: Path, words: list[str]) -> tuple[set[str], set[int]]:
    """Functions and lines that gcov has for a run of the program, which leaves no other data."""
    for old in directory.glob("*.gcda"):
        old.unlink()
    subprocess.run([directory / "plain", *words], check=True, cwd=directory, capture_output=True)
    done = subprocess.run(
        ["gcov", "--json-format", "--stdout", "plain-program.gcda"],
        cwd=directory,
        capture_output=True,
        check=True,
    )
    (file,) = json.loads(done.stdout)["files"]
    return (
        {each["name"] for each in file["functions"] if each["execution_count"]},
        {each["line_number"] for each in file["lines"] if each["count"]},
    )


@pytest.mark.parametrize(
    ("compiler", "form"),
    [
        pytest.param(
            "clang", "-fsanitize-coverage=trace-pc-guard,pc-table,no-prune", marks=needs_clang
        ),
        pytest.param("gcc", "-fsanitize-coverage=trace-pc"),
    ],
)
def test_blocks_agree_with_gcov(tmp_path: Path, compiler: str, form: str) -> None:
    path = tmp_path / "program.c"
    path.write_text(PROGRAM)
    command = ["gcc", "-g", "-O0", "--coverage", "-pthread", str(path), "-o", "plain"]
    subprocess.run(command, cwd=tmp_path, check=True)
    made = build(tmp_path / "covered", path, "-O0", compiler=compiler, coverage=[form])
    source = NativeSource()
    source.start()
    for words in WORK:
        run(source, made, *words)
        pcs = source.consume()
        their_functions, their_lines = of_gcov(tmp_path, words)
        assert functions(source, pcs) == their_functions
        # A block is where it begins, which may be no statement to gcov: a brace, a declaration.
        beyond = lines(source, pcs) - their_lines
        texts = [PROGRAM.splitlines()[line - 1].strip() for line in beyond]
        assert set(texts) <= {"}", "pthread_t thread;"}
    source.stop()
