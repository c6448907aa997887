# SPDX-License-Identifier: Apache-2.0
"""The Python source: consuming as it happens, and a complete coverage.py file in the end."""

from __future__ import annotations

import _thread
import asyncio
import gc
import importlib
import json
import logging
import os
import queue
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bridge.errors import SourceError
from bridge.sources import Source
from bridge.sources.pcs import BlockTable
from bridge.sources.python.blocks import find_blocks
from bridge.sources.python.hooks import MEASURING
from bridge.sources.python.packages import find_packages
from bridge.sources.python.source import PythonSource
from tests.sources.python.support import MakePackage, MakeSource, TargetThread, places
from tests.support.coverage_data import executed
from tests.support.examples import examples

ROOT = Path(__file__).resolve().parents[3]
DATA = Path(__file__).resolve().parents[3] / "tests" / "data" / "python"


LOOP = """
    def call(n):
        if n:
            return 1
        return 2

    def generate():
        while True:
            yield 1

    def recurse(n, then):
        if n == 0:
            return then()
        return recurse(n - 1, then)

    async def wait(event):
        await event.wait()
        return 1

    def hold(then):
        while then():
            n = 1
        return n
"""
# Blocks of LOOP by first line.
CALL_TEST, CALL_ONE, CALL_TWO, GENERATE, YIELD = 3, 4, 5, 8, 9
RECURSE_TEST, RECURSE_THEN, RECURSE_AGAIN = 12, 13, 14


def test_it_is_a_source(make_source: MakeSource) -> None:
    source: Source = make_source("json")
    assert source.name == "python"


@pytest.fixture
def started(make_package: MakePackage, make_source: MakeSource) -> tuple[ModuleType, PythonSource]:
    """LOOP, and a source that has measured the test's own thread from before its import."""
    name = make_package(loop=LOOP)
    source = make_source(name)
    source.start()
    return importlib.import_module(f"{name}.loop"), source


def test_the_same_line_is_reported_each_time(started: tuple[ModuleType, PythonSource]) -> None:
    loop, source = started
    assert "loop:2" in places(source)
    for _ in range(200):
        loop.call(1)
        assert places(source) == [f"loop:{CALL_TEST}", f"loop:{CALL_ONE}"]
        loop.call(0)
        assert places(source) == [f"loop:{CALL_TEST}", f"loop:{CALL_TWO}"]
        assert source.consume() == []


def test_frames_that_live_through_a_consume_go_on_to_count(
    started: tuple[ModuleType, PythonSource],
) -> None:
    loop, source = started
    generators = [loop.generate() for _ in range(3)]
    for generator in generators:
        next(generator)
    source.consume()
    for _ in range(50):
        for generator in generators:
            next(generator)
            assert f"loop:{YIELD}" in places(source)
    consumed: list[list[str]] = []

    def thrice() -> bool:
        consumed.append(places(source))
        return len(consumed) < 3

    # All in one call, which keeps the set that it has found when it was entered.
    loop.hold(thrice)
    assert consumed == [["loop:21"], ["loop:21", "loop:22"], ["loop:21", "loop:22"]]
    assert places(source) == ["loop:23"]
    consumed.clear()
    loop.recurse(50, lambda: consumed.append(places(source)))
    assert consumed == [[f"loop:{line}" for line in (RECURSE_TEST, RECURSE_THEN, RECURSE_AGAIN)]]
    # Coming back through the fifty frames executes no new line.
    assert places(source) == []

    async def waits() -> None:
        event = asyncio.Event()
        task = asyncio.create_task(loop.wait(event))
        await asyncio.sleep(0)
        assert places(source) == ["loop:17"]
        event.set()
        await task
        assert places(source) == ["loop:17"]

    asyncio.run(waits())


def measure(mode: str, data_file: Path, package: str, module: str) -> dict[str, Any]:
    answer = subprocess.run(
        [sys.executable, str(DATA / "measure.py"), mode, str(data_file), package, module],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(DATA)])},
    )
    assert answer.returncode == 0, answer.stderr
    return dict(json.loads(answer.stdout))


