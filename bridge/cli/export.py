# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge export``: coverage of the guest kernel for other programs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bridge.cli.arguments import add_run_directory, add_vmlinux
from bridge.cli.last_run import find_run
from bridge.results.kernel_export import FORMATS
from bridge.util.files import write_atomically

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Write the guest kernel coverage of a finished run in a format that other programs read.
The target's coverage needs no export: it is in .coverage, html/ and lcov.info of the run directory.
"""

EPILOG = """\
examples:
  kcov-bridge export --format rawcover >rawcover.txt
  kcov-bridge export --format drcov -o kernel.drcov
  kcov-bridge export --format lcov --vmlinux vmlinux -o kernel.info
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_run_directory(parser)
    parser.add_argument(
        "--format",
        choices=sorted(FORMATS),
        required=True,
        help="rawcover: PCs, for syzkaller's tools; drcov: blocks, for disassemblers; lcov: lines "
        "and functions, for genhtml (needs debug information)",
    )
    parser.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="FILE",
        help="file to write; - is stdout (default: %(default)s)",
    )
    add_vmlinux(parser)


def run(args: argparse.Namespace) -> int:
    """Write the coverage; return 0.

    Raises:
        UsageError: the run has nothing to export.
        SourceError: its files are damaged.
    """
    data = FORMATS[args.format](find_run(args.run), args.vmlinux)
    if args.output == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        write_atomically(Path(args.output), data)
    return 0
