# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge fuzz text``: a case of the harness ``files`` as text, and back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bridge.cli.streams import writing
from bridge.errors import BridgeError, UsageError
from bridge.fuzz.files_text import to_bytes, to_text
from bridge.util.files import write_atomically

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Print a case of the harness `files` as text, a file-system call a line; or, with --bytes, make a
case of such a text. Each file of any bytes is a case.
"""

EPILOG = """\
examples:
  kcov-bridge fuzz text out/corpus/3f2c...
  kcov-bridge fuzz text --bytes case.txt -o corpus/case
  echo 'open f0 a rw|creat 0644' | kcov-bridge fuzz text --bytes - -o corpus/one

guest/agent/files-calls.h has the calls and their arguments.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("file", metavar="FILE", help="the case, or the text; - for stdin")
    parser.add_argument(
        "--bytes", action="store_true", help="FILE is text: write the bytes of the case"
    )
    parser.add_argument(
        "-o", "--output", default="-", metavar="FILE", help="where to write (default: stdout)"
    )


def run(args: argparse.Namespace) -> int:
    """Convert; return 0.

    Raises:
        UsageError: FILE cannot be read, or is not the text of a case.
        InfrastructureError: the output cannot be written.
    """
    data = _read(args.file)
    if args.bytes:
        try:
            result = to_bytes(data.decode())
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{args.file} is not text", hint="leave out --bytes to print a case as text"
            ) from error
        except BridgeError as error:
            raise UsageError(f"{args.file}: {error.message}", hint=error.hint) from error
    else:
        result = to_text(data).encode()
    _write(args.output, result)
    return 0


def _read(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from error


def _write(name: str, data: bytes) -> None:
    with writing("stdout" if name == "-" else name):
        if name != "-":
            write_atomically(Path(name), data)
        else:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