@pytest.mark.parametrize(
    ("package", "module"), [("mill", "mill"), ("pyroute2.plan9", "ninep")], ids=["threads", "9p"]
)
def test_consumed_bit_by_bit_or_not_the_lines_are_the_same(
    tmp_path: Path, package: str, module: str
) -> None:
    plain, consumed = tmp_path / "plain", tmp_path / "consumed"
    measure("plain", plain, package, module)
    summary = measure("consumed", consumed, package, module)
    assert summary["consumes"] > 20
    expected = executed(plain)
    assert executed(consumed) == expected
    assert sum(map(len, expected.values())) > 60
    # And the PCs are those of the blocks of these lines.
    names = {path: "/".join(Path(path).parts[-package.count(".") - 2 :]) for path in expected}
    table = BlockTable.from_sources({name: Path(path).read_bytes() for path, name in names.items()})
    wanted = {
        str(table.lookup(pc))
        for path, lines in expected.items()
        for line in lines
        if (pc := table.line_pc(names[path], line)) is not None
    }
    assert set(summary["places"]) == wanted
    assert summary["covered"] == len(wanted) < summary["total"] == len(table)


def test_none_is_lost_or_invented_while_other_threads_run(
    make_package: MakePackage, make_source: MakeSource
) -> None:
    """A call that has ended is in the next consume, and nothing else is, a thousand times."""
    text = "".join(f"def f{n}():\n    return {n}\n" for n in range(40))
    noise = (
        "def noise(stop):\n"
        "    total = 0\n"
        "    while not stop.is_set():\n"
        "        total += sum(map(square, range(5)))\n"
        "        for g in [rise(3) for _ in range(3)]:\n"
        "            total += sum(g)\n"
        "        try:\n"
        "            fall(4)\n"
        "        except ValueError:\n"
        "            total += 1\n"
        "def square(n):\n"
        "    return n * n\n"
        "def rise(n):\n"
        "    while n:\n"
        "        n -= 1\n"
        "        yield n\n"
        "def fall(n):\n"
        "    if not n:\n"
        "        raise ValueError\n"
        "    fall(n - 1)\n"
    )
    # In one file, so that all threads add to one set.
    name = make_package(loop=text + noise)
    quiet = {f"loop:{2 * n + 2}": n for n in range(40)}
    jobs: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[int] = queue.SimpleQueue()
    source = make_source(name)
    source.start()
    loop = importlib.import_module(f"{name}.loop")
    source.consume()
    stop = threading.Event()

    def work() -> None:
        while (job := jobs.get()) is not None:
            done.put(getattr(loop, f"f{job}")())

    threads = [threading.Thread(target=loop.noise, args=(stop,)) for _ in range(3)]
    threads.append(threading.Thread(target=work))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    wrong = []
    try:
        for thread in threads:
            thread.start()
        for step in range(examples(1000)):
            jobs.put(step % 40)
            done.get()
            seen = [quiet[place] for place in places(source) if place in quiet]
            if seen != [step % 40]:
                wrong.append((step, seen))
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        jobs.put(None)
        for thread in threads:
            thread.join()
    assert wrong == []


def test_threads_that_run_before_the_start_are_not_measured(
    make_package: MakePackage, make_source: MakeSource
) -> None:
    name = make_package(loop=LOOP)
    jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[object] = queue.SimpleQueue()

    def work() -> None:
        while (job := jobs.get()) is not None:
            done.put(job())

    before = threading.Thread(target=work)
    before.start()
    source = make_source(name)
    source.start()
    try:
        loop: ModuleType = importlib.import_module(f"{name}.loop")
        source.consume()
        jobs.put(lambda: loop.call(1))
        done.get()
        assert source.consume() == []
        later = threading.Thread(target=loop.call, args=(0,))
        later.start()
        later.join()
        assert places(source) == [f"loop:{CALL_TEST}", f"loop:{CALL_TWO}"]
    finally:
        jobs.put(None)
        before.join()


def test_pcs_come_by_file_name_and_in_the_order_of_the_text(
    make_package: MakePackage, make_source: MakeSource
) -> None:
    body = "def f(n):\n    if n:\n        return 1\n    return 2\n"
    name = make_package({f"{module}.py": body for module in "dbeac"})
    source = make_source(name)
    source.start()
    modules = [importlib.import_module(f"{name}.{module}") for module in "ebdca"]
    source.consume()
    for module in modules:
        module.f(0), module.f(1)
    assert places(source) == [f"{m}:{line}" for m in "abcde" for line in (2, 3, 4)]


