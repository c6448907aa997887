# SPDX-License-Identifier: Apache-2.0
"""The program that a fuzzing engine takes for its target: ``kcov-shim.c`` says how it works."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bridge.util.compile import CProgram
from bridge.util.resources import guest_directory

__all__ = ["PROTOCOL_VARIABLE", "shim_program"]

PROTOCOL_VARIABLE: Final = "KCOV_BRIDGE_PROTOCOL"
"""The environment variable that tells the shim which fork-server protocol to speak."""

_HERE = Path(__file__).parent


def shim_program() -> Path:
    """Return the shim, compiled on first use.

    Raises:
        MissingDependencyError: there is no C compiler.
        InfrastructureError: it does not compile.
        CacheError: it is not in the cache, and the cache cannot be written.
    """
    agent = guest_directory() / "agent"
    return CProgram(
        "the shim",
        _HERE / "kcov-shim.c",
        ("-O2", "-Wall", "-Wextra", "-Werror", f"-I{agent}"),
        "shims",
        (_HERE / "board.h", agent / "lane.h"),
    ).build()
