# SPDX-License-Identifier: Apache-2.0
"""kcov-bridge: the kcov device of a coverage-built kernel for guests whose kernel was not.

As a library::

    import bridge

    with bridge.boot() as guest:
        result = guest.kcov(["cat", "/mnt/target/README"])
        for pc in result.pcs:
            print(hex(pc), guest.symbolize(pc))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.session.session import Session

__all__ = ["boot"]


def boot(out: Path | None = None, **settings: Any) -> Session:
    """A booted guest with its target and its kcov device, to be used in a ``with`` statement.

    ``settings`` are those of :class:`bridge.config.Settings`, over what the environment and the
    settings file say; ``out`` is where ``console.log``, ``.coverage`` and ``blocks.tsv`` are left
    (None: nowhere). Raises :class:`bridge.errors.BridgeError`, most of it on entering.
    """
    from bridge import config
    from bridge.session.session import Session

    return Session(config.load(settings), out)
