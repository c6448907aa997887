# SPDX-License-Identifier: Apache-2.0
"""Coverage that native programs have on behalf of handles: ``kcov_bridge_handle_begin()``.

A program connects to a socket when it has ended such work, sends the handle and the numbers of its
blocks, and waits for an answer. The blocks are in the area then.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from array import array
from collections.abc import Callable
from typing import Final

__all__ = ["HandleServer"]

_MOST: Final = 4096
"""Blocks of a message: ``MOST_APART`` in runtime.c."""
_HEADER: Final = 16
_SECONDS: Final = 1.0
"""How long a program may take to send what it has connected for."""


class HandleServer:
    """Takes messages on a thread of its own until it is closed.

    Args:
        deliver: called with a handle and numbers of blocks; returns when they are in the area.

    Raises:
        OSError: there is no socket.
    """

    def __init__(self, deliver: Callable[[int, array[int]], object]) -> None:
        self.name = f"kcov-bridge-native-{os.getpid()}-{secrets.token_hex(8)}"
        """The abstract socket, without its leading zero byte."""
        self._deliver = deliver
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.bind(f"\0{self.name}")
            self._socket.listen(64)
        except BaseException:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="native handles", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. Safe to call twice."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            # A program that goes away, or sends nonsense, ends only its own message.
            with connection, contextlib.suppress(OSError, ValueError):
                connection.settimeout(_SECONDS)
                message = connection.recv(_HEADER + 4 * _MOST)
                if len(message) >= _HEADER:
                    handle = int.from_bytes(message[:8], "little")
                    self._deliver(handle, array("I", message[_HEADER:]))
                    connection.send(b"\1")