def test_the_totals_count_files_that_never_ran(
    make_package: MakePackage, make_source: MakeSource
) -> None:
    name = make_package(
        {"sub/__init__.py": "a = 1\n", "sub/deep.py": "b = 1\n", "data/skipped.py": "c = 1\n"},
        loop=LOOP,
        idle=LOOP,
    )
    source = make_source(name)
    assert (source.blocks_total, source.blocks_covered) == (0, 0)
    source.start()
    per_file = len(find_blocks(textwrap.dedent(LOOP)))
    assert source.blocks_total == 2 * per_file + 2
    assert source.table.files == [
        f"{name}/{file}"
        for file in ("__init__.py", "idle.py", "loop.py", "sub/__init__.py", "sub/deep.py")
    ]
    importlib.import_module(f"{name}.loop").call(1)
    first = source.consume()
    assert source.blocks_covered == len(first)
    sys.modules[f"{name}.loop"].call(1)
    assert len(source.consume()) == 2
    assert source.blocks_covered == len(first)


def test_a_package_in_a_package_and_a_single_module(
    make_package: MakePackage, make_source: MakeSource
) -> None:
    name = make_package(
        {"__init__.py": "top = 1\n", "sub/__init__.py": "a = 1\n", "sub/x.py": "b = 1\n"},
        single="c = 1\n",
        other="d = 1\n",
    )
    source = make_source(f"{name}.sub", f"{name}.single")
    source.start()
    assert name not in sys.modules
    assert source.table.files == [
        f"{name}/single.py",
        f"{name}/sub/__init__.py",
        f"{name}/sub/x.py",
    ]
    for module in ("sub.x", "single", "other"):
        importlib.import_module(f"{name}.{module}")
    assert places(source) == ["single:1", "__init__:1", "x:1"]


def test_files_that_appear_later_get_blocks_then(
    make_package: MakePackage, make_source: MakeSource, tmp_path: Path
) -> None:
    name = make_package({"part/module.py": "a = 1\nif a:\n    b = 1\n"})
    source = make_source(name)
    source.start()
    assert source.blocks_total == 0
    new = tmp_path / "packages" / name / "new.py"
    new.write_text("a = 1\nif a:\n    b = 1\n")
    importlib.invalidate_caches()
    importlib.import_module(f"{name}.new")
    assert places(source) == ["new:1", "new:3"]
    # No package (it has no __init__.py), but Python imports it all the same.
    importlib.import_module(f"{name}.part.module")
    assert places(source) == ["module:1", "module:3"]
    assert source.blocks_total == source.blocks_covered == 4
    assert source.table.files[-1] == f"{name}/part/module.py"


def test_files_that_cannot_be_parsed_are_left_out_with_a_warning(
    make_package: MakePackage, make_source: MakeSource, caplog: pytest.LogCaptureFixture
) -> None:
    name = make_package({"bad.py": "def (:\n", "latin.py": b"a = '\xff'\n"}, good="a = 1\n")
    source = make_source(name)
    with caplog.at_level(logging.WARNING):
        source.start()
    assert source.blocks_total == 1
    assert f"{name}/bad.py has no blocks: cannot parse" in caplog.text
    assert f"{name}/latin.py has no blocks: cannot decode" in caplog.text


def test_a_source_that_changed_since_the_start_does_not_break_consume(
    make_package: MakePackage, make_source: MakeSource, tmp_path: Path
) -> None:
    name = make_package(changed="a = 1\n")
    source = make_source(name)
    source.start()
    longer = "a = 1\n" + "\n" * 50 + "b = 1\n"
    (tmp_path / "packages" / name / "changed.py").write_text(longer)
    importlib.import_module(f"{name}.changed")
    assert places(source) == ["changed:1"]
    source.stop()
    lines = {Path(file).name: lines for file, lines in executed(source.data_file).items()}
    assert [line for line in lines["changed.py"] if line] == [1, 52]


