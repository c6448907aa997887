# SPDX-License-Identifier: Apache-2.0
"""No target: for runs that cover the guest alone."""

from __future__ import annotations

from pathlib import Path

from bridge.targets import Endpoint

__all__ = ["NoTarget"]


class NoTarget:
    """A target that serves nothing."""

    name = "none"
    packages: tuple[str, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    guest_modules: tuple[str, ...] = ()
    guest_setup = ""
    guest_teardown = ""

    def __init__(self, directory: Path | None = None) -> None:
        """``directory`` is ignored."""

    def start(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""
