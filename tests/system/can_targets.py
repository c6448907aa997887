# SPDX-License-Identifier: Apache-2.0
"""Nodes on a CAN bus as targets."""

from __future__ import annotations

import importlib
from typing import Any

from bridge.targets.can import CanTarget

NODE = 5
NAME = 0x1008
SPEED = 0x2000


class Drive(CanTarget):
    """A CANopen device of the package canopen: a name, and a speed that can be set."""

    packages = ("canopen",)

    def connect(self, bus: Any) -> None:
        canopen: Any = importlib.import_module("canopen")
        objects: Any = importlib.import_module("canopen.objectdictionary")
        dictionary = objects.ObjectDictionary()
        name = objects.ODVariable("Device name", NAME)
        name.data_type, name.access_type, name.default = objects.VISIBLE_STRING, "const", "drv"
        speed = objects.ODVariable("Speed", SPEED)
        speed.data_type, speed.access_type, speed.default = objects.UNSIGNED16, "rw", 1500
        dictionary.add_object(name)
        dictionary.add_object(speed)
        self.network = canopen.Network(bus)
        self.network.add_node(canopen.LocalNode(NODE, dictionary))
        self.network.connect()

    def disconnect(self) -> None:
        self.network.disconnect()
