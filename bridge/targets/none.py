# SPDX-License-Identifier: Apache-2.0
"""No target: for runs in which only the guest, or nothing on the host, is of interest."""

from __future__ import annotations

from pathlib import Path

from bridge.targets import Endpoint

__all__ = ["NoTarget"]


class NoTarget:
    """A target that serves nothing and needs nothing."""

    name = "none"
    packages: tuple[str, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    guest_modules: tuple[str, ...] = ()
    guest_setup = ""
    guest_teardown = ""

    def __init__(self, directory: Path | None = None) -> None:
        """``directory`` is taken for the sake of the interface and not used."""

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""
