# SPDX-License-Identifier: Apache-2.0
"""The serial line: bytes to lines, and answers to bytes."""

from __future__ import annotations

import socket

from power_supply.model import PowerSupply

MAX_LINE = 256


def serve(connection: socket.socket, supply: PowerSupply) -> None:
    """Answer the lines of one connection until its end."""
    pending = b""
    while data := connection.recv(4096):
        *lines, pending = (pending + data).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            answer = supply.execute(line.decode("ascii", errors="replace"))
            if answer is not None:
                connection.sendall(answer.encode() + b"\r\n")
        if len(pending) > MAX_LINE:
            supply.errors.append('-363,"Input buffer overrun"')
            pending = b""
