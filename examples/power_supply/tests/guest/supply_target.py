# SPDX-License-Identifier: Apache-2.0
"""What kcov-bridge needs to know: what is covered, how it starts and stops, what the guest gets."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

from bridge.targets import SerialPort


class SupplyTarget:
    """The supply at a serial port of the guest: ``/dev/target/supply``."""

    name = "power-supply"
    packages = ("power_supply",)
    endpoints = ()
    guest_modules = ()
    guest_setup = ""
    guest_teardown = ""
    devices: tuple[SerialPort, ...] = ()

    def __init__(self, directory: Path | None = None) -> None:
        self._listener: socket.socket | None = None

    def start(self) -> None:
        # Imported here, so that the lines of its body are covered as well.
        import power_supply

        listener = self._listener = socket.create_server(("127.0.0.1", 0))

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return  # stop() closed it
                # Each guest, and each reset, connects anew: the supply was just switched on.
                with connection:
                    power_supply.serve(connection, power_supply.PowerSupply())

        threading.Thread(target=accept, daemon=True).start()
        self.devices = (SerialPort("supply", listener.getsockname()[1]),)

    def stop(self) -> None:
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
