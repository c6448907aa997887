# SPDX-License-Identifier: Apache-2.0
"""The code under test: a server that keeps values, asked in lines such as ``set colour blue``."""

from __future__ import annotations

import socketserver


class Store:
    """Values by name, and what a line asks for."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def answer(self, line: str) -> str:
        """Carry out one line; return the line to send back."""
        words = line.split()
        if len(words) == 3 and words[0] == "set":
            self.values[words[1]] = words[2]
            return "stored"
        if len(words) == 2 and words[0] == "get":
            return self.values.get(words[1], "unknown")
        return "error"


class Handler(socketserver.StreamRequestHandler):
    """One connection: a line in, a line out."""

    def handle(self) -> None:
        assert isinstance(self.server, Server)
        for line in self.rfile:
            answer = self.server.store.answer(line.decode(errors="replace"))
            self.wfile.write(f"{answer}\n".encode())


class Server(socketserver.ThreadingTCPServer):
    """Listens on a free port of this machine."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.store = Store()
