# SPDX-License-Identifier: Apache-2.0
"""Which thread of the target ran a block: of several threads, forked children and programs."""

from __future__ import annotations

import fcntl
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bridge.device.calls import HostThread
from bridge.sources.python import threads
from bridge.sources.python.lines import LineMemory
from bridge.sources.python.source import PythonSource
from tests.sources.python.support import MakePackage, MakeSource

WORK = """
    def one():
        return 1

    def two():
        return 2

    def both():
        return 3
"""
ONE, TWO, BOTH = 3, 6, 9


@pytest.fixture
def started(make_package: MakePackage, make_source: MakeSource) -> tuple[Any, PythonSource]:
    """The module, and a source that measures the test's own thread and tells threads apart."""
    name = make_package(work=WORK)
    source = make_source(name)
    source.start()
    work = importlib.import_module(f"{name}.work")
    source.consume()
    source.record_threads(True)
    return work, source


def ran(source: PythonSource) -> dict[int, HostThread | None]:
    """The thread of each line that was covered since the last call."""
    found = {}
    for pc in source.consume():
        location = source.table.lookup(pc)
        assert location is not None
        found[location.block.start_line] = source.thread_of.get(pc)
    return found


def on_thread(function: Any, name: str) -> int:
    """Run a function on a thread; return the thread's id."""
    thread = threading.Thread(target=function, name=name)
    thread.start()
    thread.join()
    assert thread.native_id is not None
    return thread.native_id


def test_threads_each_block_has_the_thread_that_ran_it(started: tuple[Any, PythonSource]) -> None:
    work, source = started
    here = HostThread(os.getpid(), threading.get_native_id(), "MainThread")
    first = on_thread(work.one, "first")
    second = on_thread(work.two, "the second one, whose name is too long for the table of threads")
    work.both()
    assert ran(source) == {
        ONE: HostThread(os.getpid(), first, "first"),
        TWO: HostThread(
            os.getpid(), second, "the second one, whose name is too long for the table o"
        ),
        BOTH: here,
    }
    # The last one counts.
    work.one()
    third = on_thread(work.one, "third")
    assert ran(source) == {ONE: HostThread(os.getpid(), third, "third")}


def test_threads_not_asked_for_are_not_told(started: tuple[Any, PythonSource]) -> None:
    work, source = started
    work.one()
    asked = source.consume()
    source.record_threads(False)
    work.one()
    assert source.consume() == asked
    assert source.thread_of == {}


def test_threads_of_forked_children_and_their_threads(started: tuple[Any, PythonSource]) -> None:
    work, source = started
    pid = os.fork()
    if pid == 0:
        work.one()
        on_thread(work.two, "in the child")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    work.both()
    found = ran(source)
    assert found[ONE] == HostThread(pid, pid, "MainThread")
    inside = found[TWO]
    assert inside is not None
    assert (inside.process, inside.name) == (pid, "in the child")
    assert found[BOTH] == HostThread(os.getpid(), threading.get_native_id(), "MainThread")


def test_threads_of_a_started_program(started: tuple[Any, PythonSource]) -> None:
    work, source = started
    code = f"from {work.__name__} import one; one()"
    with subprocess.Popen([sys.executable, "-c", code]) as program:
        assert program.wait(60) == 0
    assert ran(source)[ONE] == HostThread(program.pid, program.pid, "MainThread")


def test_threads_that_ended_leave_their_numbers(started: tuple[Any, PythonSource]) -> None:
    work, source = started
    for number in range(600):
        thread = on_thread(work.one, f"number {number}")
        assert ran(source) == {ONE: HostThread(os.getpid(), thread, f"number {number}")}


def test_threads_more_than_numbers_are_covered_without_a_thread(
    started: tuple[Any, PythonSource],
) -> None:
    work, source = started
    end = threading.Event()
    idle = [threading.Thread(target=end.wait, name=f"idle {number}") for number in range(260)]
    try:
        for thread in idle:
            thread.start()
        on_thread(work.one, "one too many")
        assert ran(source) == {ONE: None}
    finally:
        end.set()
        for thread in idle:
            thread.join()
    thread_id = on_thread(work.one, "one of few")
    assert ran(source) == {ONE: HostThread(os.getpid(), thread_id, "one of few")}


def test_take_numbers_of_killed_processes_are_free_again() -> None:
    memory = LineMemory.create([])
    pid = os.fork()
    if pid == 0:
        taken = threading.Barrier(254)

        def idle() -> None:
            if threads.take(memory) == threads.OTHER:
                os._exit(1)
            taken.wait()
            time.sleep(600)

        for _ in range(253):
            threading.Thread(target=idle, daemon=True).start()
        taken.wait()
        if threads.take(memory) != threads.OTHER:
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    number = threads.take(memory, "after")
    assert number != threads.OTHER
    assert threads.parse(threads.read(memory.buffer, number)) == (
        os.getpid(),
        threading.get_native_id(),
        "after",
    )
    memory.end()


def test_take_while_another_process_is_stopped_does_not_wait_long(tmp_path: Path) -> None:
    memory = LineMemory.create([])
    pid = os.fork()
    if pid == 0:
        fcntl.lockf(memory.descriptor, fcntl.LOCK_EX)
        (tmp_path / "locked").touch()
        time.sleep(600)
        os._exit(0)
    try:
        while not (tmp_path / "locked").exists():
            time.sleep(0.01)
        assert threads.take(memory) == threads.OTHER
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert threads.take(memory) != threads.OTHER
    memory.end()


@pytest.mark.parametrize(
    "entry",
    [b"", bytes(64), b"\xff" * 64, b"\xff" * 63],
    ids=["number without an entry", "free", "state of no meaning", "cut"],
)
def test_parse_entry_that_nobody_wrote_is_none(entry: bytes) -> None:
    assert threads.parse(entry) is None


def test_parse_entry_of_any_bytes_is_bounded() -> None:
    parsed = threads.parse(bytes(8) + b"\1\xff" + b"\xff" * 54)
    assert parsed == (0, 0, "\ufffd" * 54)
