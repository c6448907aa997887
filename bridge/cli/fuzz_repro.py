# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge fuzz repro``: whether the case of a finding leads there again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bridge.cli.arguments import duration
from bridge.errors import UsageError
from bridge.fuzz.repro import CaseRunner, open_finding, packages_of

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "add_finding", "run"]

DESCRIPTION = """\
Run the case of a finding again and again, each time in a guest and with a target that are as new,
with the settings of the campaign, and say how often it led to the same title.
"""

EPILOG = """\
examples:
  kcov-bridge fuzz repro build/fuzz/findings/assertionerror-in-walk-0123456789ab
  kcov-bridge fuzz repro -n 50 --timeout 2 build/fuzz/findings/assertionerror-in-walk-0123456789ab

The exit status is 0 if it led to the same title at least once, else 1.
"""


def add_finding(parser: argparse.ArgumentParser, times: int) -> None:
    """Add the arguments of commands that run the case of a finding."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the finding's folder")
    parser.add_argument(
        "-n",
        type=int,
        default=times,
        dest="times",
        metavar="N",
        help="how often to run the case (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=duration,
        default=5.0,
        metavar="T",
        help="how long the case may take each time (default: 5s)",
    )


def check_finding(args: argparse.Namespace) -> None:
    """Check what :func:`add_finding` added.

    Raises:
        UsageError: a number makes no sense.
    """
    if args.times < 1:
        raise UsageError(f"-n {args.times}: the case must run at least once")
    if args.timeout >= 86400:
        raise UsageError(f"--timeout {args.timeout:g}: it must be below a day")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_finding(parser, times=10)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> int:
    """Run the case; return 0 if it led to the same title, else 1.

    Raises:
        UsageError: there is no such finding.
        BridgeError: guests do not start.
    """
    check_finding(args)
    titles: list[str] = []
    same = 0
    with open_finding(args.folder) as (finding, case, slot):
        runner = CaseRunner.of(slot, finding, timeout=args.timeout, packages=packages_of(slot))
        for number, attempt in enumerate(runner.attempts(case, args.times), start=1):
            same += attempt.has(finding.title)
            titles.append(attempt.title)
            if not args.json:
                what = attempt.title or "nothing was wrong"
                shown = "the same title" if attempt.has(finding.title) else what
                print(f"{number} of {args.times}: {shown} ({attempt.seconds:.2f} s)", flush=True)
    if args.json:
        result = {"title": finding.title, "same": same, "times": args.times, "titles": titles}
        print(json.dumps(result))
    else:
        print(f"{same} of {args.times} runs led to: {finding.title}")
    return 0 if same else 1
