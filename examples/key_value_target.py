# SPDX-License-Identifier: Apache-2.0
"""The key-value server as a target: ``--target key_value_target:KeyValueTarget``.

``docs/targets.md`` says what each member is for.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.targets import TARGET_ADDRESS, Endpoint

if TYPE_CHECKING:
    from key_value import Server


class KeyValueTarget:
    """Serves on port 7000 of the host that the guest calls ``target``."""

    name = "key-value"
    packages = ("key_value",)
    guest_modules = ()
    guest_setup = f"echo {TARGET_ADDRESS} target >>/etc/hosts\n"
    guest_teardown = ""
    endpoints: tuple[Endpoint, ...] = ()

    def __init__(self, directory: Path | None) -> None:
        self._server: Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        # Imported here, so that the lines of its body are covered as well.
        from key_value import Server

        self._server = Server()
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.endpoints = (Endpoint("key-value", self._server.server_address[1], 7000),)

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = None
