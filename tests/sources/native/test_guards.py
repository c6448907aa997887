# SPDX-License-Identifier: Apache-2.0
"""clang's trace-pc-guard under the run time, without a guest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.sources.native.modules import NATIVE_BASE, NATIVE_END, ModuleTable
from bridge.sources.native.source import NativeSource
from bridge.sources.pcs import SLOT_BYTES
from tests.support.native import build, functions, lines, needs_clang, run

pytestmark = needs_clang

PROGRAM = """\
#include <stdio.h>
#include <stdlib.h>
__attribute__((noinline)) int small(int x) { return x + 1; }
__attribute__((noinline)) int large(int x) { return x * 3; }
int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        int x = atoi(argv[i]);
        printf("%d\\n", x < 10
            ? small(x)
            : large(x));
    }
    return 0;
}
"""


@pytest.fixture(name="source")
def _source() -> Iterator[NativeSource]:
    source = NativeSource()
    source.start()
    yield source
    source.stop()


@pytest.fixture(name="program")
def _program(tmp_path: Path) -> Path:
    path = tmp_path / "program.c"
    path.write_text(PROGRAM)
    return build(tmp_path / "program", path)


def test_guards_a_run_has_the_blocks_that_ran(source: NativeSource, program: Path) -> None:
    assert run(source, program, "3").stdout == "4\n"
    first = source.consume()
    assert functions(source, first) == {"main", "small"}
    assert all(NATIVE_BASE <= pc < NATIVE_END and pc % SLOT_BYTES == 8 for pc in first)
    run(source, program, "30")
    second = source.consume()
    assert functions(source, second) == {"main", "large"}
    assert {10} <= lines(source, second)
    assert source.consume() == []
    assert source.blocks_covered == len({*first, *second}) <= source.blocks_total


def test_guards_pcs_are_the_same_in_another_source(source: NativeSource, program: Path) -> None:
    other = NativeSource()
    other.start()
    try:
        run(source, program, "3")
        run(other, program, "3")
        assert source.consume() == other.consume() != []
    finally:
        other.stop()


def test_guards_without_the_bridge_nothing_happens(program: Path) -> None:
    assert run(NativeSource(), program, "3").stdout == "4\n"


def test_modules_are_saved_and_loaded(source: NativeSource, program: Path, tmp_path: Path) -> None:
    run(source, program, "3")
    pcs = source.consume()
    source.save(tmp_path / "native.tsv")
    table = ModuleTable.load(tmp_path / "native.tsv")
    (module,) = table
    assert module.path == str(program)
    assert [module.pc(i) for i, ran in enumerate(module.covered) if ran] == sorted(pcs)
    for pc in pcs:
        assert table.lookup(pc) == table.lookup(pc - 5) == table.lookup(pc + 7)
    assert len(table) == source.blocks_total
