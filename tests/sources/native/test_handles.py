# SPDX-License-Identifier: Apache-2.0
"""Work of native programs on behalf of handles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from bridge.sources.native.build import build_runtime
from bridge.sources.native.source import NativeSource
from tests.support.native import build, functions, needs_clang, run

PROGRAM = """\
#include <kcov_bridge.h>
#include <stdio.h>
__attribute__((noinline)) int before(int x) { return x + 1; }
__attribute__((noinline)) int on_behalf(int x) { return x + 2; }
__attribute__((noinline)) int after(int x) { return x + 3; }
int main(int argc, char **argv) {
    volatile int sum = before(argc);
    kcov_bridge_handle_begin(0x100000000000007);
    for (int i = 0; i < 3; i++) sum += on_behalf(i);
    kcov_bridge_handle_end();
    sum += after(argc);
    return 0;
}
"""


@pytest.mark.parametrize(
    ("compiler", "form"),
    [
        pytest.param("clang", "-fsanitize-coverage=trace-pc-guard,pc-table", marks=needs_clang),
        pytest.param("gcc", "-fsanitize-coverage=trace-pc"),
    ],
)
def test_handles_their_blocks_are_delivered_apart(tmp_path: Path, compiler: str, form: str) -> None:
    path = tmp_path / "program.c"
    path.write_text(PROGRAM)
    made = build(
        *(tmp_path / "program", path, f"-I{build_runtime().directory}"),
        compiler=compiler,
        coverage=[form],
    )
    delivered: list[tuple[int, Sequence[int]]] = []
    source = NativeSource()
    source.start(None, lambda handle, pcs: delivered.append((handle, pcs)))
    assert run(source, made).returncode == 0
    ((handle, pcs),) = delivered
    assert handle == 0x100000000000007
    assert "on_behalf" in functions(source, pcs)
    assert len(set(pcs)) == len(pcs)
    others = functions(source, source.consume())
    assert {"before", "after"} <= others
    assert "on_behalf" not in others
    source.stop()
    # Without a bridge that takes them nothing waits.
    assert run(source, made).returncode == 0