def test_the_file_is_what_coverage_writes_and_its_reports_accept_it(
    make_package: MakePackage, make_source: MakeSource, tmp_path: Path
) -> None:
    name = make_package(loop=LOOP, idle=LOOP)
    source = make_source(name, data_file=tmp_path / "deep" / "er" / "cov.db")
    source.start()
    loop = importlib.import_module(f"{name}.loop")
    for n in (0, 1):
        source.consume()
        loop.call(n)
    source.consume()
    source.stop()
    found = {Path(file).name: lines for file, lines in executed(source.data_file).items()}
    assert sorted(found) == ["__init__.py", "idle.py", "loop.py"]
    assert found["idle.py"] == []
    assert [line for line in found["loop.py"] if line] == [2, 3, 4, 5, 7, 11, 16, 20]
    for report in (["report"], ["html", "-d", "h"], ["lcov"], ["xml"], ["json"]):
        answer = subprocess.run(
            [
                *(sys.executable, "-m", "coverage", *report),
                f"--data-file={source.data_file}",
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
    percent = {
        Path(file).name: entry["summary"]["percent_covered_display"]
        for file, entry in json.loads((tmp_path / "coverage.json").read_text())["files"].items()
    }
    assert percent["idle.py"] == "0"
    assert percent["loop.py"] == "44"


def test_a_target_that_never_ran_is_in_the_file_too(
    make_package: MakePackage, make_source: MakeSource
) -> None:
    name = make_package(loop=LOOP)
    source = make_source(name)
    source.start()
    source.stop()
    assert sorted(Path(file).name for file in executed(source.data_file)) == [
        "__init__.py",
        "loop.py",
    ]


def test_what_was_not_consumed_before_the_stop_comes_after_it(
    make_package: MakePackage, make_source: MakeSource
) -> None:
    name = make_package(loop=LOOP)
    source = make_source(name)
    source.stop()
    assert source.consume() == []
    source.start()
    loop = importlib.import_module(f"{name}.loop")
    source.consume()
    loop.call(1)
    source.stop()
    loop.call(0)
    assert places(source) == [f"loop:{CALL_TEST}", f"loop:{CALL_ONE}"]
    assert source.consume() == []
    source.stop()
    with pytest.raises(SourceError, match="already started"):
        source.start()


@pytest.mark.filterwarnings("error")
def test_many_sources_one_after_the_other_leave_nothing_behind(
    make_package: MakePackage, caplog: pytest.LogCaptureFixture
) -> None:
    name = make_package(loop=LOOP)
    sources = weakref.WeakSet[PythonSource]()
    functions = (sys.settrace, _thread.start_new_thread, subprocess._fork_exec, os.execv)  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        # What earlier tests left open is not this one's.
        warnings.simplefilter("ignore")
        gc.collect()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for turn in range(25):
        source = PythonSource([name], data_file=None)
        sources.add(source)
        source.start()
        loop = importlib.import_module(f"{name}.loop")
        source.consume()
        loop.call(1)
        assert places(source) == [f"loop:{CALL_TEST}", f"loop:{CALL_ONE}"], turn
        assert sys.settrace is not functions[0]
        source.stop()
    del source
    gc.collect()
    assert not sources
    assert MEASURING.feeds == []
    # The memory is gone with the sources, and what was replaced is back.
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors
    assert functions == (
        sys.settrace,
        _thread.start_new_thread,
        subprocess._fork_exec,  # type: ignore[attr-defined]
        os.execv,
    )
    # From the second time on the package was there before, and the log says so each time.
    assert caplog.text.count("imported before the measurement") == 24
    assert f"{name}.loop" in caplog.text


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        ((), "no package to cover is given"),
        (("no_such_package",), "no module named no_such_package"),
        (("json.nothing",), r"no module named json\.nothing"),
        (("json", "json.decoder.deeper"), r"json\.decoder is a module"),
        (("sys",), "sys has no Python source"),
        (("math",), "math has no Python source"),
    ],
)
def test_packages_that_cannot_be_covered(
    make_source: MakeSource, packages: tuple[str, ...], message: str
) -> None:
    before = sys.gettrace()
    with pytest.raises(SourceError, match=message):
        make_source(*packages).start()
    assert sys.gettrace() is before
    assert MEASURING.feeds == []


