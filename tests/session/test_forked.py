# SPDX-License-Identifier: Apache-2.0
"""A target whose process is forked anew: its state, its coverage, and that nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import TargetError, UsageError
from bridge.session.isolated import IsolatedTarget, RemoteTarget
from bridge.session.target_host import TargetState
from bridge.targets.services import Service, Services
from tests.support.endpoints import tcp_port

TARGET = """
import os, signal, socketserver, subprocess, sys, threading
from bridge import Endpoint

REQUESTS = []


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        line = self.rfile.readline().decode().strip()
        REQUESTS.append(line)
        if line == "fail":
            raise ValueError("no such line")
        self.wfile.write(f"{len(REQUESTS)}\\n".encode())


class Forking:
    name = "forking"
    packages = ("forking_target",)
    guest_modules = endpoints = ()
    guest_setup = guest_teardown = ""

    def __init__(self, words=()):
        self.words = words
        self.stopped = False

    def prepare(self):
        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    def start(self):
        if "exits" in self.words:
            sys.exit(3)
        if "faults" in self.words:
            os.kill(os.getpid(), signal.SIGSEGV)
        self.thread = threading.Thread(target=self.server.serve_forever, name="serving")
        self.thread.start()
        self.endpoints = (Endpoint("f", self.server.server_address[1], 7000),)

    def pid(self):
        return os.getpid()

    def start_program(self):
        return subprocess.Popen(["sleep", "1000"]).pid

    def lock(self):
        return threading.Lock()

    def stop(self):
        if "stays" in self.words:
            raise OSError("cannot stop")
        self.server.shutdown()
        self.thread.join()


class Threads(Forking):
    def __init__(self):
        super().__init__()
        threading.Thread(target=threading.Event().wait, name="early", daemon=True).start()
"""

Start = Callable[..., tuple[IsolatedTarget, Any, int]]


def nowhere(handle: int, pcs: Sequence[int]) -> None:
    raise AssertionError("nothing is done on behalf of a handle here")


def ask(port: int, line: str = "more") -> str:
    with socket.create_connection(("127.0.0.1", port), 20) as sock:
        sock.sendall(f"{line}\n".encode())
        return sock.makefile().readline().strip()


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stop(host: IsolatedTarget) -> None:
    with contextlib.suppress(TargetError):
        host.stop()


def problems(host: IsolatedTarget) -> list[str]:
    """Wait for what goes wrong in a target."""
    found: list[str] = []

    def look() -> bool:
        found.extend(host.problems())
        return bool(found)

    wait_until(look)
    return found


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "forking_target.py").write_text(textwrap.dedent(TARGET))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "forking_target", raising=False)
    return __import__("forking_target")


@pytest.fixture
def start(module: Any) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def made(what: Any = None, **options: Any) -> tuple[IsolatedTarget, Any, int]:
            services = Services([Service(what if what is not None else module.Forking)])
            host = IsolatedTarget(services, None, None, state=TargetState.FORK, **options)
            description = host.start(nowhere)
            stack.callback(stop, host)
            return host, RemoteTarget(host), tcp_port(description.endpoints)

        yield made


def test_forked_renew_leads_back_to_the_first_state(start: Start) -> None:
    host, target, port = start()
    host.consume()
    assert [ask(port), ask(port)] == ["1", "2"], "globals of the module count too"
    names = {str(host.table.lookup(pc)) for pc in host.consume()}
    assert any("forking_target.py" in name for name in names), "the child's lines are covered"
    first = target.pid()
    host.renew()
    assert not alive(first)
    assert target.pid() != first
    assert ask(port) == "1", "the socket that listens is the same"
    assert host.consume()


def test_forked_blocks_have_the_threads_of_the_child(start: Start) -> None:
    host, target, port = start()
    host.consume()
    host.record_threads(True)
    ask(port)
    # In the bridge's process, though the child noted them and another process read them.
    ran = {host.thread_of[pc] for pc in host.consume() if pc in host.thread_of}
    assert {thread.process for thread in ran} == {target.pid()}
    (handler,) = (thread for thread in ran if "process_request_thread" in thread.name)
    host.renew()
    # What the handler did after its answer.
    host.consume()
    ask(port)
    again = {host.thread_of[pc] for pc in host.consume() if pc in host.thread_of}
    assert {thread.process for thread in again} == {target.pid()}
    assert handler not in again
    host.record_threads(False)
    ask(port)
    assert host.consume()
    assert host.thread_of == {}


def test_forked_fault_of_the_child_is_told_once(start: Start) -> None:
    host, target, port = start()
    assert ask(port, "fail") == ""
    (fault,) = problems(host)
    assert "ValueError: no such line" in fault
    assert host.problems() == []
    os.kill(target.pid(), signal.SIGKILL)
    assert problems(host) == ["the process of the target forking was killed by SIGKILL"]
    assert host.problems() == []
    host.renew()
    assert ask(port) == "1"


def test_forked_nothing_is_left_when_the_process_that_is_ready_dies(start: Start) -> None:
    host, target, _ = start()
    child, program = target.pid(), target.start_program()
    host.renew()
    assert not alive(child)
    wait_until(lambda: not alive(program))
    child = target.pid()
    assert host.pid is not None
    os.kill(host.pid, signal.SIGKILL)
    wait_until(lambda: not alive(child))
    with pytest.raises(TargetError, match="was killed by SIGKILL"):
        host.renew()


def test_forked_attributes_are_copies_and_what_cannot_be_copied_is_told(start: Start) -> None:
    _, target, _ = start()
    assert target.name == "forking"
    with pytest.raises(UsageError, match="has no attribute nothing"):
        _ = target.nothing
    with pytest.raises(UsageError, match="cannot be copied out"):
        target.lock()
    with pytest.raises(UsageError, match="cannot be set"):
        target.stopped = True


@pytest.mark.parametrize(
    ("words", "message", "evidence"),
    [
        ("exits", "raised SystemExit on start: 3", "sys.exit"),
        ("faults", "was killed by SIGSEGV", "in start"),
    ],
)
def test_forked_start_that_fails_is_told(
    start: Start, module: Any, words: str, message: str, evidence: str
) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        start(module.Forking((words,)))
    assert evidence in caught.value.evidence


def test_forked_target_with_threads_is_refused(start: Start, module: Any) -> None:
    with pytest.raises(UsageError, match=r"threads before start\(\): early"):
        start(module.Threads)


def test_forked_stop_that_fails_is_told(module: Any) -> None:
    services = Services([Service(module.Forking(("stays",)))])
    host = IsolatedTarget(services, None, None, state=TargetState.FORK)
    host.start(nowhere)
    pid = RemoteTarget(host).pid()
    with pytest.raises(TargetError, match="cannot stop"):
        host.stop()
    wait_until(lambda: not alive(pid))
