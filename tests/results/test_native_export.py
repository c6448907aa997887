# SPDX-License-Identifier: Apache-2.0
"""LCOV of native programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.errors import UsageError
from bridge.results.native_export import native_lcov
from bridge.sources.native.source import NativeSource
from tests.support.native import build, needs_clang, run

PROGRAM = """\
__attribute__((noinline)) int ran(int x) {
    return x + 1;
}
__attribute__((noinline)) int idle(int x) {
    return x + 2;
}
int main(int argc, char **argv) {
    volatile int sum = ran(argc);
    if (argc > 5)
        sum += idle(argc);
    return 0;
}
"""


@needs_clang
def test_native_lcov_has_lines_and_functions_that_ran_and_did_not(tmp_path: Path) -> None:
    path = tmp_path / "program.c"
    path.write_text(PROGRAM)
    source = NativeSource()
    source.start()
    run(source, build(tmp_path / "program", path))
    source.consume()
    source.stop()
    source.save(tmp_path / "native.tsv")
    text = native_lcov(tmp_path).decode().splitlines()
    assert f"SF:{path}" in text
    assert {"FNDA:1,ran", "FNDA:0,idle", "FNDA:1,main"} <= set(text)
    assert {"DA:1,1", "DA:4,0"} <= set(text)
    assert text[-1] == "end_of_record"


def test_native_lcov_of_a_run_without_native_programs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no native coverage"):
        native_lcov(tmp_path)