def test_a_python_without_its_lock_is_refused(
    make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(SourceError, match="without its global interpreter lock"):
        make_source("json").start()


def test_a_data_file_that_cannot_be_written_is_an_error_after_the_end(
    make_package: MakePackage, make_source: MakeSource, tmp_path: Path
) -> None:
    name = make_package(loop=LOOP)
    source = make_source(name, data_file=tmp_path / "taken")
    source.start()
    importlib.import_module(f"{name}.loop")
    (tmp_path / "taken").mkdir()
    with pytest.raises(SourceError, match="cannot write the coverage data"):
        source.stop()
    assert MEASURING.feeds == []
    assert "loop:2" in places(source)
    source.stop()


def test_a_data_file_is_replaced(
    make_package: MakePackage, make_source: MakeSource, tmp_path: Path
) -> None:
    name = make_package(loop=LOOP)
    for files in (["__init__.py", "loop.py"], ["__init__.py", "other.py"]):
        source = make_source(name)
        source.start()
        source.stop()
        assert sorted(Path(file).name for file in executed(source.data_file)) == files
        package = tmp_path / "packages" / name
        (package / "loop.py").rename(package / "other.py") if "loop.py" in files else None


# Not pytrace: it does not go on after another measurement, whoever made that.
CORES = ["ctrace"] + (["sysmon"] if sys.version_info >= (3, 12) else [])


@pytest.mark.parametrize("core", CORES)
def test_it_stacks_on_a_coverage_that_runs_already(
    make_package: MakePackage, tmp_path: Path, core: str
) -> None:
    """As in a test suite that is measured itself."""
    inner = make_package(loop=LOOP)
    outer = make_package(
        main=f"""
        import importlib, pathlib, sys
        from bridge.sources.python.source import PythonSource

        def before():
            return 1

        def after():
            return 2

        def main():
            before()
            for n in range(3):
                source = PythonSource(["{inner}"], data_file=pathlib.Path(sys.argv[1]))
                source.start()
                loop = importlib.import_module("{inner}.loop")
                source.consume()
                loop.call(1)
                assert len(source.consume()) == 2
                source.stop()
            after()

        main()
        """
    )
    answer = subprocess.run(
        [
            *(sys.executable, "-m", "coverage", "run", f"--source={outer}"),
            *(f"--data-file={tmp_path / 'outer'}", "-m", f"{outer}.main", str(tmp_path / "inner")),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={
            **os.environ,
            "COVERAGE_CORE": core,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "packages")]),
        },
    )
    assert answer.returncode == 0, answer.stderr
    lines = next(v for k, v in executed(tmp_path / "outer").items() if k.endswith("main.py"))
    assert {6, 9} <= set(lines)
    assert any(k.endswith("loop.py") and v for k, v in executed(tmp_path / "inner").items())


SHORT = """
    def first():
        a = 1
        return a
"""
LONG = """
    pad = 0

    def nothing():
        return 0

    def second():
        b = 2
        return b
"""


@pytest.fixture
def files_of_one_name(
    make_package: MakePackage, make_source: MakeSource, on_target: TargetThread
) -> tuple[Path, PythonSource]:
    """A package with ``one/m.py`` and ``two/m.py``; a source measures the target's thread."""
    name = make_package(
        {"one/__init__.py": "", "two/__init__.py": ""},
        **{"one/m": SHORT, "two/m": LONG},
    )
    (package,) = find_packages([name]).roots[0][:1]
    source = make_source(name)
    on_target(source.start)
    return Path(package), source


