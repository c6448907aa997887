# SPDX-License-Identifier: Apache-2.0
"""File servers as targets."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from bridge.targets import Endpoint
from bridge.targets.connections import ConnectionServer
from bridge.targets.scratch import ScratchDirectory
from bridge.targets.smb import PORT, SmbShare
from tests.support.modules import NETWORK_MODULES

TEXT = "served by a server of SMB\n"


class Smb:
    """The SMB server of the package quicksand-smb, with a directory of one file."""

    name = "smb"
    packages = ("quicksand_smb",)
    guest_modules = NETWORK_MODULES
    share = SmbShare("share", password="x")
    guest_setup = share.guest_setup
    guest_teardown = share.guest_teardown
    endpoints: tuple[Endpoint, ...] = ()

    def __init__(self, directory: Path | None = None) -> None:
        self.server: ConnectionServer | None = None
        self.place = ScratchDirectory("smb")

    def prepare(self) -> None:
        self.place.make()

    def start(self) -> None:
        smb: Any = importlib.import_module("quicksand_smb")
        served = self.place.empty()
        (served / "file").write_text(TEXT)
        config = smb.SMBConfig(shares={"share": smb.ShareConfig(str(served))})
        self.server = ConnectionServer(
            lambda connection: smb.serve_socket(connection, config), "target-smb"
        )
        self.endpoints = (Endpoint("smb", self.server.port, PORT),)

    def stop(self) -> None:
        if self.server is not None:
            self.server.close()
            self.place.remove()
            self.server = None
