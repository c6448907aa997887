# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge fuzz report``: one page of a campaign for people, or its figures for programs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bridge.cli.arguments import add_vmlinux
from bridge.fuzz.records import read_record
from bridge.fuzz.report import CURVES_FILE, CampaignReport, read_pcs
from bridge.results import REPORT_FILE
from bridge.util.files import write_atomically

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = f"""\
Make one self-contained HTML page of a campaign, which may still run: coverage over time and over
executions, findings, the blocks that no seed reached, and the frontier: covered blocks beside
blocks that were never reached. The drawing of the coverage is beside it, in {CURVES_FILE}.
"""

EPILOG = """\
examples:
  kcov-bridge fuzz report build/fuzz
  kcov-bridge fuzz report build/fuzz --against build/run
  kcov-bridge fuzz report build/fuzz --json | jq .totals
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the action."""
    parser.add_argument("directory", type=Path, metavar="OUT", help="directory of the campaign")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=f"page to write; - is stdout, without the drawing (default: OUT/{REPORT_FILE})",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="PATH",
        help="say which blocks only one of both reached: the directory of another campaign or of a "
        "run, or a file of PCs",
    )
    parser.add_argument("--json", action="store_true", help="print the figures instead of a page")
    add_vmlinux(parser)


def run(args: argparse.Namespace) -> int:
    """Write the report and print its path; return 0.

    Raises:
        UsageError: the directory is not that of a campaign.
        BridgeError: a file of the campaign is damaged, or the report cannot be written.
    """
    against = None
    if args.against is not None:
        name = args.against.resolve().name
        against = (name, read_pcs(args.against))
    report = CampaignReport(read_record(args.directory), against=against, vmlinux=args.vmlinux)
    output = args.output
    if args.json:
        text = json.dumps(report.data(), indent=1) + "\n"
        if output in (None, "-"):
            sys.stdout.write(text)
        else:
            write_atomically(Path(output), text)
    elif output == "-":
        sys.stdout.write(report.page())
    else:
        print(report.write(Path(output) if output else args.directory / REPORT_FILE))
    sys.stdout.flush()
    return 0
