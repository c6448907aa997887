# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge setup``: install the Debian packages that are missing."""

from __future__ import annotations

import argparse
import sys

from bridge.errors import MissingDependencyError
from bridge.util.packages import install, kinds_for_running

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Install the Debian packages that kcov-bridge needs and this machine lacks: QEMU, mmdebstrap, gcc.
This needs root, or sudo without a password; otherwise the line to run is printed.
"""

EPILOG = """\
examples:
  kcov-bridge setup
  kcov-bridge setup --print
  kcov-bridge doctor                 check what else is missing

The exit status is 0 if nothing is missing at the end, and 1 if you still have to run the line.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--print", action="store_true", help="print the line that installs them, without running it"
    )
    parser.add_argument(
        "--bench", action="store_true", help="also install what the baseline of `bench` needs"
    )
    parser.add_argument(
        "--tests", action="store_true", help="also install what the tests of kcov-bridge need"
    )


def run(args: argparse.Namespace) -> int:
    """Install what is missing; return 0, or 1 if that is left to the user.

    Raises:
        MissingDependencyError: apt-get failed; its messages are on stderr.
    """
    more = {"bench": args.bench, "test": args.tests}
    kinds = (*kinds_for_running(), *(kind for kind, wanted in more.items() if wanted))
    status = install(kinds, only_print=args.print)
    if status == 0:
        print("all Debian packages that kcov-bridge needs are installed", file=sys.stderr)
    elif status == 2:
        return 1
    else:
        raise MissingDependencyError(
            f"apt-get failed with status {status}; its messages are above",
            hint="`kcov-bridge setup --print` prints the line to run by hand",
        )
    return 0
