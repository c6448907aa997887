# SPDX-License-Identifier: Apache-2.0
"""The default target with the defect of :mod:`tests.fuzz.planted_files`."""

from __future__ import annotations

import importlib
from typing import Any

from bridge.targets.plan9 import Plan9Target

__all__ = ["PlantedFiles"]


class PlantedFiles(Plan9Target):
    """To be run in a process of its own, as it changes pyroute2."""

    packages: tuple[str, ...] = ("pyroute2.plan9", "tests.fuzz.planted_files")

    def start(self) -> None:
        server: Any = importlib.import_module("pyroute2.plan9.server")
        planted: Any = importlib.import_module("tests.fuzz.planted_files")
        received = server.Plan9ServerProtocol.data_received

        def data_received(protocol: Any, data: bytes) -> None:
            planted.check_message(data)
            received(protocol, data)

        server.Plan9ServerProtocol.data_received = data_received
        super().start()
