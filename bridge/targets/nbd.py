# SPDX-License-Identifier: Apache-2.0
"""What a guest and a target need of NBD: its handshake, on either side of the guest's network.

``doc/proto.md`` of the project nbd has the protocol; both here use its "fixed newstyle" negotiation
with the option that every server has, ``NBD_OPT_EXPORT_NAME``.
"""

from __future__ import annotations

import shlex
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from bridge.errors import TargetError
from bridge.targets import TARGET_ADDRESS
from bridge.targets.devices import DEVICE_DIRECTORY, QemuDevice, check_device_name

__all__ = ["PORT", "NbdDisk", "export_size"]

PORT = 10809
"""The TCP port registered for NBD."""

_GREETING = b"NBDMAGICIHAVEOPT"
_OPTION_MAGIC = b"IHAVEOPT"
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_EXPORT_NAME = 1
_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_MAGIC = 0x25609513
_CMD_DISC = 2
_SECONDS = 10.0


def export_size(address: Path | int, export: str = "") -> int:
    """Return the size in bytes of what an NBD server exports.

    Args:
        address: the path of its Unix socket, or its TCP port of 127.0.0.1.
        export: the name of the export.

    Raises:
        TargetError: the server cannot be reached, or does not know the export.
    """
    try:
        with _connected(address) as server:
            greeting = _receive(server, len(_GREETING) + 2)
            if greeting[:-2] != _GREETING:
                raise TargetError(
                    f"the NBD server at {address} greets with {greeting!r}",
                    hint="it must know the newstyle negotiation",
                )
            flags = int.from_bytes(greeting[-2:], "big") & (_FIXED_NEWSTYLE | _NO_ZEROES)
            name = export.encode()
            server.sendall(
                struct.pack(">I", flags)
                + _OPTION_MAGIC
                + struct.pack(">II", _OPT_EXPORT_NAME, len(name))
                + name
            )
            size = int.from_bytes(_receive(server, 8), "big")
            server.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _CMD_DISC, 0, 0, 0))
            return size
    except OSError as error:
        raise TargetError(
            f"the NBD server at {address} does not serve the export {export!r}: {error}"
        ) from error


def _connected(address: Path | int) -> socket.socket:
    if isinstance(address, int):
        return socket.create_connection(("127.0.0.1", address), _SECONDS)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(_SECONDS)
        sock.connect(str(address))
    except BaseException:
        sock.close()
        raise
    return sock


def _receive(server: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        piece = server.recv(length - len(received))
        if not piece:
            raise ConnectionError("it ended the connection")
        received += piece
    return received


# The kernel's driver is given a connection on which the export was chosen, by the ioctls of
# linux/nbd.h. NBD_DO_IT returns when the connection ends, so a process stays.
_CONNECT = r"""
use strict;
my ($address, $port, $export, $node) = @ARGV;
sub fail { die "nbd: @_\n" }
sub receive {
    my ($socket, $length) = @_;
    my $data = "";
    while (length($data) < $length) {
        my $got = sysread($socket, $data, $length - length($data), length($data));
        fail("the server ended the connection; does it have the export \"$export\"?") unless $got;
    }
    return $data;
}
socket(my $socket, 2, 1, 0) or fail("socket: $!");
connect($socket, pack("S n C4 x8", 2, $port, split(/[.]/, $address))) or fail("connect: $!");
my ($magic, $option, $offered) = unpack("a8 a8 n", receive($socket, 18));
fail("this is no server of NBD") unless "$magic$option" eq "NBDMAGICIHAVEOPT";
my $flags = $offered & 3;
syswrite($socket, pack("N a8 N N a*", $flags, "IHAVEOPT", 1, length($export), $export));
my ($size, $abilities) = unpack("Q> n", receive($socket, 10));
receive($socket, 124) unless $flags & 2;
open(my $device, "+<", $node) or fail("$node: $!");
sub set {
    my ($what, $number, $value) = @_;
    $value += 0;
    defined(ioctl($device, $number, $value)) or fail("$what: $!");
}
set("NBD_SET_BLKSIZE", 0xab01, 512);
set("NBD_SET_SIZE_BLOCKS", 0xab07, $size / 512);
set("NBD_CLEAR_SOCK", 0xab04, 0);
set("NBD_SET_SOCK", 0xab00, fileno($socket));
set("NBD_SET_FLAGS", 0xab0a, $abilities);
my $child = fork();
fail("fork: $!") unless defined($child);
if (!$child) {
    open($_, "+<", "/dev/null") for (*STDIN);
    open(STDOUT, ">", "/dev/null");
    open(STDERR, ">", "/dev/null");
    my $nothing = 0;
    ioctl($device, 0xab03, $nothing);
    exit(0);
}
my $name = $node =~ s,.*/,,r;
for (1 .. 200) {
    exit(0) if -e "/sys/block/$name/pid";
    fail("$node: the driver does not take the connection") if waitpid($child, 1) == $child;
    select(undef, undef, undef, 0.05);
}
fail("$node: the driver has not started");
"""


@dataclass(frozen=True)
class NbdDisk:
    """A disk of the guest's own driver ``nbd``, which connects to an NBD server of the target.

    Attributes:
        name: the guest's disk is ``/dev/target/NAME``, a link to :attr:`node`.
        guest_port: where the guest reaches the server, by an endpoint of the target.
        export: the name of the export.
        node: the driver's device.
    """

    name: str
    guest_port: int = PORT
    export: str = ""
    node: str = "/dev/nbd0"

    def as_qemu(self) -> QemuDevice:
        """Return what the guest needs; QEMU has no part in it."""
        link = shlex.quote(f"{DEVICE_DIRECTORY}/{check_device_name(self.name)}")
        words = (TARGET_ADDRESS, str(self.guest_port), self.export, self.node)
        return QemuDevice(
            name=self.name,
            arguments=(),
            guest_modules=("nbd",),
            guest_setup=(
                f"{shlex.join(('perl', '-e', _CONNECT, *words))}\n"
                # With a scheduler a worker of the kernel runs the driver's code, for no call.
                f"echo none >/sys/block/{shlex.quote(Path(self.node).name)}/queue/scheduler\n"
                f"mkdir -p {DEVICE_DIRECTORY}\n"
                f"ln -sfn {shlex.quote(self.node)} {link}\n"
            ),
        )
