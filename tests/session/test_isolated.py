# SPDX-License-Identifier: Apache-2.0
"""A target in a process of its own: the same coverage, and no harm when it dies or hangs."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import bridge
from bridge.errors import SourceError, TargetError, UsageError
from bridge.session.device_host import DeviceHost
from bridge.session.isolated import CONSUME_SECONDS, IsolatedTarget, _Channel, _Running
from bridge.sources.pcs import BlockTable
from bridge.sources.python.source import PythonSource, block_table
from bridge.targets.description import Description
from bridge.targets.plan9 import Plan9Target
from bridge.vm.process import spawn
from tests.support.coverage_data import executed
from tests.support.endpoints import tcp_port


def nowhere(handle: int, pcs: Sequence[int]) -> None:
    raise AssertionError("nothing is done on behalf of a handle here")


def use(port: int) -> None:
    """A few requests by pyroute2's own client, in a process that nobody measures."""
    script = textwrap.dedent("""
        import asyncio, sys
        from pyroute2.plan9.client import Plan9ClientSocket

        async def main():
            client = Plan9ClientSocket(address=("127.0.0.1", int(sys.argv[1])))
            await client.start_session()
            fid = await client.fid("README")
            await client.read(fid)
            for _ in range(5):
                await client.read(fid)

        asyncio.run(main())
    """)
    subprocess.run([sys.executable, "-c", script, str(port)], check=True, timeout=60)


def test_isolated_coverage_is_the_same_as_in_process(tmp_path: Path) -> None:
    isolated = IsolatedTarget("plan9", None, tmp_path)
    description = isolated.start(nowhere)
    try:
        first = set(isolated.consume())
        assert first, "the import of the packages counts"
        use(tcp_port(description.endpoints))
        news = list(isolated.consume())
        assert news
        assert list(isolated.consume()) == []
        names = {str(isolated.table.lookup(pc)) for pc in news}
        assert any(name.startswith("pyroute2/plan9/server.py:") for name in names)
    finally:
        isolated.stop()
    assert isolated.blocks_covered >= len(first | set(news))

    source = PythonSource(Plan9Target.packages, data_file=tmp_path / ".coverage.here")
    # The other process has its own modules; here they are imported already, so their import is
    # left out of the comparison.
    target = Plan9Target()
    # What the measured thread starts is measured too, and the client is not to be.
    with ThreadPoolExecutor(1) as measured:
        measured.submit(source.start).result()
        try:
            measured.submit(target.start).result()
            source.consume()
            use(target.endpoints[0].host_port)
            here = set(source.consume())
        finally:
            measured.submit(target.stop).result()
            measured.submit(source.stop).result()
    assert here == set(news)
    there = executed(tmp_path / ".coverage")
    assert len(source.table) == len(isolated.table)
    assert {name for name, lines in there.items() if lines}


SERVICE = """
import os, signal, socket, threading, time

def work():
    return 1

def serve(connection):
    with connection:
        while request := connection.recv(1):
            work()
            if request == b"x":
                BODY
            connection.sendall(b".")
"""
TARGET = """
import socket, threading
from bridge.targets import Endpoint

class Target:
    name = "own"
    packages = ("own_service",)
    guest_modules = ()
    guest_setup = guest_teardown = ""

    def __init__(self, directory):
        self.endpoints = ()

    def start(self):
        import own_service
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoints = (Endpoint("own", self.listener.getsockname()[1], 80),)
        threading.Thread(
            target=lambda: own_service.serve(self.listener.accept()[0]), daemon=True
        ).start()

    def stop(self):
        self.listener.close()
"""

OwnTarget = Callable[[str], IsolatedTarget]