@pytest.mark.parametrize("way", ["relative names", "moved code"])
def test_files_of_one_name_are_told_apart(
    files_of_one_name: tuple[Path, PythonSource],
    on_target: TargetThread,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    """The name in compiled code is ``m.py`` for both files, or a file that is not there."""
    package, source = files_of_one_name
    functions = {}
    for folder, function in (("one", "first"), ("two", "second")):
        path = package / folder / "m.py"
        monkeypatch.chdir(path.parent)
        relative = way == "relative names"
        namespace: dict[str, Any] = {"__file__": "m.py" if relative else str(path)}
        code = compile(path.read_text(), "m.py" if relative else "/not/here/m.py", "exec")
        on_target(exec, code, namespace)
        functions[folder] = namespace[function]
    source.consume()
    monkeypatch.chdir("/")
    found = []
    for folder in ("one", "two", "one"):
        on_target(functions[folder])
        (pc,) = source.consume()
        found.append(str(source.table.lookup(pc)).partition(package.name)[2])
    assert found[0].startswith("/one/m.py:3"), found
    assert found[1].startswith("/two/m.py:8"), found
    assert found[2] == found[0]


def test_moved_code_is_covered_after_code_of_its_name_ran_without_a_module(
    files_of_one_name: tuple[Path, PythonSource], on_target: TargetThread
) -> None:
    package, source = files_of_one_name
    path = package / "one" / "m.py"
    namespace: dict[str, Any] = {}
    for namespace in ({}, {"__file__": str(path)}):
        code = compile(path.read_text(), "/not/here/m.py", "exec")
        on_target(exec, code, namespace)
    source.consume()
    on_target(namespace["first"])
    (pc,) = source.consume()
    assert "/one/m.py:3" in str(source.table.lookup(pc))


def test_code_that_is_run_in_the_module_of_another_file_stays_of_its_own(
    files_of_one_name: tuple[Path, PythonSource], on_target: TargetThread
) -> None:
    """``exec()`` of a file in globals whose ``__file__`` has the same last part."""
    package, source = files_of_one_name
    one = on_target(importlib.import_module, f"{package.name}.one.m")
    path = package / "two" / "m.py"
    on_target(exec, compile(path.read_text(), str(path), "exec"), vars(one))
    source.consume()
    on_target(one.second)
    (pc,) = source.consume()
    assert "/two/m.py:8" in str(source.table.lookup(pc))


def test_stop_with_a_path_that_is_not_utf8_writes_the_other_files(
    make_package: MakePackage,
    make_source: MakeSource,
    on_target: TargetThread,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = make_package({os.fsdecode(b"m\xff.py"): "a = 1\n"}, work=SHORT)
    source = make_source(name)
    on_target(source.start)
    work = on_target(importlib.import_module, f"{name}.work")
    other = on_target(importlib.import_module, os.fsdecode(name.encode() + b".m\xff"))
    on_target(work.first)
    assert len(places(source)) == 3
    with caplog.at_level(logging.WARNING):
        on_target(source.stop)
    found = executed(source.data_file)
    assert {Path(file).name for file in found} == {"work.py", "__init__.py"}
    assert f"lacks {os.fsencode(str(other.__file__))!r}: its path is not UTF-8" in caplog.text


def test_take_lines_gives_each_run_of_a_line_once_and_the_data_file_has_all(
    make_package: MakePackage, make_source: MakeSource, tmp_path: Path
) -> None:
    name = make_package(first="def f(a):\n    if a:\n        return 1\n    return 2\n")
    source = make_source(name)
    assert source.take_lines() == {}
    source.start()
    module = importlib.import_module(f"{name}.first")
    path = str(tmp_path / "packages" / name / "first.py")
    assert source.take_lines()[path] == {1}
    module.f(0)
    assert source.take_lines() == {path: {2, 4}}
    assert source.take_lines() == {}
    # A child that was forked writes to the same memory.
    if (child := os.fork()) == 0:
        module.f(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert source.take_lines() == {path: {2, 3}}
    before = places(source)
    later = tmp_path / "packages" / name / "later.py"
    later.write_text("a = 1\n")
    importlib.invalidate_caches()
    importlib.import_module(f"{name}.later")
    # Lines after the end that the file had when it was read.
    exec(compile("\n" * 99 + "a = 1\n", path, "exec"), {})
    assert source.take_lines() == {str(later): {1}, path: {100}}
    module.f(0)
    source.stop()
    assert source.take_lines() == {path: {2, 4}}
    assert before == ["first:1", "first:2", "first:3", "first:4"], "consume() is not concerned"
    data = executed(source.data_file)
    assert data[path] == [1, 2, 3, 4, 100]
    assert data[str(later)] == [1]
