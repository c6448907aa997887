# SPDX-License-Identifier: Apache-2.0
"""Targets: made by name, started, spoken to with a 9P client, stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroute2.plan9.client import Plan9ClientSocket

from bridge.errors import TargetError, UsageError
from bridge.targets import MOUNT_POINT, TARGET_ADDRESS, Target
from bridge.targets.none import NoTarget
from bridge.targets.plan9 import GUEST_PORT, Plan9Target
from bridge.targets.programs import PROGRAMS
from bridge.targets.registry import create, has_only_programs, names
from bridge.targets.tree import Entry, built_in, read_directory
from tests.support.endpoints import tcp_port

Talk = Callable[[Any], Awaitable[Any]]


def talk(target: Target, conversation: Talk) -> Any:
    """Connect pyroute2's own client to a target, hold a conversation, disconnect."""

    async def session() -> Any:
        client = Plan9ClientSocket(address=("127.0.0.1", tcp_port(target.endpoints)))
        try:
            await client.start_session()
            return await asyncio.wait_for(conversation(client), 20)
        finally:
            client.close()

    return asyncio.run(session())


def read_whole(target: Target, path: str) -> bytes:
    """A file's content, 8 KiB a request."""

    async def conversation(client: Any) -> bytes:
        fid = await client.fid(path)
        content = b""
        while True:
            answer = await client.read(fid, offset=len(content), count=8192)
            if not answer["data"]:
                return content
            content += bytes(answer["data"])

    return bytes(talk(target, conversation))


@pytest.fixture
def plan9() -> Iterator[Plan9Target]:
    target = Plan9Target()
    target.start()
    yield target
    target.stop()


def target_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "target-plan9"]


def test_plan9_built_in_tree_each_file_is_served(plan9: Plan9Target) -> None:
    files = [entry for entry in built_in() if entry.content is not None]
    assert len(files) > 50
    for entry in files:
        assert read_whole(plan9, entry.path) == entry.content, entry.path