@pytest.fixture
def own_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OwnTarget:
    """Makes a target, not started, whose service runs ``body`` when told to by a byte."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(body: str) -> IsolatedTarget:
        (tmp_path / "own_service.py").write_text(SERVICE.replace("BODY", body))
        (tmp_path / "own_target.py").write_text(TARGET)
        return IsolatedTarget("own_target:Target", None, tmp_path)

    return make


def tell(target: Description, request: bytes) -> Callable[[], bytes]:
    sock = socket.create_connection(("127.0.0.1", tcp_port(target.endpoints)))
    sock.settimeout(20)
    sock.sendall(request)
    return lambda: sock.recv(1)


def test_isolated_target_dies_only_its_coverage_is_lost(own_target: OwnTarget) -> None:
    isolated = own_target("os.kill(os.getpid(), signal.SIGKILL)")
    target = isolated.start(nowhere)
    assert isolated.consume()
    pid = isolated.pid
    assert pid is not None
    ended = os.pidfd_open(pid)
    assert tell(target, b"x")() == b""
    assert select.select([ended], [], [], 20)[0]
    os.close(ended)
    with pytest.raises(SourceError, match="was killed by SIGKILL"):
        isolated.consume()
    assert isolated.consume() == ()
    with pytest.raises(TargetError, match="was killed by SIGKILL"):
        isolated.stop()
    isolated.stop()


def test_isolated_take_lines_has_what_ran_also_of_a_process_that_died(
    own_target: OwnTarget, tmp_path: Path
) -> None:
    isolated = own_target("os.kill(os.getpid(), signal.SIGKILL)")
    assert isolated.take_lines() == {}
    service = str(tmp_path / "own_service.py")
    work, kill = (
        number
        for number, line in enumerate(SERVICE.splitlines(), 1)
        if line.strip() in ("return 1", "BODY")
    )
    target = isolated.start(nowhere)
    imported = isolated.take_lines()[service]
    assert len(imported) > 1
    assert not imported & {work, kill}
    with socket.create_connection(("127.0.0.1", tcp_port(target.endpoints))) as sock:
        sock.sendall(b".")
        assert sock.recv(1) == b"."
        assert work in isolated.take_lines()[service]
        sock.sendall(b"x")
        assert sock.recv(1) == b""
    assert {work, kill} <= isolated.take_lines()[service]
    with pytest.raises(TargetError, match="was killed by SIGKILL"):
        isolated.stop()
    assert isolated.take_lines() == {}


def test_isolated_take_lines_after_the_stop_has_lines_of_code_made_at_run_time(
    own_target: OwnTarget, tmp_path: Path
) -> None:
    isolated = own_target(r"exec(compile('\n' * 99 + 'a = 1', __file__, 'exec'), {})")
    target = isolated.start(nowhere)
    assert tell(target, b"x")() == b"."
    isolated.take_lines()
    isolated.stop()
    assert 100 in isolated.take_lines()[str(tmp_path / "own_service.py")]


def test_isolated_target_hangs_with_the_interpreter_lock_is_given_up(
    own_target: OwnTarget, tmp_path: Path
) -> None:
    # A regular expression that backtracks holds the lock as long as it takes: stop the process.
    isolated = own_target("os.kill(os.getpid(), signal.SIGSTOP)")
    target = isolated.start(nowhere)
    try:
        isolated.consume()
        answer = tell(target, b"x")
        pid = isolated.pid
        assert pid is not None
        stat = Path(f"/proc/{pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)
        start = time.monotonic()
        with pytest.raises(SourceError, match="did not answer"):
            isolated.consume()
        assert time.monotonic() - start < CONSUME_SECONDS + 5
        start = time.monotonic()
        for _ in range(20):
            assert isolated.consume() == ()
        assert time.monotonic() - start < 5, "it is not waited for again and again"
        os.kill(pid, signal.SIGCONT)
        assert answer() == b"."
        end = time.monotonic() + 20
        while not isolated.consume() and time.monotonic() < end:
            time.sleep(0.01)
        assert time.monotonic() < end, "what was covered meanwhile comes after all"
    finally:
        isolated.stop()
    assert (tmp_path / ".coverage").is_file()


def conversation(answers: Sequence[Sequence[bytes]]) -> tuple[IsolatedTarget, threading.Thread]:
    """A target whose process answers each question in pieces, 0.4 s apart."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs:
            for answer in answers:
                theirs.recv(9)
                theirs.sendall(answer[0])
                for piece in answer[1:]:
                    time.sleep(CONSUME_SECONDS + 0.15)
                    theirs.sendall(piece)

    isolated = IsolatedTarget("own", None, None)
    isolated._running = _Running(spawn(["sleep", "60"]), _Channel(ours))
    isolated._running.stack.callback(isolated._running.process.kill)
    isolated._running.stack.callback(ours.close)
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return isolated, thread


@pytest.mark.parametrize("cut", [1, 5, 9, 1000, 300000])
def test_isolated_answer_that_is_cut_by_the_timeout_comes_whole_later(cut: int) -> None:
    pcs = array("Q", range(100, 100100))
    first = b"c" + (8 * len(pcs)).to_bytes(8, "little") + pcs.tobytes()
    second = b"c" + (8).to_bytes(8, "little") + (42).to_bytes(8, "little")
    isolated, thread = conversation([(first[:cut], first[cut:]), (second,)])
    try:
        with pytest.raises(SourceError, match="did not answer"):
            isolated.consume()
        end = time.monotonic() + 30
        while not (late := isolated.consume()) and time.monotonic() < end:
            time.sleep(0.01)
        assert late == pcs
        assert list(isolated.consume()) == [42]
        thread.join(20)
    finally:
        assert isolated._running is not None
        isolated._running.stack.close()


