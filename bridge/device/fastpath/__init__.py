# SPDX-License-Identifier: Apache-2.0
"""The classes that answer a return, each in two forms: plain Python, and compiled.

:mod:`bridge.device.fastpath.plain` defines what they do. ``compiled.pyx`` does the same several
times faster, and is built with the package if there are a C compiler and Python's headers. The
tests run against both. ``KCOV_BRIDGE_PLAIN=1`` in the environment selects the plain ones.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from bridge.device.fastpath.plain import Collector

if TYPE_CHECKING:
    from bridge.device.fastpath.plain import (
        AreaWords,
        KcovState,
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
    "KcovState",
    "ReturnHandler",
    "ReturnPoller",
    "Totals",
]

PLAIN_VARIABLE = "KCOV_BRIDGE_PLAIN"
"""The environment variable that selects the plain classes, unless it is 0 or empty."""
WHY_PLAIN = ""
"""Why the plain classes are used; empty if the compiled ones are."""

if os.environ.get(PLAIN_VARIABLE, "0") not in ("", "0"):
    WHY_PLAIN = f"{PLAIN_VARIABLE} is set"
elif not TYPE_CHECKING:
    try:
        from bridge.device.fastpath.compiled import (
            AreaWords,
            KcovState,
            ReturnHandler,
            ReturnPoller,
            Totals,
        )
    except (ImportError, AttributeError) as error:
        # It was not built, or is older than its source and imports names that no longer exist.
        WHY_PLAIN = str(error)

COMPILED = not WHY_PLAIN
"""Whether the compiled classes are used."""

if not (COMPILED or TYPE_CHECKING):
    from bridge.device.fastpath.plain import (
        AreaWords,
        KcovState,
        ReturnHandler,
        ReturnPoller,
        Totals,
    )
