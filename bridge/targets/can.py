# SPDX-License-Identifier: Apache-2.0
"""Nodes on a CAN bus, modelled in Python, behind the guest's own drivers ``slcan`` and ``can_raw``.

The guest's end of the bus is an adapter at a serial port, which speaks the protocol of LAWICEL's
CAN232, as Linux' ``drivers/net/can/slcan`` does: a frame is a line of text. :class:`CanBus` is the
other end, a bus for the package ``python-can``; so anything that works with that package can be a
node: ``canopen``, ``can-isotp``, ``cantools`` or code of your own.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.errors import MissingDependencyError
from bridge.targets import Endpoint
from bridge.targets.devices import SerialPort
from bridge.targets.scratch import ScratchDirectory

try:
    import can
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        "the Python package python-can is not installed", hint="pip install python-can"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["INTERFACE", "CanBus", "CanTarget"]

INTERFACE = "can0"
"""The guest's name of the bus."""

_PORT = "can"
_LINE_LIMIT = 64
_N_SLCAN = 17

_SET_UP = f"""
set -e
ldattach -s 115200 {_N_SLCAN} /dev/target/{_PORT}
steps=0
until [ -e /sys/class/net/{INTERFACE} ]; do
    steps=$((steps + 1))
    if [ $steps -gt 100 ]; then
        echo 'the driver slcan has made no interface {INTERFACE}' >&2
        exit 1
    fi
    sleep 0.05
done
# No ip(8) is needed: SIOCSIFFLAGS with IFF_UP and IFF_NOARP.
perl -e '
    my $request = pack("a16 s x22", "{INTERFACE}", 0x81);
    socket(my $socket, 2, 2, 0) or die "socket: $!";
    ioctl($socket, 0x8914, $request) or die "{INTERFACE}: $!";
'
"""


class CanBus(can.BusABC):
    """The host's end of the guest's bus.

    The guest's serial port connects to it when QEMU starts, and anew at each reset of the guest.

    Args:
        listener: the socket on which the port connects.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._connection: socket.socket | None = None
        self._sending = threading.Lock()
        self._lines: list[bytes] = []
        self._begun = b""
        self._ending, self._end = socket.socketpair()
        super().__init__(channel="guest")
        self.channel_info = "the guest's CAN bus"

    def send(self, msg: can.Message, timeout: float | None = None) -> None:
        """Send a frame to the guest; without a guest, it is lost."""
        kind = "r" if msg.is_remote_frame else "t"
        number = f"{msg.arbitration_id:03X}"
        if msg.is_extended_id:
            kind, number = kind.upper(), f"{msg.arbitration_id:08X}"
        data = "" if msg.is_remote_frame else bytes(msg.data).hex().upper()
        line = f"{kind}{number}{msg.dlc}{data}\r".encode()
        with self._sending, contextlib.suppress(OSError):
            if self._connection is not None:
                self._connection.sendall(line)

    def _recv_internal(self, timeout: float | None) -> tuple[can.Message | None, bool]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            while self._lines:
                message = _message(self._lines.pop(0))
                if message is not None:
                    return message, False
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            waiting = [self._listener, self._ending]
            if self._connection is not None:
                waiting.append(self._connection)
            readable, _, _ = select.select(waiting, (), (), left)
            if not readable or self._ending in readable:
                return None, False
            if self._connection in readable:
                self._receive()
            if self._listener in readable:
                self._accept()

    def _accept(self) -> None:
        self._hang_up()
        self._connection, _ = self._listener.accept()

    def _receive(self) -> None:
        assert self._connection is not None
        try:
            received = self._connection.recv(4096)
        except OSError:
            received = b""
        if not received:
            self._hang_up()
            return
        *lines, begun = (self._begun + received).split(b"\r")
        self._lines += lines
        # No frame is so long: the guest may write what it likes to its port.
        self._begun = begun[-_LINE_LIMIT:]

    def _hang_up(self) -> None:
        with self._sending:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
        self._lines, self._begun = [], b""

    def shutdown(self) -> None:
        """End the bus: recv() returns."""
        if self._is_shutdown:
            return
        super().shutdown()
        self._end.send(b"!")

    def close(self) -> None:
        """Close the sockets, once nobody is in recv() any more."""
        self._hang_up()
        self._ending.close()
        self._end.close()


def _message(line: bytes) -> can.Message | None:
    """Return the frame in a line; None for a command to the adapter, or what is no frame."""
    kind, digits = line[:1], 8 if line[:1] in (b"T", b"R") else 3
    if kind not in (b"t", b"T", b"r", b"R"):
        return None
    remote = kind in (b"r", b"R")
    try:
        number, length = int(line[1 : 1 + digits], 16), int(line[1 + digits : 2 + digits])
        data = b"" if remote else bytes.fromhex(line[2 + digits :].decode("ascii"))
        if not remote and len(data) != length:
            return None
        return can.Message(
            arbitration_id=number,
            is_extended_id=digits == 8,
            is_remote_frame=remote,
            dlc=length,
            data=data,
            timestamp=time.time(),
            check=True,
        )
    except ValueError:
        return None


class CanTarget:
    """A target that is the other nodes on a CAN bus of the guest, ``can0``.

    A subclass defines :meth:`connect` and :meth:`disconnect`::

        class Drive(CanTarget):
            packages = ("canopen",)

            def connect(self, bus):
                import canopen

                self.network = canopen.Network(bus)
                self.network.add_node(canopen.LocalNode(5, "drive.eds"))
                self.network.connect()

            def disconnect(self):
                self.network.disconnect()
    """

    name = "can"
    packages: tuple[str, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    guest_modules: tuple[str, ...] = ("slcan", "can_raw")
    guest_setup = _SET_UP
    guest_teardown = ""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self.devices: Sequence[SerialPort] = ()
        self._scratch = ScratchDirectory("can")
        self._stack = ExitStack()

    def prepare(self) -> None:
        """Make the directory that forked processes share."""
        self._scratch.make()

    def connect(self, bus: Any) -> None:
        """Have the nodes work on a bus, a :class:`CanBus`; called by :meth:`start`."""
        raise NotImplementedError

    def disconnect(self) -> None:
        """End what :meth:`connect` has started; nothing may use the bus from then on."""
        raise NotImplementedError

    def start(self) -> None:
        """Connect the nodes to the bus."""
        with ExitStack() as stack:
            place = self._scratch.empty()
            stack.callback(self._scratch.remove)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(place / "port"))
            listener.listen()
            bus = CanBus(listener)
            stack.callback(bus.close)
            stack.callback(bus.shutdown)
            self.connect(bus)
            stack.callback(self.disconnect)
            self.devices = (SerialPort(_PORT, place / "port"),)
            self._stack = stack.pop_all()

    def stop(self) -> None:
        """Disconnect the nodes and close the bus."""
        self.devices = ()
        self._stack.close()
