# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge trace``: the system calls of a finished run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator

from bridge.cli.arguments import add_run_directory
from bridge.cli.last_run import find_run
from bridge.errors import UsageError
from bridge.trace import Call, TraceReader, read_traces
from bridge.trace.perfetto import perfetto_text
from bridge.trace.table import rows, table
from bridge.trace.text import FUNCTIONS, render_trace
from bridge.trace.trace_file import call_line

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Print the system calls of a run that was traced, each with its result, its time, the guest kernel's
functions and the target's lines that it reached; or a table of how much each system call reached.
"""

EPILOG = """\
examples:
  kcov-bridge trace
  kcov-bridge trace --call openat --call read
  kcov-bridge trace --reached server.py
  kcov-bridge trace --reached nbd_queue_rq --functions all
  kcov-bridge trace --table
  kcov-bridge trace --format perfetto >trace.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_run_directory(parser)
    parser.add_argument(
        "--format",
        choices=("text", "json", "perfetto"),
        default="text",
        help="text: a line a call; json: the lines of trace.jsonl; perfetto: for ui.perfetto.dev "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--call",
        action="append",
        metavar="NAME",
        help="only calls of this name; may be repeated",
    )
    parser.add_argument(
        "--reached",
        metavar="TEXT",
        help="only calls that reached a file, or a function of the target or the kernel, with TEXT "
        "in its name",
    )

    parser.add_argument(
        "--table",
        action="store_true",
        help="a line for each system call, in place of each call: how many blocks of the target "
        "all of them reached, and which functions",
    )
    parser.add_argument(
        "--functions",
        type=_functions,
        default=argparse.SUPPRESS,
        metavar="NUMBER",
        help="how many functions of the kernel, and of each of its modules, a line names; with "
        f"--table, of the target; or all (default: {FUNCTIONS}); only for text",
    )


def _functions(text: str) -> int | None:
    """Read a number of functions; None for all."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor all")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Print the trace; return 0.

    Raises:
        UsageError: the run has no trace.
        InfrastructureError: its file is damaged.
    """
    functions: int | None = FUNCTIONS
    if "functions" in args:
        functions = args.functions
        if args.format != "text":
            raise UsageError(
                f"--functions is for text: --format {args.format} has all functions of each call",
                hint="leave out --functions, or --format",
            )
    directory = find_run(args.run)
    readers = list(read_traces(directory))
    if not readers:
        raise UsageError(
            f"{directory} has no trace", hint="record one: kcov-bridge run --trace -- CMD"
        )
    calls = _chosen(readers, args.call, args.reached)
    try:
        for piece in _pieces(args, calls, functions):
            sys.stdout.write(piece)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has what it wanted (`| head`). Python would complain again at exit, when it
        # flushes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _pieces(
    args: argparse.Namespace, calls: Iterator[Call], functions: int | None
) -> Iterator[str]:
    form: str = args.format
    if args.table:
        if form == "perfetto":
            raise UsageError(
                "a table is text or JSON", hint="leave out --table, or --format perfetto"
            )
        found = rows(calls)
        if form == "json":
            yield json.dumps([row.as_dict() for row in found], indent=1) + "\n"
        else:
            yield from (f"{line}\n" for line in table(found, functions))
    elif form == "perfetto":
        yield from perfetto_text(calls)
    elif form == "json":
        yield from (f"{call_line(call)}\n" for call in calls)
    else:
        yield from (f"{line}\n" for line in render_trace(calls, functions=functions))


def _chosen(
    readers: list[TraceReader], names: list[str] | None, reached: str | None
) -> Iterator[Call]:
    for reader in readers:
        for call in reader:
            if names is not None and call.name not in names:
                continue
            if reached is not None and not _reaches(call, reached):
                continue
            yield call


def _reaches(call: Call, text: str) -> bool:
    return any(text in f"{code.file}:{code.function}" for code in call.host) or any(
        text in name for name in call.kernel
    )
