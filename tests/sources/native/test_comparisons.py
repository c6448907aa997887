# SPDX-License-Identifier: Apache-2.0
"""What native programs compare, in Linux' records."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.device.abi import KCOV_CMP_CONST, KCOV_CMP_SIZE
from bridge.sources.native.source import NativeSource
from tests.support.native import build, functions, needs_clang, run

PROGRAM = """\
#include <stdint.h>
#include <stdlib.h>
__attribute__((noinline)) int word(uint32_t x) { return x == 0xfeedf00d ? 1 : 2; }
__attribute__((noinline)) int both(uint64_t x, uint64_t y) { return x < y ? 1 : 2; }
__attribute__((noinline)) int cases(int x) {
    switch (x) { case 1001: return 7; case 2002: return 9; case 3003: return 4; default: return 0; }
}
int main(int argc, char **argv) {
    uint64_t x = strtoull(argv[1], NULL, 0);
    volatile int sum = word((uint32_t)x) + both(x, 77) + cases((int)x);
    return sum == 0;
}
"""


@pytest.mark.parametrize(
    ("compiler", "form"),
    [
        pytest.param("clang", "trace-pc-guard,pc-table,trace-cmp", marks=needs_clang),
        pytest.param("gcc", "trace-pc,trace-cmp"),
    ],
)
def test_comparisons_have_linux_records(tmp_path: Path, compiler: str, form: str) -> None:
    path = tmp_path / "program.c"
    path.write_text(PROGRAM)
    coverage = [f"-fsanitize-coverage={each}" for each in form.split(",")]
    if compiler == "clang":
        coverage = [f"-fsanitize-coverage={form}"]
    made = build(tmp_path / "program", path, compiler=compiler, coverage=coverage)
    source = NativeSource()
    source.start()
    run(source, made, "5")
    assert source.consume_comparisons() == ([], 0)
    source.record_comparisons(True)
    assert source.consume_comparisons() == ([], 0)
    run(source, made, "3000")
    records, lost = source.consume_comparisons()
    assert lost == 0
    constant = KCOV_CMP_SIZE(2) | KCOV_CMP_CONST
    by_operands = {record[1:3]: record for record in records}
    kind, _, _, pc = by_operands[0xFEEDF00D, 3000]
    assert kind == constant
    assert functions(source, [pc]) == {"word"}
    assert by_operands[3000, 77][0] == KCOV_CMP_SIZE(3)
    assert {(1001, 3000), (2002, 3000), (3003, 3000)} <= set(by_operands)
    source.record_comparisons(False)
    run(source, made, "3000")
    assert source.consume_comparisons() == ([], 0)
    source.stop()
