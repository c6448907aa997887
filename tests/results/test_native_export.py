# SPDX-License-Identifier: Apache-2.0
"""LCOV of native programs."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bridge.errors import UsageError
from bridge.results.native_export import native_lcov
from bridge.results.report import EXPORTS, gather
from bridge.results.report.page import page_data
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


@pytest.fixture(name="directory")
def _directory(tmp_path: Path) -> Path:
    """A run directory of the program."""
    path = tmp_path / "program.c"
    path.write_text(PROGRAM)
    source = NativeSource()
    source.start()
    run(source, build(tmp_path / "program", path))
    source.consume()
    source.stop()
    source.save(tmp_path / "native.tsv")
    return tmp_path


@needs_clang
def test_report_has_native_files_with_their_lines_and_totals(directory: Path) -> None:
    with gather([directory]) as (report, host):
        data = page_data(report, None)
        json_text, xml, lcov = (
            EXPORTS[kind](report, host, None) for kind in ("json", "cobertura", "lcov")
        )
    (file,) = data["files"]
    assert file["name"].endswith("program.c")
    assert "\n".join(file["text"]) == PROGRAM
    reached, statements = (set(file[key]) for key in ("reached", "statements"))
    assert 4 in statements - reached
    assert 1 in reached
    assert {name for name, _, _ in file["functions"]} == {"ran", "idle", "main"}
    totals = data["totals"]
    assert 0 < totals["nativeCovered"] < totals["nativeBlocks"]
    assert 0 < totals["reached"] < totals["statements"]
    native = json.loads(json_text)["native"]
    assert native["blocks_total"] == totals["nativeBlocks"]
    lines = native["files"][str(directory / "program.c")]
    assert 4 in lines["missing_lines"]
    assert 1 in lines["executed_lines"]
    package = ET.fromstring(xml).find("packages/package")
    assert package is not None
    assert package.get("name") == "native"
    assert lcov == native_lcov(directory).decode()


@needs_clang
def test_native_lcov_has_lines_and_functions_that_ran_and_did_not(directory: Path) -> None:
    text = native_lcov(directory).decode().splitlines()
    assert f"SF:{directory}/program.c" in text
    assert {"FNDA:1,ran", "FNDA:0,idle", "FNDA:1,main"} <= set(text)
    assert {"DA:1,1", "DA:4,0"} <= set(text)
    assert text[-1] == "end_of_record"


def test_native_lcov_of_a_run_without_native_programs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no native coverage"):
        native_lcov(tmp_path)
