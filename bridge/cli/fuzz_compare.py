# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge fuzz compare``: two groups of campaigns, with the statistics of evaluations."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bridge.errors import UsageError
from bridge.fuzz.compare import compare, read_side
from bridge.util.files import write_atomically

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Compare two groups of campaigns with the same target, harness and sources: coverage at the end, time
to a coverage, executions, findings; for each the medians, the Mann-Whitney U test and Vargha and
Delaney's A12. Trials may be of different length. One trial a side shows the figures without a test.
"""

EPILOG = """\
examples:
  kcov-bridge fuzz compare build/a build/b
  kcov-bridge fuzz compare build/new/* --against build/old/* --svg compare.svg
  kcov-bridge fuzz compare trials/feedback --against trials/blind --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the action."""
    parser.add_argument(
        "directories",
        nargs="+",
        type=Path,
        metavar="OUT",
        help="directory of a campaign, or of several; two without --against are one trial a side",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        type=Path,
        metavar="OUT",
        help="the trials of the other side",
    )
    parser.add_argument(
        "--names",
        nargs=2,
        metavar=("A", "B"),
        default=("", ""),
        help="names of the sides (default: those of their first directories)",
    )
    parser.add_argument(
        "--reach",
        type=int,
        metavar="BLOCKS",
        help="coverage for the time to a coverage (default: the smaller median at the end)",
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the curves into this file")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the comparison; return 0.

    Raises:
        UsageError: the campaigns cannot be compared.
        BridgeError: a file cannot be read or written.
    """
    ours, theirs = args.directories, args.against
    if theirs is None:
        if len(ours) != 2:
            raise UsageError(
                "there is nothing to compare with",
                hint="name two campaigns, or the trials of the other side with --against",
            )
        ours, theirs = ours[:1], ours[1:]
    comparison = compare(
        read_side(ours, args.names[0]), read_side(theirs, args.names[1]), reach=args.reach
    )
    if args.svg is not None:
        write_atomically(args.svg, comparison.svg())
    if args.json:
        text = json.dumps(comparison.as_dict(), indent=1, allow_nan=False)
    else:
        text = comparison.render()
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    return 0