def test_plan9_users_directory_is_served_as_a_copy(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deeper").mkdir(parents=True)
    (tmp_path / "sub" / "deeper" / "bytes").write_bytes(bytes(range(256)) * 50)
    (tmp_path / "text").write_text("before")
    target = create("plan9", tmp_path)
    target.start()
    try:
        assert read_whole(target, "sub/deeper/bytes") == bytes(range(256)) * 50

        async def overwrite(client: Any) -> int:
            answer = await client.write(await client.fid("text"), b"AFTER!")
            return int(answer["count"])

        assert talk(target, overwrite) == 6
        assert read_whole(target, "text") == b"AFTER!"
    finally:
        target.stop()
    assert (tmp_path / "text").read_text() == "before"


def test_plan9_request_in_many_segments_is_answered(plan9: Plan9Target) -> None:
    async def conversation(client: Any) -> int:
        answer = await client.write(await client.fid("scratch/a"), b"x" * 1_000_000)
        return int(answer["count"])

    assert talk(plan9, conversation) == 1_000_000
    assert read_whole(plan9, "scratch/a") == b"x" * 1_000_000


def receive_message(connection: socket.socket) -> bytes:
    message = b""
    while len(message) < 4 or len(message) < int.from_bytes(message[:4], "little"):
        piece = connection.recv(65536)
        assert piece, "the server hung up"
        message += piece
    return message


def hung_up(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def version_request() -> bytes:
    body = struct.pack("<BHI", 100, 0xFFFF, 8192) + struct.pack("<H", 6) + b"9P2000"
    return struct.pack("<I", 4 + len(body)) + body


def test_plan9_request_byte_by_byte_and_two_at_once_are_answered(plan9: Plan9Target) -> None:
    with socket.create_connection(("127.0.0.1", plan9.endpoints[0].host_port), 5) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in version_request():
            connection.sendall(bytes([byte]))
        first = receive_message(connection)
        assert first[4] == 101  # Rversion
        assert first.endswith(b"9P2000")
        connection.sendall(version_request() * 2)
        both = receive_message(connection)
        while len(both) < 2 * len(first):
            both += connection.recv(65536)
        assert both == first * 2


@pytest.mark.parametrize("size", [0, 6, 0x7FFFFFFF])
def test_plan9_impossible_size_cuts_only_that_connection(plan9: Plan9Target, size: int) -> None:
    with socket.create_connection(("127.0.0.1", plan9.endpoints[0].host_port), 5) as connection:
        connection.sendall(struct.pack("<I", size) + b"\0" * 100)
        assert hung_up(connection)
    assert read_whole(plan9, "README")


def test_plan9_bad_message_is_logged_within_bounds(
    plan9: Plan9Target, caplog: pytest.LogCaptureFixture
) -> None:
    walk_cut_short = struct.pack("<IBHI", 11, 110, 1, 0)
    with caplog.at_level(logging.WARNING, logger="bridge.targets.plan9"):
        for _ in range(15):
            address = ("127.0.0.1", plan9.endpoints[0].host_port)
            with socket.create_connection(address, 5) as connection:
                connection.sendall(walk_cut_short)
                assert hung_up(connection)
    shown = [record for record in caplog.records if record.name == "asyncio"]
    assert len(shown) == 10
    assert all(record.exc_info for record in shown)
    assert any("the 9P server raised 10 times" in each.getMessage() for each in caplog.records)
    assert read_whole(plan9, "README")


def test_stop_closes_the_port_with_a_client_connected() -> None:
    target = Plan9Target()
    target.start()
    port = target.endpoints[0].host_port
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(version_request())
        receive_message(connection)
        target.stop()
        assert hung_up(connection)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
    assert target.endpoints == ()
    assert target_threads() == []
    target.stop()


def test_start_again_after_stop_but_not_twice(plan9: Plan9Target) -> None:
    with pytest.raises(TargetError, match="already started"):
        plan9.start()
    plan9.stop()
    plan9.start()
    assert read_whole(plan9, "README")


def test_plan9_two_targets_at_once_share_nothing(plan9: Plan9Target) -> None:
    other = Plan9Target()
    other.start()
    try:
        assert other.endpoints[0].host_port != plan9.endpoints[0].host_port

        async def overwrite(client: Any) -> None:
            await client.write(await client.fid("README"), b"OTHER")

        talk(other, overwrite)
        assert read_whole(other, "README").startswith(b"OTHER")
        assert read_whole(plan9, "README").startswith(b"Files")
    finally:
        other.stop()


def test_plan9_start_raises_is_a_target_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyroute2.plan9.server

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no file system today")

    monkeypatch.setattr(pyroute2.plan9.server, "Filesystem", broken)
    target = Plan9Target()
    with pytest.raises(TargetError, match="RuntimeError on start: no file system today") as caught:
        target.start()
    assert "Traceback" in caught.value.evidence
    assert target_threads() == []
    assert target.endpoints == ()
    target.stop()


def test_plan9_server_ends_by_itself_is_a_target_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyroute2.plan9.server

    async def ends(self: object) -> asyncio.Task[None]:
        async def serve() -> None:
            await asyncio.sleep(0.05)
            raise RuntimeError("enough for today")

        return asyncio.create_task(serve())

    monkeypatch.setattr(pyroute2.plan9.server.Plan9ServerSocket, "async_run", ends)
    target = Plan9Target()
    target.start()
    port = target.endpoints[0].host_port
    for thread in threading.enumerate():
        if thread.name == "target-plan9":
            thread.join(10)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
    with pytest.raises(TargetError, match="ended by itself: RuntimeError: enough for today"):
        target.stop()
    target.stop()


def test_plan9_stuck_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.targets.plan9._STOP_SECONDS", 0.2)
    target = Plan9Target()
    target.start()
    release = threading.Event()
    assert target._loop is not None
    target._loop.call_soon_threadsafe(release.wait)
    with pytest.raises(TargetError, match="did not end in"):
        target.stop()
    release.set()


def test_plan9_no_free_port_is_a_target_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(TargetError, match="Address already in use"):
        Plan9Target().start()


def test_plan9_code_under_test_is_imported_only_by_start() -> None:
    program = """
        import sys
        from bridge.targets.registry import create
        target = create("plan9")
        assert not [name for name in sys.modules if name.startswith("pyroute2")]
        target.start()
        assert "pyroute2.plan9.server" in sys.modules
        target.stop()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)


def test_plan9_guest_setup_mounts_the_server(plan9: Plan9Target) -> None:
    assert plan9.guest_modules == ("9p", "9pnet_fd")
    assert plan9.endpoints[0].guest_port == GUEST_PORT
    assert f"port={GUEST_PORT}," in plan9.guest_setup
    assert "version=9p2000,noextend" in plan9.guest_setup
    assert f"{TARGET_ADDRESS} {MOUNT_POINT}" in plan9.guest_setup
    assert f"kcov-wire {GUEST_PORT} mount" in plan9.guest_setup_by_region
    for script in (plan9.guest_setup, plan9.guest_setup_by_region, plan9.guest_teardown):
        subprocess.run(["sh", "-n"], input=script, text=True, check=True)


def test_names_and_none() -> None:
    assert names() == ("plan9", "none", *PROGRAMS)
    target = create("none")
    target.start()
    assert target.packages == ()
    assert target.endpoints == ()
    target.stop()


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("plan8", "there is no target plan8", "did you mean plan9?"),
        ("zzz", "there is no target zzz", "the targets are plan9, none"),
        (":Class", "is not of the form module:Class", ""),
        ("module:", "is not of the form module:Class", ""),
        ("no_such_module_here:A", "there is no module no_such_module_here", "working directory"),
        ("bridge.targets.plan9:Plan8Target", "has no class", "did you mean Plan9Target?"),
        ("bridge.targets.plan9:GUEST_PORT", "has no class GUEST_PORT", ""),
    ],
)
def test_create_wrong_name_is_a_usage_error(name: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        create(name)
    assert message in caught.value.message
    assert hint in caught.value.hint


OWN = """
    from bridge.targets import Endpoint

    class Good:
        name = "good"
        packages = ("mine",)
        guest_modules = ()
        guest_setup = guest_teardown = ""
        def __init__(self, directory): self.directory = directory
        def start(self): pass
        @property
        def endpoints(self): raise RuntimeError("not started")
        def stop(self): pass

    class Half:
        name = "half"
        packages = ("mine",)
        def __init__(self, directory): pass

    class Raises:
        def __init__(self, directory): raise ValueError("bad weather")

    class WrongPackages(Good):
        packages = "mine"
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_target_module.py").write_text(textwrap.dedent(OWN))
    (tmp_path / "own_broken_module.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_target_module"
    for name in ("own_target_module", "own_broken_module"):
        sys.modules.pop(name, None)


def test_create_own_target_from_the_working_directory_works(
    own_module: str, tmp_path: Path
) -> None:
    target = create(f"{own_module}:Good", tmp_path)
    assert target.name == "good"
    assert vars(target) == {"directory": tmp_path}


def test_example_of_the_documentation_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "targets.md"
    example = page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    (tmp_path / "documented_web_target.py").write_text(example)
    (tmp_path / "file").write_text("served")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    target = create("documented_web_target:WebServer", tmp_path)
    target.start()
    try:
        address = ("127.0.0.1", tcp_port(target.endpoints))
        with socket.create_connection(address, 5) as connection:
            connection.sendall(b"GET /file HTTP/1.0\r\n\r\n")
            with connection.makefile("rb") as answer:
                assert answer.read().endswith(b"\r\n\r\nserved")
    finally:
        target.stop()
        target.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 5)
    sys.modules.pop("documented_web_target")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_target_module:Half", "it lacks start, stop"),
        ("own_target_module:Raises", "raised ValueError while it was made"),
        ("own_target_module:WrongPackages", "packages is 'mine'"),
        ("own_broken_module:Any", "raised ModuleNotFoundError while it was made"),
    ],
)
def test_create_class_is_no_target_is_a_target_error(
    own_module: str, name: str, message: str
) -> None:
    with pytest.raises(TargetError) as caught:
        create(name)
    assert message in caught.value.message


