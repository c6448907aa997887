# SPDX-License-Identifier: Apache-2.0
"""An exception in the tracer: the code under test does not see it, the source tells of it."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import pytest

from bridge.errors import SourceError
from bridge.sources.python.lines import ACTIVE
from bridge.sources.python.source import PythonSource
from bridge.sources.python.tracer import COMPILED
from tests.sources.python.support import MakePackage, MakeSource, Measure, TargetThread, places
from tests.support.coverage_data import executed

WORK = """
    def red(n=0):
        n += 1
        return n

    def blue():
        return 2

    def memory_is_short(other, active):
        _testcapi.set_nomemory(0)
        other[active] = 0
        short = True
        _testcapi.remove_mem_hooks()
        return short

    try:
        import _testcapi
    except ImportError:
        _testcapi = None
"""
RED, BLUE = "work:3", "work:7"


class NoName(str):
    """A file name that cannot be looked up, as code.replace() lets a program make one."""

    __slots__ = ()

    def __hash__(self) -> int:
        raise LookupError("no hash of this name")


class NoGlobals(dict[str, Any]):
    """Globals that end the program of whoever asks for more than a variable."""

    def get(self, key: str, default: object = None) -> object:
        sys.exit("not to be asked")


@pytest.fixture
def started(measure: Measure) -> tuple[Any, PythonSource]:
    """A module, and a source that measures the target's thread."""
    return measure("work", work=WORK)


def with_a_bad_name(function: FunctionType) -> Callable[..., int]:
    code = function.__code__.replace(co_filename=NoName(function.__code__.co_filename))
    return FunctionType(code, function.__globals__, argdefs=function.__defaults__)


