# SPDX-License-Identifier: Apache-2.0
"""The ivshmem server that QEMU connects to.

QEMU gets one end of a socket pair and finds an ivshmem server on the other
(``docs/specs/ivshmem-spec.txt`` in QEMU): protocol version, its peer id, the region's memfd, then
an eventfd for each vector of each peer. The bridge is the server and peer 1 at once: a guest that
writes ``1 << 16`` into the device's doorbell register signals the eventfd
:attr:`IvshmemServer.bell`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct

from bridge.device.abi import HOST_PEER
from bridge.device.region import Region
from bridge.errors import DoorbellError

__all__ = ["IvshmemServer"]

_QEMU_PEER = 0
_PROTOCOL_VERSION = 0
_REGION_FOLLOWS = -1


class IvshmemServer:
    """The ivshmem server of one region; each :meth:`connect` is for one QEMU."""

    def __init__(self, region: Region) -> None:
        with contextlib.ExitStack() as stack:
            self.bell = self._eventfd(stack)
            """Readable once the guest has rung."""
            self._guest_bell = self._eventfd(stack)
            self.wire_bell = self._eventfd(stack)
            """Readable once the guest has written to a connection."""
            self.wire_guest_bell = self._eventfd(stack)
            """Interrupts the guest for its connections."""
            self._region_fd = region.fd
            self._stack = stack.pop_all()

    @staticmethod
    def _eventfd(stack: contextlib.ExitStack) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stack.callback(os.close, fd)
        return fd

    def connect(self) -> socket.socket:
        """Return a socket for QEMU's chardev that holds all that QEMU reads at its start.

        The caller closes it once QEMU has inherited it.

        Raises:
            DoorbellError: QEMU could not be told about the region.
        """
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            self._stack.callback(ours.close)
            self._send(ours, _PROTOCOL_VERSION)
            self._send(ours, _QEMU_PEER)
            self._send(ours, _REGION_FOLLOWS, self._region_fd)
            # Of each peer one for each of abi.VECTORS, in their order.
            for bell in (self.bell, self.wire_bell):
                self._send(ours, HOST_PEER, bell)
            for bell in (self._guest_bell, self.wire_guest_bell):
                self._send(ours, _QEMU_PEER, bell)
        except OSError as error:
            raise DoorbellError(f"QEMU could not be told about the region: {error}") from error
        return theirs

    @staticmethod
    def _send(sock: socket.socket, value: int, *fds: int) -> None:
        message = struct.pack("<q", value)
        if fds:
            socket.send_fds(sock, [message], list(fds))
        else:
            sock.sendall(message)

    def close(self) -> None:
        """Close sockets and eventfds. Safe to call twice."""
        self._stack.close()