def test_tree_directory_cannot_be_served_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="is not a directory"):
        Plan9Target(tmp_path / "none").start()
    (tmp_path / "file").write_bytes(b"12345")
    monkeypatch.setattr("bridge.targets.tree.MAX_BYTES", 4)
    with pytest.raises(UsageError, match="holds more than"):
        read_directory(tmp_path)
    monkeypatch.setattr("bridge.targets.tree.MAX_BYTES", 5)
    monkeypatch.setattr("bridge.targets.tree.MAX_ENTRIES", 0)
    with pytest.raises(UsageError, match="files and directories"):
        read_directory(tmp_path)


def test_links_and_pipes_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "größe").write_bytes(b"2")
    os.mkfifo(tmp_path / "pipe")
    with caplog.at_level(logging.WARNING, logger="bridge.targets.tree"):
        entries = read_directory(tmp_path)
    assert entries == (Entry("file", b"1"),)
    assert "4 entries" in caplog.text


def test_tree_built_in_names_parents_first() -> None:
    seen = {""}
    for entry in built_in():
        assert entry.path.rpartition("/")[0] in seen
        if entry.content is None:
            seen.add(entry.path)
    assert len({entry.path for entry in built_in()}) == len(built_in())


def test_has_only_programs_is_so_of_native_targets_alone() -> None:
    assert has_only_programs("tests.system.native_targets:LineServer")
    assert has_only_programs("nbdkit")
    assert not has_only_programs("plan9")
    assert not has_only_programs("none")
    assert not has_only_programs(f"{__name__}:Both")


class Both(NoTarget):
    """A target with native programs and with packages of Python."""

    native = True
    packages = ("json",)
