# SPDX-License-Identifier: Apache-2.0
"""What QEMU reads from the ivshmem server."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from bridge.device import abi
from bridge.device.ivshmem import IvshmemServer
from bridge.device.region import Region


def test_connect_sends_handshake_of_specification() -> None:
    region = Region(1 << 20)
    server = IvshmemServer(region)
    try:
        qemu = server.connect()
        messages = []
        for _ in range(3 + 2 * abi.VECTORS):
            data, fds, _, _ = socket.recv_fds(qemu, 8, 1)
            messages.append((struct.unpack("<q", data)[0], len(fds)))
            if messages[-1] == (-1, 1):
                assert os.fstat(fds[0]).st_size == region.size
            for fd in fds:
                os.close(fd)
        bells = [(abi.HOST_PEER, 1)] * abi.VECTORS + [(0, 1)] * abi.VECTORS
        assert messages == [(0, 0), (0, 0), (-1, 1), *bells]
        qemu.setblocking(False)
        with pytest.raises(BlockingIOError):
            qemu.recv(1)
        qemu.close()
    finally:
        server.close()
        region.close()
