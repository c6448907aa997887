# SPDX-License-Identifier: Apache-2.0
"""The few classes on the way of a signal, twice: in Python, and compiled.

:mod:`bridge.device.fastpath.plain` says what they do; ``compiled.pyx`` does the same, several times
faster, and is built with the package where there is a C compiler and Python's headers. The tests
run against either. ``KCOV_BRIDGE_PLAIN=1`` in the environment keeps to the plain ones.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

from bridge.device.fastpath.plain import FindLines, LineSets

if TYPE_CHECKING:
    from bridge.device.fastpath.compiled import Doorstep, Returns
    from bridge.device.fastpath.plain import AreaWords, KcovState, LineTap, Totals

__all__ = [
    "COMPILED",
    "PLAIN_VARIABLE",
    "WHY_PLAIN",
    "AreaWords",
    "Doorstep",
    "FindLines",
    "KcovState",
    "LineSets",
    "LineTap",
    "Returns",
    "Totals",
]

PLAIN_VARIABLE = "KCOV_BRIDGE_PLAIN"
"""The variable of the environment that keeps to the plain classes, but for 0 and nothing."""
WHY_PLAIN: str
"""Why the compiled classes are not used; empty where they are."""

if os.environ.get(PLAIN_VARIABLE, "0") not in ("", "0"):
    WHY_PLAIN = f"{PLAIN_VARIABLE} is set"
else:
    try:
        import_module("bridge.device.fastpath.compiled")
        WHY_PLAIN = ""
    except ImportError as error:
        WHY_PLAIN = str(error)

COMPILED = not WHY_PLAIN
"""Whether the compiled classes are used."""

if not TYPE_CHECKING:
    if COMPILED:
        from bridge.device.fastpath.compiled import (
            AreaWords,
            Doorstep,
            KcovState,
            LineTap,
            Returns,
            Totals,
        )
    else:
        from bridge.device.fastpath.plain import AreaWords, KcovState, LineTap, Totals

        # What they do is in Device.syscall_return() and Doorbell._serve() too.
        Returns = Doorstep = None
