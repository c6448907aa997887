# SPDX-License-Identifier: Apache-2.0
"""Guests of a few bytes that a PC's firmware boots, machines that run them, and TCP services."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from bridge.errors import BridgeError
from bridge.vm.accel import Accelerator
from bridge.vm.config import MachineConfig
from bridge.vm.machine import Machine

TCG = Accelerator("tcg", "test")
# Firmware that finds nothing to boot: a QEMU as any other, in a twentieth of a second.
EMPTY = MachineConfig(TCG, memory_mib=64)

RESET = bytes.fromhex("b006 baf90c ee")  # mov al, 6; mov dx, 0xcf9; out dx, al
POWER_OFF = bytes.fromhex("ba0406 b80020 ef")  # mov dx, 0x604; mov ax, 0x2000; out dx, ax
SUSPEND = bytes.fromhex("ba0406 b80024 ef")  # mov dx, 0x604; mov ax, 0x2400; out dx, ax
SUSPEND_TO_DISK = bytes.fromhex("ba0406 b80028 ef")
READY = b'noise\n{"state":"ready","kernel":"6.1.0-test","device":"/dev/kcov","uptime_ms":5}\n'


def boot_sector(console: bytes = b"", report: bytes = b"", action: bytes = b"") -> bytes:
    """A disk that a PC boots: 16-bit code, which writes to COM1 and COM2, acts and halts."""
    put = bytes.fromhex("ac 84c0 7403 ee ebf8 c3")  # lodsb; until 0: out dx, al; ret
    halt = bytes.fromhex("f4 ebfd")
    code_size = 4 + 2 * 9 + len(action) + len(halt)
    texts = 0x7C00 + code_size + len(put)
    code = bytes.fromhex("31c0 8ed8")  # ds = 0
    for port, address in ((0x3F8, texts), (0x2F8, texts + len(console) + 1)):
        code += b"\xbe" + address.to_bytes(2, "little") + b"\xba" + port.to_bytes(2, "little")
        code += b"\xe8" + (code_size - len(code) - 3).to_bytes(2, "little")  # call put
    sector = code + action + halt + put + console + b"\0" + report + b"\0"
    assert len(sector) <= 510
    # The firmware reads no disk that is smaller than a track.
    return (sector.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0")


@contextlib.contextmanager
def tcp_service(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Run ``serve`` for each connection, on a thread, and yield the port of 127.0.0.1."""
    threads: list[threading.Thread] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=handle, args=(connection,)))
            threads[-1].start()

    def handle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError):
            serve(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        acceptor.join()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def echo(connection: socket.socket) -> None:
    """Send back everything that comes."""
    while data := connection.recv(65536):
        connection.sendall(data)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lost(machine: Machine) -> BridgeError:
    """The reason of the loss, which is about to come."""
    reasons: list[BridgeError] = []
    told = threading.Event()

    def listen(error: BridgeError) -> None:
        reasons.append(error)
        told.set()

    machine.add_loss_listener(listen)
    assert told.wait(20)
    return reasons[0]
