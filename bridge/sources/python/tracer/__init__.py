# SPDX-License-Identifier: Apache-2.0
"""The trace function that notes the lines that run, in Python and compiled.

:mod:`.plain` defines the classes. ``compiled.pyx`` does the same several times faster, and is built
with the package if there are a C compiler and Python's headers. ``KCOV_BRIDGE_PLAIN=1`` in the
environment selects the plain classes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .plain import note_fault

if TYPE_CHECKING:
    from .plain import (
        Apart,
        Feed,
        Group,
        View,
        chain,
        chained,
        current,
        forked,
        install,
        thread_ended,
        uninstall,
    )

__all__ = [
    "COMPILED",
    "WHY_PLAIN",
    "Apart",
    "Feed",
    "Group",
    "View",
    "chain",
    "chained",
    "current",
    "forked",
    "install",
    "note_fault",
    "thread_ended",
    "uninstall",
]

WHY_PLAIN = ""
"""Why the plain classes are used; empty if the compiled ones are."""

if os.environ.get("KCOV_BRIDGE_PLAIN", "0") not in ("", "0"):
    WHY_PLAIN = "KCOV_BRIDGE_PLAIN is set"
elif not TYPE_CHECKING:
    try:
        from .compiled import (
            Apart,
            Feed,
            Group,
            View,
            chain,
            chained,
            current,
            forked,
            install,
            thread_ended,
            uninstall,
        )
    except (ImportError, AttributeError) as error:
        # It was not built, or is older than its source and imports names that no longer exist.
        WHY_PLAIN = str(error)

COMPILED = not WHY_PLAIN
"""Whether the compiled classes are used."""

if not (COMPILED or TYPE_CHECKING):
    from .plain import (
        Apart,
        Feed,
        Group,
        View,
        chain,
        chained,
        current,
        forked,
        install,
        thread_ended,
        uninstall,
    )
