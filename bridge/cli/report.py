# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge report``: one page of a finished run for people, or its coverage for programs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bridge.cli.arguments import add_vmlinux
from bridge.cli.last_run import find_run
from bridge.errors import UsageError
from bridge.results import REPORT_FILE
from bridge.results.report import EXPORTS, gather, render_page
from bridge.util.files import write_atomically

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

_HTML = "html"

DESCRIPTION = """\
Make one self-contained HTML page of a run or of a pytest run: the tests and the lines that each of
them reached, coverage over time, hot code, kernel functions, and the trace. It opens from a file,
without a network. Other formats have the host's lines, and those of the guest kernel where known.
"""

EPILOG = """\
examples:
  kcov-bridge report
  kcov-bridge report build/guest-report -o report.html
  kcov-bridge report build/run build/guest-report --format lcov -o all.info
  kcov-bridge report --format json | jq .totals
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "directories",
        nargs="*",
        type=Path,
        metavar="DIR",
        help="directory of a run (--out) or of a pytest run (--guest-report); several are joined "
        "(default: the last run, else build/run)",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=f"file to write; - is stdout (default: {REPORT_FILE} in the first DIR for html, else "
        "stdout)",
    )
    parser.add_argument(
        "--format",
        choices=[_HTML, *EXPORTS],
        default=_HTML,
        help="html: the page; lcov, cobertura, json: coverage for programs (default: %(default)s)",
    )
    add_vmlinux(parser)


def run(args: argparse.Namespace) -> int:
    """Write the report and print its path; return 0.

    Raises:
        UsageError: there is nothing to report.
        BridgeError: a file of the run is damaged, or the report cannot be written.
    """
    directories = args.directories or [find_run(None, flag="DIR")]
    output = args.output
    if output is None:
        output = str(directories[0] / REPORT_FILE) if args.format == _HTML else "-"
    base = None if output == "-" else Path(output).absolute().parent
    with gather(directories) as (report, host):
        if args.format == _HTML:
            text = render_page(report, base)
        elif not (text := EXPORTS[args.format](report, host, args.vmlinux)):
            raise UsageError(
                f"no line was measured in {', '.join(map(str, directories))}",
                hint="run with a target, or with the guest kernel as a source and its debug "
                "information installed",
            )
    if output == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_atomically(Path(output), text)
        print(output)
    return 0
