# SPDX-License-Identifier: Apache-2.0
"""What a report says of a run: the same numbers that its files have, counted in another way."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import coverage
import pytest

from bridge.errors import InfrastructureError, UsageError
from bridge.results import summary
from bridge.results.report import gather
from bridge.results.report.host import find_paths, short_names
from bridge.results.report.pcs import PcFigures, thin_out
from bridge.results.summary import Summary
from bridge.results.test_record import Outcome, RecordedTest, RecordWriter
from bridge.session.stats import Stats
from bridge.sources.guest_kernel.symbols import KernelSymbols
from bridge.sources.native.modules import ModuleTable
from bridge.sources.pcs import BlockTable, syscall_pc
from bridge.sources.symbolize import NATIVE_FILE
from bridge.trace import Call, HostCode, TraceHeader, TraceWriter
from tests.support.report_data import write_report_data

PROGRAM = """\
def first(x):
    y = (
        x +
        1
    )
    return y


def second():
    return 2
"""

TEXT = 0xFFFF_FFFF_8100_0000


def call(
    start: float, seconds: float | None, host: tuple[HostCode, ...] = (), **rest: object
) -> Call:
    plain = Call(start, seconds, 7, "cat", 0, "read", ("3",), 1, host=host)
    return dataclasses.replace(plain, **rest)  # type: ignore[arg-type]


def write_trace(directory: Path, *calls: Call) -> None:
    with TraceWriter(directory / "trace.jsonl", TraceHeader()) as trace:
        trace.write_all(calls)


def test_gather_totals_are_those_of_coverage_py(tmp_path: Path) -> None:
    write_report_data(tmp_path, tests=9)
    measured = coverage.Coverage(data_file=str(tmp_path / ".coverage"), config_file=False)
    measured.load()
    with gather([tmp_path]) as (report, _):
        assert len(report.files) == 3
        for file in report.files:
            _, statements, _, missing, _ = measured.analysis2(file.path)
            assert file.statements == set(statements)
            assert file.reached == set(statements) - set(missing)


def test_gather_lines_of_a_test_are_those_of_its_context(tmp_path: Path) -> None:
    write_report_data(tmp_path, tests=9)
    data = coverage.CoverageData(str(tmp_path / ".coverage"))
    data.read()
    with gather([tmp_path]) as (report, _):
        assert len(report.tests) == 9
        for test in report.tests:
            data.set_query_context(f"{test.test}|run")
            wanted = {path: set(data.lines(path) or ()) for path in data.measured_files()}
            found = report.lines_by_test[test.test]
            assert found == {path: lines for path, lines in wanted.items() if lines}


def test_gather_statement_of_several_lines_counts_once(tmp_path: Path) -> None:
    source = tmp_path / "program.py"
    source.write_text(PROGRAM)
    with RecordWriter(tmp_path) as writer:
        writer.write(RecordedTest("t", Outcome.PASSED, lines={str(source): (2, 3, 4, 5, 6)}))
    with gather([tmp_path]) as (report, _):
        (file,) = report.files
        assert file.reached == {2, 6}
        assert file.statements == {1, 2, 6, 9, 10}
        assert [(each.name, each.first, each.last) for each in file.functions] == [
            ("first", 1, 6),
            ("second", 9, 10),
        ]
        assert report.lines_by_test == {"t": {str(source): {2, 6}}}


def test_gather_names_relative_to_the_package_find_the_measured_file(tmp_path: Path) -> None:
    source = tmp_path / "site-packages" / "package" / "program.py"
    source.parent.mkdir(parents=True)
    source.write_text(PROGRAM)
    data = coverage.CoverageData(str(tmp_path / ".coverage"))
    data.add_lines({str(source): {1, 9}, str(tmp_path / "unit_tests.py"): {1}})
    data.write()
    with RecordWriter(tmp_path) as writer:
        writer.write(RecordedTest("t", Outcome.PASSED, lines={"package/program.py": (2,)}))
    write_trace(tmp_path, call(0, 1, (HostCode("package/program.py", "first", (6,)),)))
    with gather([tmp_path]) as (report, host):
        # The user's other files are not the target's.
        assert [file.name for file in report.files] == ["package/program.py"]
        assert report.files[0].reached == {1, 2, 9}
        assert report.hot_lines == {(str(source), 6): 1}
        assert host.data_file != tmp_path / ".coverage"


def test_gather_measured_file_of_which_no_line_ran_counts(tmp_path: Path) -> None:
    for name in ("program.py", "unused.py"):
        (tmp_path / name).write_text(PROGRAM)
    data = coverage.CoverageData(str(tmp_path / ".coverage"))
    data.add_arcs({str(tmp_path / "program.py"): {(-1, 9), (9, 10), (10, -9)}})
    data.touch_file(str(tmp_path / "unused.py"))
    data.write()
    with gather([tmp_path]) as (report, host):
        assert [(file.name, len(file.reached)) for file in report.files] == [
            (f"{tmp_path.name}/program.py", 2),
            (f"{tmp_path.name}/unused.py", 0),
        ]
        assert len(report.files[1].statements) == 5
        # With its branches, as coverage.py wrote it.
        assert host.data_file == tmp_path / ".coverage"


def test_gather_several_directories_are_joined(tmp_path: Path) -> None:
    source = tmp_path / "program.py"
    source.write_text(PROGRAM)
    for number, line in enumerate((2, 10)):
        directory = tmp_path / f"run{number}"
        directory.mkdir()
        with RecordWriter(directory) as writer:
            writer.write(
                RecordedTest(
                    f"t{number}", Outcome.PASSED, began=9.0 - number, lines={str(source): (line,)}
                )
            )
        write_trace(directory, call(number, 0.5))
    with gather([tmp_path / "run0", tmp_path / "run1", tmp_path / "run0"]) as (report, _):
        assert [test.test for test in report.tests] == ["t1", "t0"]
        assert report.files[0].reached == {2, 10}
        assert report.lines_over_tests == [(1, 1), (2, 2)]
        # The second run begins when the first has ended.
        assert [(trace, call.start) for trace, call in report.calls] == [(0, 0.0), (1, 1.5)]


def test_gather_coverage_over_time_counts_lines_when_calls_return(tmp_path: Path) -> None:
    source = tmp_path / "program.py"
    source.write_text(PROGRAM)
    data = coverage.CoverageData(str(tmp_path / ".coverage"))
    data.add_lines({str(source): {1, 2, 6, 9, 10}})
    data.write()
    code = HostCode(str(source), "first", (2, 3, 6))
    write_trace(
        tmp_path,
        call(0.0, 5.0, (HostCode(str(source), "second", (10,)),), kernel=("a", "b")),
        call(1.0, 1.0, (code,), error="EIO", result=-5, kernel=("b",)),
        call(3.0, None, (code,)),
    )
    with gather([tmp_path]) as (report, _):
        assert report.lines_over_time == [(2.0, 2), (5.0, 3)]
        assert report.kernel_over_time == [(2.0, 1), (5.0, 2)]
        (read,) = report.syscalls
        assert (read.calls, read.host_calls, read.seconds) == (3, 3, 6.0)
        assert read.errors == {"EIO": 1}
        assert read.lines == {(str(source), line) for line in (2, 6, 10)}
        assert report.hot_lines[str(source), 2] == 2


def test_gather_traces_of_one_file_follow_one_another(tmp_path: Path) -> None:
    write_trace(
        tmp_path,
        call(0.0, 0.5, test="a"),
        call(1.0, 1.0, test="a"),
        call(0.25, 0.5, test="a"),
        call(0.5, 0.5, test="b"),
    )
    with gather([tmp_path]) as (report, _):
        assert [call.start for _, call in report.calls] == [0.0, 1.0, 2.25, 3.25]


def test_gather_traces_of_workers_are_of_the_same_time(tmp_path: Path) -> None:
    for worker in ("gw0", "gw1"):
        with TraceWriter(tmp_path / f"trace.{worker}.jsonl", TraceHeader()) as trace:
            trace.write_all([call(0.0, 5.0, test=worker), call(1.0, 1.0, test=worker)])
    with gather([tmp_path]) as (report, _):
        assert [call.start for _, call in report.calls] == [0.0, 0.0, 1.0, 1.0]


def test_gather_damaged_trace_keeps_what_came_before_and_says_so(tmp_path: Path) -> None:
    write_trace(tmp_path, call(0, 1), call(1, 1))
    path = tmp_path / "trace.jsonl"
    os.truncate(path, path.stat().st_size - 20)
    with gather([tmp_path]) as (report, _):
        assert len(report.calls) == 1
        assert "incomplete" in report.problems[0]
        assert "line 3" in report.problems[0]


def test_gather_call_without_a_finite_time_is_a_problem(tmp_path: Path) -> None:
    write_trace(tmp_path, call(0, 1))
    with (tmp_path / "trace.jsonl").open("a") as file:
        line = dict(json.loads((tmp_path / "trace.jsonl").read_text().splitlines()[1]), start=1)
        file.write(json.dumps(line).replace('"start": 1', '"start": NaN') + "\n")
    with gather([tmp_path]) as (report, _):
        assert len(report.calls) == 1
        assert report.problems


def test_gather_source_that_is_gone_has_its_lines_and_a_problem(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.write(RecordedTest("t", Outcome.PASSED, lines={"/nowhere/gone.py": (3, 4)}))
    with gather([tmp_path]) as (report, _):
        (file,) = report.files
        assert file.reached == file.statements == {3, 4}
        assert "cannot be shown" in file.problem


def test_gather_source_that_changed_after_the_run_is_doubtful(tmp_path: Path) -> None:
    source = tmp_path / "program.py"
    source.write_text(PROGRAM)
    data = coverage.CoverageData(str(tmp_path / ".coverage"))
    data.add_lines({str(source): {1}})
    data.write()
    after = (tmp_path / ".coverage").stat().st_mtime + 10
    os.utime(source, (after, after))
    with gather([tmp_path]) as (report, _):
        assert "changed after the run" in report.files[0].problem
        assert report.files[0].text


@pytest.mark.parametrize(
    ("stats", "loss"),
    [
        (Stats(), ""),
        (Stats(lost_pcs=1234), "1,234 PCs were dropped"),
        (Stats(untraced=2), "2 processes or threads"),
        (Stats(tracer_faults=1), "tracer failed"),
        (Stats(guest_timeouts=1), "not answered in time"),
        (Stats(problem="the guest is silent"), "the guest is silent"),
    ],
)
def test_gather_losses_of_a_run_are_named(tmp_path: Path, stats: Stats, loss: str) -> None:
    summary.write(Summary(stats, 0), tmp_path / "summary.json")
    with gather([tmp_path]) as (report, _):
        assert report.loss_known
        assert bool(report.losses) == bool(loss)
        assert loss in "".join(report.losses)


@pytest.mark.parametrize(("lost", "known"), [(0, True), (3, True), (None, False)])
def test_gather_losses_of_tests_are_named(tmp_path: Path, lost: int | None, known: bool) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.write(RecordedTest("t", Outcome.PASSED, pcs=9, lost=lost))
    with gather([tmp_path]) as (report, _):
        assert report.loss_known == known
        assert len(report.losses) == bool(lost)


def test_gather_directory_without_anything_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"nothing to report.*tests\.jsonl"), gather([tmp_path]):
        pass


def test_gather_directory_that_does_not_exist_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no directory"), gather([tmp_path / "none"]):
        pass


def test_gather_file_that_is_no_coverage_data_is_named(tmp_path: Path) -> None:
    (tmp_path / ".coverage").write_text("something else")
    with pytest.raises(InfrastructureError, match=r"\.coverage cannot be read"), gather([tmp_path]):
        pass


def test_pc_figures_count_blocks_as_they_come(tmp_path: Path) -> None:
    table = BlockTable()
    table.add("program.py", PROGRAM)
    table.save(tmp_path / "blocks.tsv")
    blocks = [pc for pc, _ in table]
    symbols = KernelSymbols.from_kallsyms(
        f"{TEXT:x} T _stext\n{TEXT:x} T vfs_read\n{TEXT + 64:x} T vfs_write\n"
        f"{TEXT + 4096:x} T _etext\n"
    )
    symbols.save(tmp_path / "kernel-symbols.tsv")
    number = syscall_pc(1)
    assert number is not None
    order = [number, TEXT + 4, blocks[0], TEXT + 4, blocks[0], blocks[1], TEXT + 70, TEXT + 8]
    (tmp_path / "pcs.txt").write_text("".join(f"{pc:#x}\n" for pc in order))
    figures = PcFigures.read(tmp_path)
    assert (figures.total, figures.different) == (8, 6)
    assert figures.host_blocks == [(3, 1), (6, 2), (8, 2)]
    assert figures.kernel_blocks == [(2, 1), (7, 2), (8, 3)]
    assert [(each.count, each.place) for each in figures.hot_host] == [
        (2, "program.py"),
        (1, "program.py"),
    ]
    found = {each.name: (each.blocks, each.pcs) for each in figures.functions}
    assert found == {"vfs_read": (2, 3), "vfs_write": (1, 1)}
    assert (figures.hot_kernel[0].place, figures.hot_kernel[0].detail) == ("vfs_read", "+0x4")


def test_pc_figures_damaged_file_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "pcs.txt").write_text("0x1\nodd\n")
    with pytest.raises(InfrastructureError, match="line 2"):
        PcFigures.read(tmp_path)


def test_thin_out_long_series_keeps_its_first_point_and_its_end() -> None:
    points = [(float(x), x) for x in range(1, 100_001)]
    thin = thin_out(list(points), 200_000)
    assert len(thin) < 1000
    assert (thin[0], thin[-2], thin[-1]) == (points[0], points[-1], (200_000, 100_000))


def test_short_names_are_short_and_different() -> None:
    paths = ["/a/site-packages/p/x.py", "/b/site-packages/p/x.py", "/srv/one/y.py", "/srv/two/z.py"]
    assert short_names(paths) == [
        paths[0],
        "/b/site-packages/p/x.py",
        "srv/one/y.py",
        "srv/two/z.py",
    ]


def test_find_paths_prefers_measured_files_then_modules_of_this_python() -> None:
    found = find_paths(["p/x.py", "json/decoder.py", "/abs.py", "none.py"], ["/a/p/x.py"])
    assert found["p/x.py"] == "/a/p/x.py"
    assert found["json/decoder.py"] == os.path.realpath(json.decoder.__file__)
    assert found["/abs.py"] == "/abs.py"
    assert found["none.py"] == "none.py"


def test_gather_adds_native_blocks_of_the_same_module_alone(tmp_path: Path) -> None:
    # Two modules of one file have one build id: guards and counters.
    runs = []
    for name, guards, counters in (("one", b"\1\0\0", b"\0\1"), ("two", b"\0\0\1", b"\0\0")):
        table = ModuleTable()
        for covered in (guards, counters):
            table.add("id", "/no/such/program", len(covered)).covered = covered
        (tmp_path / name).mkdir()
        table.save(tmp_path / name / NATIVE_FILE)
        runs.append(tmp_path / name)
    with gather(runs) as (report, _):
        assert sorted(report.native_covered.values()) == [b"\0\1", b"\1\0\1"]
