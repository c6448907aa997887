# SPDX-License-Identifier: Apache-2.0
"""The relay between the guest's network and a target: the real program on real sockets."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import pytest

from bridge.targets import Endpoint
from bridge.vm.network import EpochWord, RelayGate, compiled_relay, relay_command
from tests.vm.support import tcp_service

PROGRAM: ContextVar[Path | None] = ContextVar("PROGRAM")
"""The relay under test, as relay_command() takes it."""


@pytest.fixture(autouse=True, params=["plain", "compiled"])
def _program(request: pytest.FixtureRequest) -> Iterator[None]:
    compiled = compiled_relay()
    assert compiled is not None
    token = PROGRAM.set(compiled if request.param == "compiled" else None)
    yield
    PROGRAM.reset(token)


@contextlib.contextmanager
def relayed(
    port: int, epoch: EpochWord | None = None, gate: Path | None = None
) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """A connection as QEMU gives it to the relay (a TCP pair as stdin, stdout, stderr)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        guest = socket.create_connection(listener.getsockname())
        stdio, _ = listener.accept()
    guest.settimeout(20)
    command = relay_command(Endpoint("test", port, 564), epoch, gate, program=PROGRAM.get())
    fd = stdio.fileno()
    with guest, subprocess.Popen(command, stdin=fd, stdout=fd, stderr=fd) as relay:
        stdio.close()
        try:
            yield guest, relay
            guest.close()
            assert relay.wait(10) in (0, 1)
        finally:
            relay.kill()


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


def echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


def test_relay_carries_both_directions() -> None:
    with tcp_service(echo) as port, relayed(port) as (guest, relay):
        for _ in range(100):
            guest.sendall(b"ping")
            assert guest.recv(100) == b"ping"
        guest.shutdown(socket.SHUT_WR)
        assert read_all(guest) == b""
        assert relay.wait(10) == 0


def test_relay_guest_closes_its_half_first_the_answer_arrives() -> None:
    def count(connection: socket.socket) -> None:
        received = read_all(connection)
        time.sleep(0.1)
        connection.sendall(b"%d" % len(received))

    with tcp_service(count) as port, relayed(port) as (guest, relay):
        guest.sendall(b"x" * 100_000)
        guest.shutdown(socket.SHUT_WR)
        assert read_all(guest) == b"100000"
        assert relay.wait(10) == 0


def test_relay_target_closes_its_half_first_the_guest_can_still_send() -> None:
    received = []

    def greet(connection: socket.socket) -> None:
        connection.sendall(b"welcome")
        connection.shutdown(socket.SHUT_WR)
        received.append(read_all(connection))

    with tcp_service(greet) as port, relayed(port) as (guest, relay):
        assert read_all(guest) == b"welcome"
        guest.sendall(b"late")
        guest.shutdown(socket.SHUT_WR)
        assert relay.wait(10) == 0
    assert received == [b"late"]


def test_much_in_both_directions_at_once() -> None:
    data = random.Random(1).randbytes(20_000_000)
    with tcp_service(echo) as port, relayed(port) as (guest, relay):

        def send() -> None:
            guest.sendall(data)
            guest.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        assert read_all(guest) == data
        sender.join()
        assert relay.wait(10) == 0


