# SPDX-License-Identifier: Apache-2.0
"""A TCP server for targets whose code serves one connection."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

__all__ = ["ConnectionServer"]


class ConnectionServer:
    """Listens on a free port of 127.0.0.1: a thread accepts, and each connection has its own.

    Made on the target's thread, so that these are measured.

    Args:
        serve: is given each connection, on a thread of its own, and returns at its end; the
            connection is closed then.
        name: begins the names of the threads.

    Attributes:
        port: the port.
    """

    def __init__(self, serve: Callable[[socket.socket], object], name: str) -> None:
        self._serve = serve
        self._name = name
        # Written by the thread that accepts, read once it has ended.
        self._connections: list[tuple[socket.socket, threading.Thread]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, name=name)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            # Requests and answers are small and take turns.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            serving = threading.Thread(
                target=self._serve_one, args=(connection,), name=f"{self._name}-connection"
            )
            serving.start()
            self._connections = [each for each in self._connections if each[1].is_alive()]
            self._connections.append((connection, serving))

    def _serve_one(self, connection: socket.socket) -> None:
        # A guest that is reset, or that breaks off, is no fault of the code that serves it.
        with connection, contextlib.suppress(ConnectionError):
            self._serve(connection)

    def close(self) -> None:
        """Cut all connections, close the port, join the threads."""
        # It is this that wakes accept().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        for connection, serving in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            serving.join()
        self._connections = []
