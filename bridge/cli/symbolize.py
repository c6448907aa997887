# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge symbolize``: which source a PC stands for."""

from __future__ import annotations

import argparse
import os
import sys

from bridge.cli.arguments import add_run_directory, add_vmlinux
from bridge.cli.last_run import find_run
from bridge.errors import SourceError
from bridge.results.run_directory import load_blocks, load_kernel, load_native
from bridge.sources.pcs import BlockTable
from bridge.sources.symbolize import BLOCKS_FILE, Symbolizer

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Read PCs from stdin, one hex number a line, and print for each the PC and then its place: the source
file with `line.column,line.column` of the block for a PC of the target, as gVisor's `runsc
symbolize` does; `function+offset [module]` for a PC of the guest kernel.
"""

EPILOG = """\
examples:
  kcov-bridge symbolize <build/run/pcs.txt
  sort -u build/run/pcs.txt | kcov-bridge symbolize
  echo 0xfffffffff0010008 | kcov-bridge symbolize --run build/run
  kcov-bridge symbolize --all

The exit status is 1 if a PC is unknown.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_run_directory(parser)
    parser.add_argument(
        "--all",
        action="store_true",
        help="print every block of the target's source files, covered or not; stdin is not read",
    )
    parser.add_argument(
        "--prefix",
        default="",
        metavar="PATH/",
        help="put this before each path (syzkaller expects paths with pkg/ in them)",
    )
    add_vmlinux(parser)


def run(args: argparse.Namespace) -> int:
    """Print the places of the PCs on stdin; return 1 if one was unknown, else 0.

    Raises:
        UsageError: the run directory has nothing to look PCs up in.
        SourceError: its files are damaged, or stdin is no text.
    """
    directory = find_run(args.run, stdin=not args.all)
    kernel = load_kernel(directory, args.vmlinux)
    native = load_native(directory)
    # A run of the kernel alone has no block table, nor has one of native programs.
    alone = native is not None or (kernel is not None and not args.all)
    alone = alone and not (directory / BLOCKS_FILE).is_file()
    table = BlockTable() if alone else load_blocks(directory)
    symbolizer = Symbolizer(table, prefix=args.prefix, kernel=kernel, native=native)
    try:
        if args.all:
            symbolizer.write_all(sys.stdout)
            failed = 0
        else:
            failed = symbolizer.symbolize(sys.stdin, sys.stdout, sys.stderr)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has what it wanted (`| head`). Python would complain again at exit, when it
        # flushes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UnicodeDecodeError as error:
        raise SourceError("stdin is no text", evidence=str(error)) from error
    return 1 if failed else 0
