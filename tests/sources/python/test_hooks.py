# SPDX-License-Identifier: Apache-2.0
"""What is measured: threads, forked processes and Python programs that come from the target."""

from __future__ import annotations

import _thread
import concurrent.futures
import importlib
import logging
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from bridge.sources.python.hooks import LINES_VARIABLE, MEASURING
from bridge.sources.python.source import PythonSource
from tests.sources.python.support import MakePackage, MakeSource, Measure, TargetThread, places
from tests.support.coverage_data import executed

WORK = """
    def red():
        return 1

    def blue():
        return 2

    def green(n):
        return n + 1
"""
RED, BLUE, GREEN = "work:3", "work:6", "work:9"

SERVER = """
    import socketserver, sys
    from . import work

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            # The children have the client's ends of the test too, so there is no end of file.
            while (request := self.request.recv(1)) not in (b"", b"q"):
                work.red() if request == b"r" else work.blue()
                self.request.sendall(b".")

    class Server(socketserver.ForkingTCPServer):
        block_on_close = False

    if __name__ == "__main__":
        with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
            print(server.server_address[1], flush=True)
            server.handle_request()
"""


@pytest.fixture
def started(measure: Measure) -> tuple[Any, PythonSource]:
    """The package's modules, imported, and a source that measures the target's thread."""
    server, source = measure("server", work=WORK, server=SERVER)
    return server.work, source


def ask(connection: socket.socket, request: bytes) -> None:
    connection.settimeout(60)
    connection.sendall(request)
    assert connection.recv(1) == b"."


def of_work(source: PythonSource) -> list[str]:
    """What work.py has covered since the last look."""
    return [place for place in places(source) if place.startswith("work:")]


