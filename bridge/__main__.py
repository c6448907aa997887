# SPDX-License-Identifier: Apache-2.0
"""The process ``kcov-bridge``, also as ``python -m bridge``.

Imports little before Ctrl-C has its handler: the rest takes some tenths of a second to import.
"""

from __future__ import annotations

import os
import signal

__all__ = ["main"]


def _interrupted(*_: object) -> None:
    """End at once: nothing is open before :mod:`bridge.cli.main` installs its own handlers."""
    os.write(2, b"kcov-bridge: interrupted\n")
    os._exit(128 + signal.SIGINT)


def main() -> None:
    """Run the command; the console script."""
    # Where SIGINT is ignored (`nohup`, a job in the background) it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    from bridge.cli.main import entry

    entry()


if __name__ == "__main__":
    main()
