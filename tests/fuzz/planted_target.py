# SPDX-License-Identifier: Apache-2.0
"""The target with planted defects: :mod:`tests.fuzz.planted` on a TCP port."""

from __future__ import annotations

import socketserver
import threading
from pathlib import Path

from bridge.targets import Endpoint

__all__ = ["PORT", "PlantedTarget", "tell"]

PORT = 7000


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


class PlantedTarget:
    """Serves lines."""

    name = "planted"
    packages: tuple[str, ...] = ("tests.fuzz.planted",)
    guest_modules: tuple[str, ...] = ()
    guest_setup = ""
    guest_teardown = ""
    endpoints: tuple[Endpoint, ...] = ()

    def __init__(self, directory: Path | None = None) -> None:
        pass

    def start(self) -> None:
        from tests.fuzz.planted import Lines

        self._server = _Server(("127.0.0.1", 0), Lines)
        self.endpoints = (Endpoint("planted", self._server.server_address[1], PORT),)
        threading.Thread(target=self._server.serve_forever, name="planted").start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def tell(*lines: str) -> list[str]:
    """Return the command that tells the target lines and waits for its answers."""
    text = "".join(f"{line}\\n" for line in lines)
    script = f"exec 3<>/dev/tcp/10.0.2.100/{PORT}; printf '{text}' >&3; "
    return ["bash", "-c", script + f"for i in $(seq {len(lines)}); do read -r answer <&3; done"]