class Word:
    """A word of a file, in its second page, that relays write to."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "words"
        self.file.write_bytes(bytes(8192))
        self.epoch = EpochWord(str(self.file), 4096 + 8 * 32)

    def read(self) -> int:
        data = self.file.read_bytes()
        rest = data[: self.epoch.offset] + data[self.epoch.offset + 8 :]
        assert rest == bytes(8184), "nothing else is written"
        return int.from_bytes(data[self.epoch.offset : self.epoch.offset + 8], "little")


def test_relay_answer_of_the_target_changes_the_epoch_first(tmp_path: Path) -> None:
    word = Word(tmp_path)
    seen = {0}

    def ends(connection: socket.socket) -> None:
        while data := connection.recv(100):
            if data == b"quiet":
                continue
            connection.sendall(data)

    with tcp_service(ends) as port, relayed(port, word.epoch) as (guest, relay):
        for _ in range(100):
            guest.sendall(b"ping")
            assert guest.recv(100) == b"ping"
            assert word.read() not in seen, "a value is never there twice"
            seen.add(word.read())
        last = word.read()
        guest.sendall(b"quiet")
        time.sleep(0.2)
        assert word.read() == last, "what the guest says changes nothing"
        guest.shutdown(socket.SHUT_WR)
        assert read_all(guest) == b""
        assert word.read() not in seen, "so does the end"
        assert relay.wait(10) == 0


def test_relay_reset_by_the_target_changes_the_epoch(tmp_path: Path) -> None:
    word = Word(tmp_path)

    def reset(connection: socket.socket) -> None:
        connection.recv(1)
        linger = (1).to_bytes(4, sys.byteorder) + bytes(4)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    with tcp_service(reset) as port, relayed(port, word.epoch) as (guest, _):
        guest.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            guest.recv(1)
        assert word.read()


def test_relay_unwritable_epoch_carries_nothing(tmp_path: Path) -> None:
    with (
        tcp_service(echo) as port,
        relayed(port, EpochWord(str(tmp_path / "none"), 0)) as (guest, relay),
    ):
        # The reset may come before this is sent.
        with contextlib.suppress(ConnectionError):
            guest.sendall(b"x")
            with pytest.raises(ConnectionResetError):
                guest.recv(1)
        assert relay.wait(10) == 1


def test_relay_slow_reader_uses_no_processor_time() -> None:
    # What the target sends does not fit: the relay waits for room, and must not spin meanwhile.
    def flood(connection: socket.socket) -> None:
        connection.sendall(b"x" * 30_000_000)

    with tcp_service(flood) as port, relayed(port) as (guest, relay):
        time.sleep(0.5)
        before = processor_ticks(relay.pid)
        time.sleep(1.0)
        assert processor_ticks(relay.pid) - before <= 5
        assert len(read_all(guest)) == 30_000_000


def processor_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_relay_refused_connection_resets_the_guests() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with relayed(port) as (guest, relay):
        with pytest.raises(ConnectionResetError):
            guest.recv(1)
        assert relay.wait(10) == 1


def test_relay_target_resets_the_guest_is_reset() -> None:
    def reset(connection: socket.socket) -> None:
        connection.recv(1)
        linger = (1).to_bytes(4, sys.byteorder) + bytes(4)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    with tcp_service(reset) as port, relayed(port) as (guest, relay):
        guest.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            guest.recv(1)
        assert relay.wait(10) == 1


def test_relay_qemu_ends_relay_ends() -> None:
    ended = threading.Event()

    def hold(connection: socket.socket) -> None:
        connection.sendall(b"x")
        read_all(connection)
        ended.set()

    with tcp_service(hold) as port, relayed(port) as (guest, relay):
        assert guest.recv(1) == b"x"
        guest.close()  # as the kernel does when QEMU dies
        assert ended.wait(10)
        assert relay.wait(10) == 0


def test_relay_many_connections_at_once_work() -> None:
    with tcp_service(echo) as port, contextlib.ExitStack() as stack:
        guests = [stack.enter_context(relayed(port))[0] for _ in range(16)]
        for number, guest in enumerate(guests):
            guest.sendall(b"%d" % number)
        assert [guest.recv(10) for guest in guests] == [b"%d" % n for n in range(16)]


def test_relay_python_settings_do_not_reach_the_connection() -> None:
    # stderr is the connection as well, and QEMU hands the environment on.
    with tcp_service(lambda connection: connection.sendall(b"only this")) as port:
        command = relay_command(Endpoint("test", port, 564))
        env = {"PYTHONVERBOSE": "1", "PYTHONPROFILEIMPORTTIME": "1", "PYTHONHOME": "/nowhere"}
        ours, theirs = socket.socketpair()
        fd = theirs.fileno()
        with ours, subprocess.Popen(command, stdin=fd, stdout=fd, stderr=fd, env=env):
            theirs.close()
            assert read_all(ours) == b"only this"
            ours.shutdown(socket.SHUT_WR)


def test_gate_reset_all_ends_current_relays() -> None:
    def echo(sock: socket.socket) -> None:
        while data := sock.recv(100):
            sock.sendall(data)

    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    gate = RelayGate()
    with tcp_service(echo) as port:
        for _ in range(2):
            with relayed(port, gate=gate.path) as first, relayed(port, gate=gate.path) as second:
                for guest, _ in (first, second):
                    guest.sendall(b"1")
                    assert guest.recv(1) == b"1"
                gate.reset_all()
                for guest, process in (first, second):
                    with pytest.raises(ConnectionResetError):
                        guest.recv(1)
                    assert process.wait(20) == 1
        with relayed(port, gate=gate.path) as (guest, process):
            guest.sendall(b"1")
            assert guest.recv(1) == b"1"
            gate.close()
            assert process.wait(20) == 1
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
