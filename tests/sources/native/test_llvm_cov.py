# SPDX-License-Identifier: Apache-2.0
"""The same work in a program for the bridge and in one for llvm-cov: the same functions and lines.

The program is random, and the same on each run: 4,000 lines, 120 functions, branches in branches.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from bisect import bisect_right
from pathlib import Path

import pytest

from bridge.sources import PC
from bridge.sources.guest_kernel.debug_file import DebugFile
from bridge.sources.native.source import NativeSource
from tests.support.native import build, functions, needs_clang, run
from tests.support.random_c import random_program

pytestmark = [
    needs_clang,
    pytest.mark.skipif(
        shutil.which("llvm-cov") is None, reason="llvm-cov is missing: apt-get install llvm"
    ),
]

WORK = (("4", "17"), ("9",), ("1", "2", "3", "50", "77", "121"))
EVERY_BLOCK = [
    "-fsanitize-coverage=trace-pc-guard,pc-table,no-prune",
    "-fsanitize-coverage=inline-8bit-counters,pc-table,no-prune",
]
BRACES = {"}", "} else {", "{"}


@pytest.fixture(name="directory", scope="module")
def _directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the program, also as ``plain``, built for llvm-cov."""
    directory = tmp_path_factory.mktemp("llvm")
    (directory / "program.c").write_text(random_program(7, 120))
    flags = ("-g", "-O0", "-fprofile-instr-generate", "-fcoverage-mapping")
    done = subprocess.run(
        ["clang", *flags, "program.c", "-o", "plain"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    if "libclang_rt.profile" in done.stderr:
        pytest.skip("clang's profile library is missing: apt-get install libclang-rt-dev")
    assert done.returncode == 0, done.stderr
    return directory


def of_llvm(directory: Path, words: tuple[str, ...]) -> tuple[set[str], dict[int, bool]]:
    """The functions that llvm-cov has for a run, and its lines, each with whether it ran."""
    raw, data = directory / "raw", directory / "data"
    environment = {**os.environ, "LLVM_PROFILE_FILE": str(raw)}
    subprocess.run([directory / "plain", *words], env=environment, check=True)
    subprocess.run(["llvm-profdata", "merge", "-o", data, raw], check=True)

    def export(*kind: str) -> str:
        command = ["llvm-cov", "export", *kind, "-instr-profile", str(data)]
        command.append(str(directory / "plain"))
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    (exported,) = json.loads(export())["data"]
    names = {each["name"].rpartition(":")[2] for each in exported["functions"] if each["count"]}
    lines = {}
    for record in export("-format=lcov").splitlines():
        if record.startswith("DA:"):
            line, count = record.removeprefix("DA:").split(",")
            lines[int(line)] = count != "0"
    return names, lines


def of_bridge(source: NativeSource, program: Path, pcs: set[PC]) -> dict[int, bool]:
    """The lines that have code, each with whether it ran: the code of a block is up to the next."""
    source.refresh()
    (module,) = source.table
    blocks = sorted((module.address(at), module.pc(at) in pcs) for at in range(module.count))
    starts = [start for start, _ in blocks]
    lines: dict[int, bool] = {}
    file = DebugFile(program)
    for unit in file.units():
        for address, name, line in file.rows(unit):
            at = bisect_right(starts, address) - 1
            if at >= 0 and line and name is not None and name.endswith("program.c"):
                lines[line] = lines.get(line, False) or blocks[at][1]
    file.close()
    return lines


@pytest.mark.parametrize("form", EVERY_BLOCK)
def test_lines_and_functions_agree_with_llvm_cov(
    directory: Path, tmp_path: Path, form: str
) -> None:
    made = build(tmp_path / "covered", directory / "program.c", "-O0", coverage=[form])
    text = (directory / "program.c").read_text().splitlines()
    for words in WORK:
        source = NativeSource()
        source.start()
        assert run(source, made, *words).returncode == 0
        pcs = source.consume()
        ours = of_bridge(source, made, set(pcs))
        their_functions, theirs = of_llvm(directory, words)
        assert functions(source, pcs) == their_functions
        source.stop()
        assert ours.keys() <= theirs.keys()
        # A line of braces has the end of a branch that did not run, and the start of one that did.
        statements = {line for line in ours if text[line - 1].strip() not in BRACES}
        assert len(statements) > 2500
        assert {line for line in statements if ours[line] != theirs[line]} == set()
        # Only these have no code of their own.
        without = {text[line - 1].strip() for line in theirs.keys() - ours.keys()}
        assert {each.partition(" ")[0] for each in without} <= {"}", "case", "default:", "break;"}


def test_functions_of_pruned_blocks_agree_with_llvm_cov(directory: Path, tmp_path: Path) -> None:
    form = "-fsanitize-coverage=trace-pc-guard,pc-table"
    made = build(tmp_path / "covered", directory / "program.c", "-O0", coverage=[form])
    for words in WORK:
        source = NativeSource()
        source.start()
        run(source, made, *words)
        assert functions(source, source.consume()) == of_llvm(directory, words)[0]
        source.stop()
