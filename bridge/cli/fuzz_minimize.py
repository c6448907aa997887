# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge fuzz minimize``: a finding's smallest case, and a program that reproduces it."""

from __future__ import annotations

import argparse
import sys

from bridge.cli.arguments import duration
from bridge.cli.fuzz_repro import add_finding, check_finding
from bridge.fuzz.minimize import minimize_finding
from bridge.fuzz.repro import open_finding

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Make the case of a finding as small as it gets, as long as it leads to the same title, and write a
program or a script that reproduces it without kcov-bridge.
"""

EPILOG = """\
examples:
  kcov-bridge fuzz minimize build/fuzz/findings/assertionerror-in-walk-0123456789ab
  kcov-bridge fuzz minimize --time 1m build/fuzz/findings/assertionerror-in-walk-0123456789ab

The folder then holds `minimized`, its readable form `minimized.txt`, and `reproducer.c` or a
script.
Ctrl-C, or the end of --time, keeps the smallest case so far.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_finding(parser, times=5)
    parser.add_argument(
        "--time",
        type=duration,
        default=600.0,
        metavar="T",
        help="when to stop (default: 10m)",
    )


def run(args: argparse.Namespace) -> int:
    """Minimize; return 0.

    Raises:
        UsageError: there is no such finding, or its case does not lead there.
        BridgeError: guests do not start.
        InfrastructureError: the folder cannot be written.
    """
    check_finding(args)

    def progress(size: int, runs: int) -> None:
        print(f"{size} bytes after {runs} runs", file=sys.stderr, flush=True)

    with open_finding(args.folder) as (finding, case, slot):
        result = minimize_finding(
            args.folder,
            finding,
            case,
            slot,
            times=args.times,
            timeout=args.timeout,
            seconds=args.time,
            progress=progress,
        )
    end = "" if result.complete else ", when the time was over"
    print(
        f"{len(case)} bytes became {len(result.case)} after {result.runs} runs{end}: "
        f"{', '.join(str(args.folder / name) for name in result.files)}"
    )
    if result.use:
        print(result.use)
    return 0
