# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge export``: a finished run for other programs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bridge.cli.arguments import add_run_directory, add_vmlinux
from bridge.cli.last_run import find_run
from bridge.cli.streams import writing
from bridge.errors import UsageError
from bridge.results.elf_export import write_elf
from bridge.results.kernel_export import FORMATS
from bridge.results.native_export import native_lcov
from bridge.util.files import write_atomically

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Write the guest kernel coverage of a finished run in a format that other programs read, or an ELF
object from which addr2line, gdb and syzkaller tell the target's source lines (--format elf). The
target's coverage needs no export: it is in .coverage, html/ and lcov.info of the run directory.
"""

EPILOG = """\
examples:
  kcov-bridge export --format rawcover >rawcover.txt
  kcov-bridge export --format drcov -o kernel.drcov
  kcov-bridge export --format lcov --vmlinux vmlinux -o kernel.info
  kcov-bridge export --format native-lcov -o native.info && genhtml -o html native.info
  kcov-bridge export --format elf -o vmlinux && addr2line -fe vmlinux <build/run/pcs.txt
"""

_ELF = "elf"
_NATIVE = "native-lcov"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_run_directory(parser)
    parser.add_argument(
        "--format",
        choices=sorted([*FORMATS, _ELF, _NATIVE]),
        required=True,
        help="rawcover: PCs, for syzkaller's tools; drcov: blocks, for disassemblers; lcov: lines "
        "and functions, for genhtml (needs debug information); elf: the target's blocks and the "
        "kernel's names, for programs that read DWARF (needs binutils, and -o FILE); native-lcov: "
        "lines and functions of the target's native programs, for genhtml",
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
        UsageError: the run has nothing to export, or the object has no file to go to.
        SourceError: its files are damaged.
        InfrastructureError: binutils is missing or fails, or a file cannot be written.
    """
    if args.format == _ELF:
        if args.output == "-":
            raise UsageError(
                "an ELF object has up to 500 MiB, nearly all of it a hole, so it needs a file",
                hint="name a file with -o; syzkaller wants the name vmlinux",
            )
        write_elf(find_run(args.run), Path(args.output))
        return 0
    if args.format == _NATIVE:
        data = native_lcov(find_run(args.run))
    else:
        data = FORMATS[args.format](find_run(args.run), args.vmlinux)
    if args.output == "-":
        with writing("stdout"):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    else:
        write_atomically(Path(args.output), data)
    return 0
