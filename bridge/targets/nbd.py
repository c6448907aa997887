# SPDX-License-Identifier: Apache-2.0
"""The handshake of NBD, as far as a target needs it to know the size of its disk.

``doc/proto.md`` of the project nbd has the protocol; this is its "fixed newstyle" negotiation with
the option that every server has, ``NBD_OPT_EXPORT_NAME``.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path

from bridge.errors import TargetError

__all__ = ["export_size"]

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
