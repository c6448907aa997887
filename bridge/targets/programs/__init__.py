# SPDX-License-Identifier: Apache-2.0
"""Programs of others as targets, by name: built with coverage from the source of their projects.

``build`` fetches and builds; a module for each program has its recipe and its target.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    # Imported by those who use it.
    from bridge.targets.programs.build import BuiltTarget

__all__ = ["PROGRAMS", "target_class"]

PROGRAMS: Final = {
    "nbdkit": "Nbdkit",
    "gonfs": "Gonfs",
    "virtiofsd": "Virtiofsd",
    "mstpm": "Mstpm",
}
"""The names of these targets, and the class of each in the module of that name."""


def target_class(name: str) -> type[BuiltTarget]:
    """Return the class of the target with this name, one of :data:`PROGRAMS`."""
    module = importlib.import_module(f"{__name__}.{name}")
    found: type[BuiltTarget] = getattr(module, PROGRAMS[name])
    return found
