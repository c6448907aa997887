# SPDX-License-Identifier: Apache-2.0
"""From synthetic PCs back to source: what ``kcov-bridge symbolize`` prints.

The output is that of gVisor's ``runsc symbolize``: for each PC a line with it in hex and a line
``file:line.col,line.col``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final, TextIO

from bridge.errors import SourceError, UsageError
from bridge.sources import PC
from bridge.sources.pcs import BlockTable, Location

__all__ = [
    "BLOCKS_FILE",
    "Symbolizer",
    "add_symbolize_arguments",
    "load_blocks",
    "symbolize_command",
]

BLOCKS_FILE: Final = "blocks.tsv"
"""The name of the block table in a run directory."""

# Always hex, with or without 0x; no sign and no underscore, which int() would take.
_HEX: Final = re.compile(r"(?:0[xX])?[0-9a-fA-F]+")


class Symbolizer:
    """Looks up PCs in a block table and prints them."""

    def __init__(self, table: BlockTable, *, prefix: str = "") -> None:
        """``prefix`` is put before each printed path as it is: give the slash with it."""
        self._table = table
        self._prefix = prefix

    def lookup(self, pc: PC) -> Location | None:
        """What a PC, or any other address of its slot, stands for."""
        return self._table.lookup(pc)

    def write(self, pc: PC, out: TextIO) -> bool:
        """Print one PC and its place; prints nothing and returns False for an unknown one."""
        location = self.lookup(pc)
        if location is None:
            return False
        self._write(pc, location, out)
        return True

    def write_all(self, out: TextIO) -> None:
        """Print all blocks of the table, by file name and then in the order of the text.

        The PCs of system call numbers are not among them: they are no blocks of any source.
        """
        for pc, location in self._table:
            self._write(pc, location, out)

    def symbolize(self, lines: Iterable[str], out: TextIO, err: TextIO) -> int:
        """Print the PCs that ``lines`` hold, one a line in hex; blank lines are passed over.

        A line that is no PC, or one of no block, is named on ``err``; the others are printed
        all the same. Returns the number of lines that were not printed.
        """
        failed = 0
        for line in lines:
            text = line.strip()
            if not text:
                continue
            if not _HEX.fullmatch(text):
                print(f"symbolize: {text[:80]!r} is no hexadecimal number", file=err)
                failed += 1
                continue
            pc = int(text, 16)
            if not self.write(pc, out):
                print(f"symbolize: {pc:#x} is no PC of this run's blocks", file=err)
                failed += 1
        return failed

    def _write(self, pc: PC, location: Location, out: TextIO) -> None:
        out.write(f"{pc:#x}\n{self._prefix}{location}\n")


def load_blocks(run: Path) -> BlockTable:
    """The block table of a run directory.

    Raises :class:`bridge.errors.UsageError` where there is none and
    :class:`bridge.errors.SourceError` where it is damaged.
    """
    path = run / BLOCKS_FILE
    if not path.is_file():
        raise UsageError(
            f"{run} holds no block table ({BLOCKS_FILE})",
            hint="name the directory of a finished run with --run",
        )
    return BlockTable.load(path)


def add_symbolize_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``kcov-bridge symbolize`` to a parser."""
    parser.add_argument(
        "--run",
        type=Path,
        default=Path("build/run"),
        metavar="DIR",
        help="the run directory whose PCs these are (default: %(default)s)",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="print all blocks that the run could have covered; stdin is not read",
    )
    parser.add_argument(
        "--prefix",
        default="",
        metavar="PATH/",
        help="put this before each path (syzkaller wants paths with pkg/ in them)",
    )


def symbolize_command(args: argparse.Namespace) -> int:
    """Run ``kcov-bridge symbolize``: PCs on stdin, their places on stdout.

    Returns the exit status: 0, or 1 where a PC could not be printed. Raises as
    :func:`load_blocks` does.
    """
    symbolizer = Symbolizer(load_blocks(args.run), prefix=args.prefix)
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