def test_consume_after_a_fault_raises_once_and_then_gives_the_pcs(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    work, source = started
    bad = with_a_bad_name(work.red)
    assert on_target(bad, 1) == 2
    assert on_target(work.blue) == 2
    thread = on_target(threading.current_thread)
    place = f"{work.__file__}:{3 if COMPILED else 2}, in thread {thread.name} of process"
    with pytest.raises(SourceError) as raised:
        source.consume()
    assert raised.value.message == (
        f"the tracer failed: LookupError: no hash of this name at {place} {os.getpid()}"
    )
    assert places(source) == [BLUE]
    count = source.tracer_faults
    assert count >= 2
    # Told once, counted each time; the thread is measured as before.
    assert on_target(bad, 1) == 2
    on_target(work.blue)
    assert places(source) == [BLUE]
    assert source.tracer_faults == 2 * count


def test_consume_after_sys_exit_in_the_tracer_raises_its_text(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    work, source = started
    code = work.red.__code__.replace(co_filename=work.__file__ + ".py")
    assert on_target(FunctionType(code, NoGlobals(), argdefs=(1,))) == 2
    with pytest.raises(SourceError, match="the tracer failed: SystemExit: not to be asked at "):
        source.consume()
    on_target(work.blue)
    assert places(source) == [BLUE]


def test_stop_after_a_fault_that_nobody_was_told_writes_the_data_and_raises(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    work, source = started
    on_target(with_a_bad_name(work.red))
    on_target(work.blue)
    with pytest.raises(SourceError, match="the tracer failed: LookupError"):
        on_target(source.stop)
    lines = next(v for k, v in executed(source.data_file).items() if k.endswith("work.py"))
    assert 7 in lines
    assert 3 not in lines
    assert places(source) == [BLUE]
    source.stop()


def test_consume_after_a_fault_in_a_new_thread_names_the_thread(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    work, source = started
    bad = with_a_bad_name(work.red)

    def start() -> None:
        thread = threading.Thread(target=bad, name="handler of requests")
        thread.start()
        thread.join()

    on_target(start)
    with pytest.raises(SourceError, match=r", in thread handler of requests of process \d+$"):
        source.consume()


def test_consume_after_a_fault_in_a_forked_child_names_the_child(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    work, source = started
    bad = with_a_bad_name(work.red)

    def fork() -> int:
        pid = os.fork()
        if pid == 0:
            os._exit(7 if bad(1) == 2 else 1)
        return pid

    pid = on_target(fork)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    with pytest.raises(SourceError, match=f"LookupError.* of process {pid}$"):
        source.consume()


def test_consume_after_a_program_that_cannot_be_measured_raises(
    started: tuple[Any, PythonSource], on_target: TargetThread, tmp_path: Path
) -> None:
    """The program has a module in the place of one that the tracer needs."""
    work, source = started
    own = tmp_path / "own"
    own.mkdir()
    (own / "dataclasses.py").write_text("import sys\nsys.exit('mine')\n")
    environment = {**os.environ, "PYTHONPATH": f"{own}:{os.environ['PYTHONPATH']}"}
    command = [sys.executable, "-c", f"import {work.__name__} as w; print(w.blue())"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=True
        )

    done = on_target(run)
    assert (done.stdout, done.stderr) == ("2\n", "")
    with pytest.raises(
        SourceError,
        match=r"the tracer failed: a program is not measured: SystemExit: mine, "
        r"in thread MainThread of process \d+",
    ):
        source.consume()


def test_consume_after_a_log_filter_that_raised_in_the_tracer_raises(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    work, source = started
    late = Path(work.__file__).with_name("late.py")
    late.write_text("def (\n")

    def refuse(record: logging.LogRecord) -> bool:
        raise ZeroDivisionError(record.getMessage())

    logger = logging.getLogger("bridge.sources.python.source")
    code = work.red.__code__.replace(co_filename=str(late))
    function = FunctionType(code, {"__file__": str(late)}, argdefs=(1,))
    logger.addFilter(refuse)
    try:
        assert on_target(function) == 2
    finally:
        logger.removeFilter(refuse)
    with pytest.raises(SourceError, match=r"the tracer failed: ZeroDivisionError: .*late\.py"):
        source.consume()


@pytest.mark.skipif(not COMPILED, reason="the plain tracer is Python, which needs memory itself")
def test_a_source_whose_neighbour_ended_without_memory_keeps_its_lines(
    started: tuple[Any, PythonSource], make_source: MakeSource, on_target: TargetThread
) -> None:
    """The tracer needs memory when one of two sources on a thread ends; it gets none."""
    work, source = started
    if work._testcapi is None:
        pytest.fail("this Python lacks _testcapi, with which memory is made short")
    second = make_source(work.__name__.partition(".")[0])
    on_target(second.start)
    source.consume()
    feed = second._feed
    assert feed is not None
    assert on_target(work.memory_is_short, feed.memory.buffer, ACTIVE) is True
    told = "the tracer failed: (MemoryError|there was no memory)"
    for look in (source.consume, second.stop):
        with pytest.raises(SourceError, match=told):
            look()
    assert "work:10" in places(source)
    on_target(work.blue)
    assert places(source) == [BLUE]


def test_another_trace_function_that_raises_does_not_end_the_measurement_unsaid(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    """The interpreter removes a trace function that raises: the plain tracer with it."""
    work, source = started

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_name == "red":
            raise EOFError("the debugger is quit")
        return trace

    on_target(sys.settrace, trace)
    with pytest.raises(EOFError):
        on_target(work.red)
    on_target(work.blue)
    if COMPILED:
        assert BLUE in places(source)
        assert source.tracer_faults == 0
        return
    with pytest.raises(SourceError, match="the tracer failed: EOFError: the debugger is quit"):
        source.consume()


def test_stop_after_the_target_removed_all_finders_writes_the_data(
    make_package: MakePackage, on_target: TargetThread, tmp_path: Path
) -> None:
    name = make_package(work=WORK)
    source = PythonSource([name], data_file=tmp_path / ".coverage", comparisons=True)
    on_target(source.start)
    on_target(importlib.import_module, f"{name}.work")
    before = list(sys.meta_path)
    try:
        sys.meta_path.clear()
        on_target(source.stop)
    finally:
        sys.meta_path[:] = [each for each in before if type(each).__name__ != "_Finder"]
    assert any(path.endswith("work.py") for path in executed(tmp_path / ".coverage"))


@pytest.mark.parametrize("in_new_thread", [False, True])
def test_tracer_that_was_replaced_past_the_hooks_is_told_at_the_end(
    measure: Measure,
    on_target: TargetThread,
    in_new_thread: bool,
) -> None:
    """Code that had a reference to the interpreter's own settrace() before the measurement."""
    settrace = sys.settrace
    work, source = measure("work", work=WORK)

    def replace() -> None:
        settrace(None)
        work.blue()

    def start() -> None:
        thread = threading.Thread(target=replace, name="handler")
        thread.start()
        thread.join()

    on_target(start if in_new_thread else replace)
    told = "TracerReplaced: the thread handler was" if in_new_thread else "the thread was"
    told += " not measured to its end: its trace function was replaced"
    if not in_new_thread:
        assert places(source) == []
    with pytest.raises(SourceError, match=told):
        on_target(source.consume if in_new_thread else source.stop)
