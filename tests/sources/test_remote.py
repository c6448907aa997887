# SPDX-License-Identifier: Apache-2.0
"""Handles: what a target does on behalf of somebody goes to whoever enabled the handle."""

from __future__ import annotations

import errno
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

import bridge
from bridge.sources import remote
from bridge.sources.pcs import Location
from bridge.sources.python.source import PythonSource
from bridge.targets import TARGET_ADDRESS
from tests.support.coverage_data import executed
from tests.support.programs import guest_program

CODE = """
    def leaf(n):
        if n:
            return leaf(n - 1)
        return 0

    def marked(handle, value):
        with handle(value):
            return inside(2)

    def inside(n):
        return leaf(n)

    def failing():
        raise ValueError("as it should")

    def numbers():
        for n in range(100):
            yield n
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "handled.py").write_text(textwrap.dedent(CODE))
    monkeypatch.syspath_prepend(tmp_path)
    yield "handled"
    sys.modules.pop("handled", None)


def on_a_thread(function: Callable[[], None]) -> None:
    """coverage.py measures the thread that starts it until the end: not pytest's, then."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def lines_of(source: PythonSource, pcs: Sequence[int]) -> set[int]:
    found: set[int] = set()
    for pc in pcs:
        location = source.table.lookup(pc)
        assert location is not None
        found.update(location.block.lines)
    return found


def line(text: str) -> int:
    return next(n for n, it in enumerate(textwrap.dedent(CODE).splitlines(), 1) if text in it)


def load(name: str) -> ModuleType:
    return __import__(name)


@contextmanager
def measuring(module: str, directory: Path) -> Iterator[tuple[PythonSource, ModuleType]]:
    """A source that measures the module, on this thread, and the module; its import is consumed."""
    source = PythonSource([module], data_file=directory / ".coverage")
    source.start()
    try:
        code = load(module)
        source.consume()
        yield source, code
    finally:
        source.stop()


def test_what_is_called_inside_goes_to_the_handle_alone(module: str, tmp_path: Path) -> None:
    delivered: list[tuple[int, list[int]]] = []

    def check() -> None:
        with measuring(module, tmp_path) as (source, code):
            with remote.serving(source, lambda value, pcs: delivered.append((value, list(pcs)))):
                assert code.marked(remote.handle, 7) == 0
            ((value, pcs),) = delivered
            assert value == 7
            assert {line("return leaf(n)"), line("return 0")} <= lines_of(source, pcs)
            left = lines_of(source, source.consume())
            assert line("with handle") in left
            assert line("return leaf(n)") not in left
            assert line("return 0") not in left

    on_a_thread(check)
    (lines,) = executed(tmp_path / ".coverage").values()
    assert {line("return 0"), line("return leaf(n)")} <= set(lines)


def test_blocks_nest_raise_and_leave_generators_alone(module: str, tmp_path: Path) -> None:
    delivered: dict[int, list[int]] = {}

    def check() -> None:
        with measuring(module, tmp_path) as (source, code):
            with remote.serving(source, lambda value, pcs: delivered.update({value: list(pcs)})):
                with remote.handle(1):
                    code.leaf(0)
                    with pytest.raises(ValueError, match="as it should"), remote.handle(2):
                        code.failing()
                    generator = code.numbers()
                    next(generator)
                next(generator)
            assert lines_of(source, delivered[2]) == {line("raise ValueError")}
            assert line("return 0") in lines_of(source, delivered[1])
            assert line("yield n") in lines_of(source, delivered[1])
            # Entered anew after the block, the generator counts for everybody again.
            assert lines_of(source, source.consume()) >= {line("for n in")}

    on_a_thread(check)


def test_other_threads_go_on_for_everybody(module: str, tmp_path: Path) -> None:
    delivered: list[int] = []

    def check() -> None:
        with measuring(module, tmp_path) as (source, code):
            with remote.serving(source, lambda _, pcs: delivered.extend(pcs)), remote.handle(5):
                other = threading.Thread(target=code.inside, args=(1,))
                other.start()
                other.join()
            assert line("return leaf(n)") in lines_of(source, source.consume())
            assert delivered == []

    on_a_thread(check)


def test_outside_a_session_a_block_does_nothing() -> None:
    with remote.handle(3):
        pass


@pytest.mark.parametrize("instance", [0, -1, 1 << 32])
def test_common_handles(instance: int) -> None:
    with pytest.raises(ValueError, match="common subsystem"):
        remote.common_handle(instance)
    assert remote.common_handle(1) == 1


def test_usb_handles() -> None:
    assert remote.usb_handle(0) == 1 << 56
    assert remote.usb_handle(2**32 - 1) == 0x01000000FFFFFFFF
    with pytest.raises(ValueError, match="USB bus"):
        remote.usb_handle(1 << 32)


SERVER = """
    from bridge.sources.remote import common_handle, handle, usb_handle


    def marked():
        value = 1
        return value


    def common():
        value = 2
        return value


    def unmarked():
        value = 3
        return value


    def serve(connection):
        with connection:
            while request := connection.recv(1):
                if request == b"m":
                    with handle(usb_handle(3)):
                        marked()
                elif request == b"c":
                    with handle(common_handle(9)):
                        common()
                else:
                    unmarked()
                connection.sendall(b".")
"""

TARGET = """
    import socket
    import threading

    from bridge.targets import Endpoint


    class Target:
        name = "handles"
        packages = ("handle_server",)
        guest_modules = ()
        guest_setup = guest_teardown = ""

        def __init__(self, directory):
            self.listener = socket.create_server(("127.0.0.1", 0))
            self.endpoints = (Endpoint("it", self.listener.getsockname()[1], 80),)

        def start(self):
            import handle_server

            self.thread = threading.Thread(target=self.run, args=(handle_server.serve,))
            self.thread.start()

        def run(self, serve):
            while True:
                try:
                    connection, _ = self.listener.accept()
                except OSError:
                    return
                serve(connection)

        def stop(self):
            self.listener.shutdown(socket.SHUT_RDWR)
            self.thread.join()
            self.listener.close()
"""


@pytest.mark.vm
def test_a_guest_gets_what_is_done_on_its_behalf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "handle_server.py").write_text(textwrap.dedent(SERVER))
    (tmp_path / "handle_target.py").write_text(textwrap.dedent(TARGET))
    monkeypatch.syspath_prepend(tmp_path)
    program = guest_program(Path(__file__).resolve().parents[1] / "system" / "remote.c")
    with bridge.boot(target="handle_target:Target", source="python") as guest:
        guest.guest.put(program, "/tmp/remote", 0o755)
        result = guest.run(f"/tmp/remote {TARGET_ADDRESS} 80 mumcu", timeout=60)
        assert result.exit_status == 0, result.stderr
        rows = [row.split() for row in result.text.splitlines()]
        assert [int(value) for kind, value in rows if kind == "errno"] == [
            errno.EFAULT,
            errno.EINVAL,
            errno.EBUSY,
        ]
        found: dict[str, set[int]] = {"remote": set(), "plain": set()}
        for kind, value in rows:
            if kind in found:
                location = guest.symbolize(int(value, 16))
                assert isinstance(location, Location)
                found[kind].update(location.block.lines)

        def number(text: str) -> int:
            lines = textwrap.dedent(SERVER).splitlines()
            return next(n for n, it in enumerate(lines, 1) if text in it)

        assert found["remote"] >= {number("value = 1"), number("value = 2")}
        assert number("value = 3") not in found["remote"]
        assert number("value = 3") in found["plain"]
        assert not found["plain"] & {number("value = 1"), number("value = 2")}