def test_a_forked_child_is_there_when_it_answers_however_it_ends(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    work, source = started
    answers, answering = os.pipe()

    def fork() -> int:
        pid = os.fork()
        if pid == 0:
            work.red()
            os.write(answering, b".")
            signal.pause()
        return pid

    pid = on_target(fork)
    try:
        assert os.read(answers, 1) == b"."
        assert of_work(source) == [RED]
        assert source.consume() == []
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(answers)
        os.close(answering)
    on_target(source.stop)
    lines = next(v for k, v in executed(source.data_file).items() if k.endswith("work.py"))
    assert 3 in lines
    assert 6 not in lines


def test_a_forking_server_is_covered_request_by_request(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    work, source = started
    module = sys.modules[work.__name__.replace(".work", ".server")]
    server = module.Server(("127.0.0.1", 0), module.Handler)

    def serve() -> threading.Thread:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        return thread

    thread = on_target(serve)
    try:
        with (
            socket.create_connection(server.server_address) as one,
            socket.create_connection(server.server_address) as two,
        ):
            for connection, request, expected in 3 * (
                (one, b"r", RED),
                (two, b"b", BLUE),
                (one, b"b", BLUE),
            ):
                ask(connection, request)
                assert of_work(source) == [expected]
            one.sendall(b"q")
            two.sendall(b"q")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_a_process_pool_are_covered(
    started: tuple[Any, PythonSource], on_target: TargetThread, method: str
) -> None:
    work, source = started
    context = multiprocessing.get_context(method)

    def work_in_pool() -> list[str]:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            assert pool.submit(work.green, 1).result(60) == 2
            first = of_work(source)
            assert pool.submit(work.red).result(60) == 1
            return [*first, "then", *of_work(source)]

    found = on_target(work_in_pool)
    # A worker that was not forked has imported the package too.
    assert GREEN in found[: found.index("then")]
    assert RED not in found[: found.index("then")]
    assert found[found.index("then") :] == ["then", RED]


def test_a_server_that_is_started_with_subprocess_is_covered(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    work, source = started
    command = [sys.executable, "-m", work.__name__.replace(".work", ".server")]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    program = on_target(start)
    try:
        assert program.stdout is not None
        port = int(program.stdout.readline())
        of_work(source)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            for request, expected in ((b"r", RED), (b"b", BLUE), (b"r", RED)):
                ask(connection, request)
                assert of_work(source) == [expected]
    finally:
        program.kill()
        program.communicate()


@pytest.mark.parametrize("way", ["posix_spawn", "execv", "execve"])
def test_other_ways_to_start_a_program_are_covered(
    started: tuple[Any, PythonSource], on_target: TargetThread, way: str
) -> None:
    work, source = started
    argv = [sys.executable, "-c", f"import {work.__name__} as work; work.blue()"]

    def start() -> int:
        if way == "posix_spawn":
            return os.posix_spawn(sys.executable, argv, os.environ)
        pid = os.fork()
        if pid == 0:
            try:
                if way == "execv":
                    os.execv(sys.executable, argv)
                os.execve(sys.executable, argv, os.environ)
            finally:
                os._exit(127)
        return pid

    _, status = os.waitpid(on_target(start), 0)
    assert status == 0
    assert BLUE in of_work(source)


def test_a_program_is_as_it_would_be_without(
    started: tuple[Any, PythonSource], on_target: TargetThread, tmp_path: Path
) -> None:
    """Its own sitecustomize runs, its path and its streams are its own."""
    (tmp_path / "packages" / "sitecustomize.py").write_text("ran = True\n")
    script = (
        "import sys, json, sitecustomize as s; print(json.dumps([sys.path, s.ran, s.__file__]))"
    )
    command = [sys.executable, "-c", script]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    without, within = run(), on_target(run)
    assert without.returncode == 0, without.stderr
    assert (within.stdout, within.stderr) == (without.stdout, without.stderr)
    assert LINES_VARIABLE not in os.environ


def test_a_program_with_a_module_of_the_projects_name_is_covered(
    started: tuple[Any, PythonSource], on_target: TargetThread, tmp_path: Path
) -> None:
    work, source = started
    (tmp_path / "packages" / "bridge.py").write_text("mine = True\n")
    script = f"import bridge, {work.__name__} as work; assert bridge.mine; work.blue()"
    command = [sys.executable, "-c", script]
    on_target(lambda: subprocess.run(command, check=True, timeout=60, cwd=tmp_path))
    assert BLUE in of_work(source)


def test_a_thread_without_threading_is_covered(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    work, source = started
    done = _thread.allocate_lock()
    done.acquire()

    def run() -> None:
        work.red()
        done.release()

    on_target(lambda: _thread.start_new_thread(run, ()))
    assert done.acquire(timeout=60)
    assert of_work(source) == [RED]


def test_threads_of_others_are_not_covered(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    work, source = started
    work.red()
    thread = threading.Thread(target=work.blue)
    thread.start()
    thread.join()
    subprocess.run([sys.executable, "-c", f"import {work.__name__}"], check=True, timeout=60)
    assert source.consume() == []


def test_settrace_none_in_the_code_under_test_does_not_end_it(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    work, source = started

    def handler() -> None:
        sys.settrace(None)
        assert sys.gettrace() is None
        work.red()

    for _ in range(3):
        on_target(handler)
        assert of_work(source) == [RED]


def test_another_trace_function_goes_on_beside_it(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    work, source = started
    seen: list[tuple[str, str, int]] = []

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename == work.__file__:
            seen.append((event, frame.f_code.co_name, frame.f_lineno))
        return trace

    def handler(function: Callable[[], object]) -> None:
        function()
        assert sys.gettrace() is trace

    on_target(sys.settrace, trace)
    for function, expected in ((work.red, RED), (work.blue, BLUE), (work.red, RED)):
        on_target(handler, function)
        assert of_work(source) == [expected]
    assert [row[:2] for row in seen[:3]] == [("call", "red"), ("line", "red"), ("return", "red")]
    count = len(seen)
    assert count == 9
    # It outlives the source, and ends as it would without.
    on_target(source.stop)
    on_target(handler, work.blue)
    assert len(seen) == count + 3
    on_target(sys.settrace, None)
    on_target(work.blue)
    assert len(seen) == count + 3


def test_two_sources_of_one_package_are_given_what_their_own_threads_ran(
    make_package: MakePackage, make_source: MakeSource, on_target: TargetThread
) -> None:
    name = make_package(work=WORK)
    other_thread = TargetThread()
    one, two = make_source(name), make_source(name)
    try:
        on_target(one.start)
        other_thread(two.start)
        work = on_target(importlib.import_module, f"{name}.work")
        assert of_work(one)
        assert two.consume() == []
        for _ in range(20):
            on_target(work.red)
            other_thread(work.blue)
            assert (of_work(one), of_work(two)) == ([RED], [BLUE])
        # The end of one is not that of the other, nor of what it covers.
        on_target(one.stop)
        on_target(work.red)
        other_thread(work.green, 1)
        assert (one.consume(), of_work(two)) == ([], [GREEN])
        assert len(MEASURING.feeds) == 1
    finally:
        other_thread.end()


def test_two_sources_on_one_thread_are_both_given_it(
    started: tuple[Any, PythonSource], make_source: MakeSource, on_target: TargetThread
) -> None:
    work, source = started
    second = make_source(work.__name__.partition(".")[0])
    on_target(second.start)
    on_target(work.red)
    assert of_work(source) == of_work(second) == [RED]
    on_target(source.stop)
    on_target(work.blue)
    assert (source.consume(), of_work(second)) == ([], [BLUE])


def test_a_source_in_a_forked_child_of_a_process_that_has_one(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    """The child's is its own; what is forked from elsewhere than the target is not the parent's."""
    work, source = started
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            mine = PythonSource(source.packages, data_file=None)
            mine.start()
            work.red()
            found = of_work(mine)
            mine.stop()
            # Also what unwinds in the child leaves the parent's alone.
            source.stop()
            status = 0 if found == [RED] else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert source.consume() == []
    on_target(work.blue)
    assert of_work(source) == [BLUE]


def test_files_that_appear_in_a_child_are_missed_with_a_warning(
    started: tuple[Any, PythonSource],
    on_target: TargetThread,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    work, source = started
    package = work.__name__.partition(".")[0]
    (tmp_path / "packages" / package / "late.py").write_text("a = 1\n")
    command = [sys.executable, "-c", f"import {package}.late"]
    on_target(lambda: subprocess.run(command, check=True, timeout=60))
    with caplog.at_level(logging.WARNING):
        on_target(source.stop)
    assert "appeared during the measurement" in caplog.text


def test_a_traceback_of_a_thread_shows_nothing_of_the_tracer(
    started: tuple[Any, PythonSource], on_target: TargetThread
) -> None:
    seen: list[Any] = []

    def fail() -> None:
        raise ValueError("as it should")

    def run() -> None:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    before, threading.excepthook = threading.excepthook, seen.append
    try:
        on_target(run)
    finally:
        threading.excepthook = before
    frames = []
    trace = seen[0].exc_traceback
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert frames == ["_bootstrap_inner", "run", "fail"]


CANCELLED = textwrap.dedent(
    """
    import asyncio


    async def stop(jobs):
        for job in jobs:
            job.cancel()
            try:
                await job
            except asyncio.CancelledError:
                pass


    async def answer(word):
        if word != "stop":
            return "idle"
        job = asyncio.ensure_future(asyncio.sleep(5))
        await asyncio.sleep(0)
        await stop([job])
        if job.cancelled():
            text = "cancelled"
        else:
            text = "done"
        return text
    """
)


def test_lines_after_an_exception_that_is_thrown_in_are_covered_on_every_python(
    measure: Measure, on_target: TargetThread
) -> None:
    """Python 3.11 shows a tracer no call of a coroutine into which an exception is thrown."""
    import asyncio

    module, source = measure("cancelled", cancelled=CANCELLED)
    assert on_target(lambda: asyncio.run(module.answer("stop"))) == "cancelled"
    found = [int(place.partition(":")[2]) for place in places(source)]
    assert found == [6, 7, 9, 10, 11, 15, 17, 21, 24]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="settrace_all_threads() is of Python 3.12")
@pytest.mark.parametrize("with_function", [False, True])
def test_threads_after_settrace_all_threads_are_still_measured(
    started: tuple[Any, PythonSource], on_target: TargetThread, with_function: bool
) -> None:
    """It replaces the trace functions of all threads, not only of the one that calls it."""
    work, source = started
    seen: list[str] = []

    def trace(frame: FrameType, event: str, arg: object) -> None:
        seen.append(frame.f_code.co_name)

    requests: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
    answers: queue.SimpleQueue[object] = queue.SimpleQueue()

    def serve() -> None:
        while (request := requests.get()) is not None:
            answers.put(request())

    def begin() -> threading.Thread:
        thread = threading.Thread(target=serve)
        thread.start()
        return thread

    thread = on_target(begin)
    set_all: Any = getattr(threading, "settrace_all_threads")  # noqa: B009 - not in Python 3.11
    try:
        on_target(set_all, trace if with_function else None)
        for _ in range(2):
            on_target(work.red)
            assert of_work(source) == [RED]
            requests.put(work.blue)
            assert answers.get(timeout=60) == 2
            assert of_work(source) == [BLUE]
        assert ("red" in seen, "blue" in seen) == (with_function, with_function)
    finally:
        on_target(set_all, None)
        sys.settrace(None)
        requests.put(None)
        thread.join()
