# SPDX-License-Identifier: Apache-2.0
"""Carry one TCP connection of the guest to a service of the host. Run as a script, by QEMU.

``relay.py ADDRESS [--gate GATE] [--epoch FILE OFFSET]``

ADDRESS is a port of 127.0.0.1, or the absolute path of a Unix socket; or ``@FILE:INDEX``, where
FILE is an array of such addresses, of ``SLOT`` bytes each.

Before it passes anything from the target to the guest, end of file included, it changes the word at
OFFSET in FILE, the shared region's coverage epoch. What the target did before it answered is
covered by then, so a task that has the answer finds the word changed. A relay that cannot write the
word resets the connection.

QEMU's user network starts this for each connection to a target's address (:mod:`bridge.vm.network`)
with a socket as stdin, stdout and stderr. It ends when both directions have ended or when either
connection breaks; the end of QEMU closes QEMU's side of the socket. It resets both connections as
soon as the pipe GATE is readable or has no writer. It imports the standard library and one file of
the bridge, by its path, so that ``-I -S`` starts it in a few milliseconds.
"""

import errno
import mmap
import os
import select
import socket
import struct
import sys
import types
from collections.abc import Callable
from importlib.machinery import SourceFileLoader

CHUNK = 256 * 1024
"""Bytes read at once, so that a big transfer costs few system calls."""

LOCALHOST = "127.0.0.1"

SLOT = 128
"""Bytes of an address in a file, padded with zeroes; a Unix socket's path has 107 at most."""

KEEPALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
"""Seconds, seconds, count. Detects a peer that vanished after it had closed its half."""

NO_LINGER = struct.pack("ii", 1, 0)
"""``struct linger``: closing resets the connection, so the peer learns that it broke."""


ChangeEpoch = Callable[[], object]


def _load_coverage_epoch_value() -> Callable[[], int]:
    """Load the function that the doorbell also uses, without importing its package."""
    name = "coverage_epoch"
    module = types.ModuleType(name)
    here = __file__.rpartition("/")[0]  # an absolute path; pathlib takes long to import
    SourceFileLoader(name, f"{here}/../device/{name}.py").exec_module(module)
    value: Callable[[], int] = module.coverage_epoch_value
    return value


def epoch_writer(file: str, offset: int) -> ChangeEpoch:
    """Map the word at ``offset`` and return the function that changes it. Raises OSError."""
    new_value = _load_coverage_epoch_value()
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        words = memoryview(mmap.mmap(fd, mmap.PAGESIZE, offset=start)).cast("Q")
    finally:
        os.close(fd)
    index = (offset - start) // words.itemsize

    def change() -> None:
        words[index] = new_value()

    return change


class Direction:
    """One direction, from a socket to the other: bytes read but not yet written, and its end.

    ``change_epoch`` is called after data or the end was read, before any of it is passed on.
    """

    def __init__(
        self, source: socket.socket, sink: socket.socket, change_epoch: ChangeEpoch | None
    ) -> None:
        self.source = source
        self.sink = sink
        self.change_epoch = change_epoch
        self.buffer = memoryview(bytearray(CHUNK))
        self.pending = self.buffer[:0]
        self.done = False

    def move(self) -> None:
        """Carry what can be carried without waiting. Raises OSError if a connection broke."""
        if self.done:
            return
        try:
            if not self.pending:
                size = self.source.recv_into(self.buffer)
                if self.change_epoch is not None:
                    self.change_epoch()
                if size == 0:
                    self.done = True
                    self.sink.shutdown(socket.SHUT_WR)
                    return
                self.pending = self.buffer[:size]
            # Nearly always all of it can be sent at once, so try before polling.
            self.pending = self.pending[self.sink.send(self.pending) :]
        except BlockingIOError:
            pass


class End:
    """One of the two sockets: the direction it is read for, and the one it is written for."""

    def __init__(self, sock: socket.socket, reads: Direction, writes: Direction) -> None:
        self.sock = sock
        self.reads = reads
        self.writes = writes
        self.mask = -1  # what poll was told; -1: not registered
        self.hung_up = False

    def wanted(self) -> int:
        mask = 0 if self.reads.done or self.reads.pending else select.POLLIN
        if self.writes.pending:
            mask |= select.POLLOUT
        # poll reports a hang-up again and again, so unregister when nothing is left to do here.
        return -1 if mask == 0 and self.hung_up else mask

    def handle(self, events: int) -> None:
        if events & select.POLLERR:
            error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            raise OSError(error, os.strerror(error))
        self.hung_up |= bool(events & select.POLLHUP)
        if events & (select.POLLIN | select.POLLHUP):
            self.reads.move()
        if events & select.POLLOUT:
            self.writes.move()


def relay(
    guest: socket.socket,
    host: socket.socket,
    change_epoch: ChangeEpoch | None = None,
    gate: int | None = None,
) -> None:
    """Copy between two connected sockets until both directions have ended.

    Args:
        change_epoch: called before anything from the host is passed to the guest.
        gate: a pipe; the connections are reset when it is readable or has no writer.

    Raises:
        OSError: a connection broke, or is to be reset.
    """
    for sock in (guest, host):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for option, value in KEEPALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
    outward, inward = Direction(guest, host, None), Direction(host, guest, change_epoch)
    ends = {
        guest.fileno(): End(guest, reads=outward, writes=inward),
        host.fileno(): End(host, reads=inward, writes=outward),
    }
    poll = select.poll()
    if gate is not None:
        poll.register(gate, select.POLLIN)
    while not (outward.done and inward.done):
        for fd, end in ends.items():
            wanted = end.wanted()
            if wanted != end.mask:
                if wanted < 0:
                    poll.unregister(fd)
                else:
                    poll.register(fd, wanted)
                end.mask = wanted
        for fd, events in poll.poll():
            if fd == gate:
                raise ConnectionAbortedError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))
            ends[fd].handle(events)


def connect(address: str) -> socket.socket:
    """Connect to what the first argument means. Raises OSError, ValueError."""
    if address.startswith("@"):
        address = read_address(address)
    if not address.startswith("/"):
        return socket.create_connection((LOCALHOST, int(address)))
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def read_address(slot: str) -> str:
    """Return the address in ``@FILE:INDEX``. Raises OSError, ValueError."""
    file, _, index = slot[1:].rpartition(":")
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.fsdecode(os.pread(fd, SLOT, SLOT * int(index)).rstrip(b"\0"))
    finally:
        os.close(fd)


def main(argv: list[str]) -> int:
    guest = socket.socket(fileno=os.dup(0))
    # 0, 1 and 2 are the connection; nothing that Python prints may get into it.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    os.close(nowhere)
    with guest:
        try:
            words = argv[2:]
            gate = change_epoch = None
            if words[:1] == ["--gate"]:
                gate = os.open(words[1], os.O_RDONLY | os.O_NONBLOCK)
                words = words[2:]
            if words[:1] == ["--epoch"]:
                change_epoch = epoch_writer(words[1], int(words[2]))
            host = connect(argv[1])
        except (OSError, ValueError):
            guest.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            return 1
        with host:
            try:
                relay(guest, host, change_epoch, gate)
            except OSError:
                if change_epoch is not None:
                    change_epoch()
                for sock in (guest, host):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
