# SPDX-License-Identifier: Apache-2.0
"""What running bridges are doing: each answers on a socket, ``kcov-bridge status`` asks them all.

The sockets are Unix sockets with abstract names, so a bridge that is killed leaves no file behind.
Anybody can connect to such a socket; only the bridge's own user and root are answered.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["StatusServer", "ask_all"]

_NAME = "kcov-bridge-status/"
_LIMIT = 1 << 20
_SECONDS = 5.0
_UCRED = struct.Struct("3i")
"""``struct ucred`` of unix(7): pid, uid, gid."""

Status = dict[str, Any]


class StatusServer:
    """Answers every connection with ``describe()`` as one JSON object, until it is closed."""

    def __init__(self, describe: Callable[[], Status]) -> None:
        self._describe = describe
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # A process may hold several sessions, one after the other or at once.
        self._socket.bind(f"\0{_NAME}{os.getpid()}.{id(self)}")
        self._socket.listen()
        self._thread = threading.Thread(target=self._run, name="kcov-status", daemon=True)
        self._thread.start()

    def __enter__(self) -> StatusServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and the socket. Safe to call twice."""
        # Wakes accept(), which closing alone does not.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            # Who asks may go away at any moment.
            with connection, contextlib.suppress(OSError):
                connection.settimeout(_SECONDS)
                if _may_ask(connection):
                    connection.sendall(json.dumps(self._answer()).encode())

    def _answer(self) -> Status:
        try:
            return self._describe()
        except Exception as error:
            return {"error": str(error) or type(error).__name__}


def _may_ask(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return _UCRED.unpack(credentials)[1] in (0, os.getuid())


def ask_all() -> list[Status]:
    """Return the status of each bridge on this machine that answers us, by process id."""
    found = []
    for line in Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines():
        name = line.rpartition(" ")[2]
        # Connections that were accepted stand there too, under the same name.
        if name.startswith(f"@{_NAME}"):
            found.append(name[1:])
    answers = [answer for name in sorted(set(found)) if (answer := _ask(name)) is not None]
    return sorted(answers, key=lambda answer: int(answer.get("pid", 0)))


def _ask(name: str) -> Status | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_SECONDS)
        data = b""
        try:
            sock.connect(f"\0{name}")
            # Its name can be taken by anybody: an answer counts from our own user alone.
            if not _may_ask(sock):
                return None
            while (chunk := sock.recv(65536)) and len(data) < _LIMIT:
                data += chunk
            answer = json.loads(data)
        except (OSError, ValueError):
            return None
    return answer if isinstance(answer, dict) else None