def test_isolated_target_that_is_busy_on_start_is_no_failure(
    own_target: OwnTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolated = own_target("pass")
    with (tmp_path / "own_service.py").open("a") as file:
        # One call that keeps the interpreter lock for more than the time of an answer.
        file.write(
            "\ndef warm_up():\n"
            f"    while not os.path.exists({str(tmp_path / 'go')!r}):\n"
            "        time.sleep(0.01)\n"
            "    sum(range(10**8))\n"
            "\nthreading.Thread(target=warm_up, daemon=True).start()\n"
        )

    def table_then_go(packages: tuple[str, ...]) -> BlockTable:
        # The bridge calls this between the start of the target and the first question.
        table = block_table(packages)
        (tmp_path / "go").touch()
        time.sleep(0.3)
        return table

    monkeypatch.setattr("bridge.sources.python.source.block_table", table_then_go)
    with DeviceHost(1 << 20, source=isolated) as device:
        isolated.start(nowhere)
        try:
            device.consume()
            assert device.doorbell.failure is None
            assert isolated.given > 0
        finally:
            isolated.stop()


def test_isolated_settle_takes_what_is_covered_and_loses_nothing(own_target: OwnTarget) -> None:
    isolated = own_target("pass")
    target = isolated.start(nowhere)
    isolated.consume()
    given, covered = isolated.given, isolated.blocks_covered
    assert tell(target, b"x")() == b"."
    isolated.settle()
    isolated.settle()
    assert isolated.given == given
    isolated.stop()
    assert isolated.blocks_covered > covered


def test_isolated_target_raises_on_start_is_a_target_error(
    own_target: OwnTarget, tmp_path: Path
) -> None:
    isolated = own_target("pass")
    (tmp_path / "own_service.py").write_text("raise RuntimeError('no such luck')\n")
    with pytest.raises(TargetError, match="raised RuntimeError on start: no such luck"):
        isolated.start(nowhere)


def test_isolated_no_target_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="covers no packages"):
        IsolatedTarget("none", None, tmp_path).start(nowhere)


def test_isolated_native_programs_are_a_usage_error(tmp_path: Path) -> None:
    target = "tests.system.native_targets:LineServer"
    with pytest.raises(UsageError, match="only without --isolate") as raised:
        IsolatedTarget(target, None, tmp_path).start(nowhere)
    assert "leave out --isolate" in str(raised.value.hint)


def test_isolated_target_with_a_fault_of_the_tracer_raises_it_and_gives_the_pcs(
    own_target: OwnTarget,
) -> None:
    no_name = "type('NoName', (str,), {'__hash__': lambda self: 1 // 0})"
    code = "compile('a = 1', '', 'exec')"
    isolated = own_target(f"exec({code}.replace(co_filename={no_name}('bad.py')))")
    target = isolated.start(nowhere)
    try:
        isolated.consume()
        assert tell(target, b"x")() == b"."
        with pytest.raises(SourceError, match="the tracer failed: ZeroDivisionError") as raised:
            isolated.consume()
        assert f"of process {isolated.pid}" in str(raised.value)
        places = {str(isolated.table.lookup(pc)) for pc in isolated.consume()}
        assert any(place.startswith("own_service.py:") for place in places)
        faults = isolated.tracer_faults
        assert faults > 0
    finally:
        isolated.stop()
    assert isolated.tracer_faults >= faults


@pytest.mark.vm
def test_isolated_target_serves_a_guest(tmp_path: Path) -> None:
    with bridge.boot(out=tmp_path, isolate=True) as guest:
        result = guest.kcov(["cat", "/mnt/target/README"])
        assert result.exit_status == 0
        names = {str(guest.symbolize(pc)) for pc in result.pcs}
        assert any(name.startswith("pyroute2/plan9/server.py:") for name in names)
        if guest.kernel is not None:
            assert any(name.startswith("p9_client_") for name in names)
        # The target dies under the guest's hands; the device does not.
        source = guest.source
        assert isinstance(source, IsolatedTarget)
        assert source.pid is not None
        os.kill(source.pid, signal.SIGKILL)
        after = guest.run("timeout 10 kcov-exec -- true")
        assert after.exit_status == 0
        assert guest.doorbell is not None
        assert "SIGKILL" in str(guest.doorbell.failure)
        with pytest.raises(TargetError):
            source.stop()
