# SPDX-License-Identifier: Apache-2.0
"""The classes on the way of a signal, each twice: in Python, and compiled.

:mod:`bridge.device.fastpath.plain` says what they do; ``compiled.pyx`` does the same, several times
faster, and is built with the package if there is a C compiler and Python's headers. The tests
run against both. ``KCOV_BRIDGE_PLAIN=1`` in the environment selects the plain ones.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

from bridge.device.fastpath.plain import Collector, FindLines, LineSets

if TYPE_CHECKING:
    from bridge.device.fastpath.plain import (
        AreaWords,
        KcovState,
        LineDrain,
        ReturnHandler,
        ReturnPoller,
        Totals,
    )

__all__ = [
    "COMPILED",
    "PLAIN_VARIABLE",
    "WHY_PLAIN",
    "AreaWords",
    "Collector",
    "FindLines",
    "KcovState",
    "LineDrain",
    "LineSets",
    "ReturnHandler",
    "ReturnPoller",
    "Totals",
]

PLAIN_VARIABLE = "KCOV_BRIDGE_PLAIN"
"""The environment variable that selects the plain classes, unless it is 0 or empty."""
WHY_PLAIN: str
"""Why the plain classes are used; empty if the compiled ones are."""

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
    _classes = import_module("bridge.device.fastpath." + ("compiled" if COMPILED else "plain"))
    AreaWords = _classes.AreaWords
    KcovState = _classes.KcovState
    LineDrain = _classes.LineDrain
    ReturnHandler = _classes.ReturnHandler
    ReturnPoller = _classes.ReturnPoller
    Totals = _classes.Totals
