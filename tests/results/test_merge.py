# SPDX-License-Identifier: Apache-2.0
"""The results of several guests as those of one run."""

from __future__ import annotations

from array import array
from pathlib import Path

import coverage
import pytest

from bridge.errors import BridgeError
from bridge.results.merge import covered_blocks, merge_results, merge_stats
from bridge.session.stats import Stats
from bridge.sources.native.modules import ModuleTable
from bridge.sources.pcs import BlockTable
from tests.support.coverage_data import executed

SOURCE = "a = 1\nif a:\n    b = 2\nelse:\n    b = 3\n"
BASE = 0xFFFF_FFFF_8100_0000


def results(directory: Path, module: Path, lines: list[int], blocks: dict[int, int]) -> Path:
    """What a guest leaves that covered these lines and these blocks of the kernel."""
    directory.mkdir()
    data = coverage.CoverageData(str(directory / ".coverage"))
    data.add_lines({str(module): lines})
    data.write()
    data.close()
    BlockTable.from_sources({"pkg/module.py": SOURCE}).save(directory / "blocks.tsv")
    text = "".join(f"{BASE + at:#x}\t{size}\n" for at, size in blocks.items())
    (directory / "kernel-blocks.tsv").write_text(text)
    return directory


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "pkg" / "module.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


def test_merge_results_of_two_guests_are_those_of_both(tmp_path: Path, module: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    first = results(tmp_path / "1", module, [1, 2, 3], {0: 16, 32: 4})
    merge_results(first, run)
    assert covered_blocks(run).kernel == 2
    merge_results(results(tmp_path / "2", module, [1, 2, 5], {32: 8, 64: 4}), run)
    assert executed(run / ".coverage") == {str(module): [1, 2, 3, 5]}
    assert (run / "kernel-blocks.tsv").read_text().split() == [
        *(f"{BASE:#x}", "16", f"{BASE + 32:#x}", "8", f"{BASE + 64:#x}", "4")
    ]
    table = BlockTable.load(run / "blocks.tsv")
    assert covered_blocks(run) == (len(table), len(table), 3)
    assert not list(first.iterdir()), "all of it was taken over"


def native(directory: Path, *modules: tuple[str, int, bytes]) -> Path:
    """What a guest leaves that loaded these native modules: key, blocks, and which were covered."""
    directory.mkdir()
    table = ModuleTable()
    for key, count, covered in modules:
        module = table.add(key, f"/lib/{key}", count)
        module.covered = covered
        module.places = array("I", (0x1000 + at if ran else 0 for at, ran in enumerate(covered)))
    table.save(directory / "native.tsv")
    return directory


def test_merge_native_modules_of_two_guests_are_those_of_both(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    merge_results(native(tmp_path / "1", ("one", 3, b"\1\0\0")), run)
    second = native(tmp_path / "2", ("two", 2, b"\0\1"), ("one", 3, b"\1\0\1"))
    merge_results(second, run)
    table = {module.key: module for module in ModuleTable.load(run / "native.tsv")}
    assert {key: module.covered for key, module in table.items()} == {
        "one": b"\1\0\1",
        "two": b"\0\1",
    }
    assert list(table["one"].places) == [0x1000, 0, 0x1002]
    assert covered_blocks(run) == (3, 5, None)
    assert not list(second.iterdir())


def test_merge_native_module_whose_pcs_are_taken_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = native(tmp_path / "run", ("one", 3, b"\1\0\0"))
    part = native(tmp_path / "1", ("one", 4, b"\1\1\1\1"))
    merge_results(part, run)
    assert covered_blocks(run) == (1, 3, None)
    assert "/lib/one is left out" in caplog.text


def test_merge_results_of_a_guest_that_left_none_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "run").mkdir()
    merge_results(tmp_path / "1", tmp_path / "run")
    assert covered_blocks(tmp_path / "run") == (0, 0, None)
    assert not list((tmp_path / "run").iterdir())


def test_merge_results_damaged_coverage_is_an_error_and_keeps_the_rest(
    tmp_path: Path, module: Path
) -> None:
    run = results(tmp_path / "run", module, [1], {})
    part = results(tmp_path / "1", module, [2], {})
    (part / ".coverage").write_bytes(b"none" * 100)
    with pytest.raises(BridgeError, match="cannot be merged"):
        merge_results(part, run)
    assert executed(run / ".coverage") == {str(module): [1]}


def test_merge_stats_adds_what_is_counted_and_keeps_the_last_of_the_rest() -> None:
    first = Stats(kernel="6.1", accel="tcg", pcs=3, returns=5, lost_pcs=1, problem="odd")
    second = Stats(kernel="6.2", accel="tcg", pcs=4, returns=6, blocks_total=9)
    merged = merge_stats([first, second])
    assert (merged.pcs, merged.returns, merged.lost_pcs) == (7, 11, 1)
    assert (merged.kernel, merged.blocks_total, merged.problem) == ("6.2", 9, "odd")
    assert merge_stats([]) == Stats()
