# SPDX-License-Identifier: Apache-2.0
"""What notes the lines that run: a trace function of the interpreter, in Python and compiled.

:mod:`.plain` says what the classes do; ``compiled.pyx`` does the same several times faster, and is
built with the package where there is a C compiler and Python's headers. ``KCOV_BRIDGE_PLAIN=1`` in
the environment keeps to the plain ones.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING or os.environ.get("KCOV_BRIDGE_PLAIN", "0") not in ("", "0"):
    from .plain import Apart, Feed, Group, View, chain, chained, current, install, uninstall

    COMPILED = False
else:
    try:
        from .compiled import Apart, Feed, Group, View, chain, chained, current, install, uninstall

        COMPILED = True
    except ImportError:
        from .plain import Apart, Feed, Group, View, chain, chained, current, install, uninstall

        COMPILED = False

__all__ = [
    "COMPILED",
    "Apart",
    "Feed",
    "Group",
    "View",
    "chain",
    "chained",
    "current",
    "install",
    "uninstall",
]
