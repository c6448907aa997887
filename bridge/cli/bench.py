# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge bench``: what the bridge costs, beside baselines."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bridge.bench.document import describe
from bridge.bench.plot import plot
from bridge.bench.suite import choose, measurements, take, title
from bridge.bench.table import render
from bridge.cli.arguments import add_settings, settings_of
from bridge.errors import InfrastructureError
from bridge.util.files import check_output, write_atomically

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Measure what the bridge costs on this machine. Each figure is shown beside its baseline; both are
measured in turn in the same run. A comparison of too few runs, or of runs that differ too much, is
refused, with the reason. docs/performance.md says what is measured and how.
"""

EPILOG = """\
examples:
  kcov-bridge bench --list
  kcov-bridge bench --quick
  kcov-bridge bench --only signal,idle -o signal.json
  kcov-bridge bench --only consume,vms --plot bench.svg

Let nothing else run on the machine meanwhile. The baseline of `ready` is virtme-ng, which takes
`pip install 'kcov-bridge[bench]'` and `kcov-bridge setup --bench`.
"""

DEFAULT_OUTPUT = Path("bench.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command and the settings that count for it."""
    parser.add_argument("--list", action="store_true", help="list the measurements and exit")
    parser.add_argument(
        "--only", metavar="NAME,...", help="run only these measurements (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="run fewer rounds and only the smaller cases"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="FILE",
        help="file for the JSON document; - is stdout, as with --json (default: %(default)s)",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.svg", help="also draw consume and vms into this file"
    )
    add_settings(parser, ("accel", "qemu", "image", "memory"))


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; return 0 if all was measured, whether or not the aims are met.

    Raises:
        UsageError: a measurement or a directory does not exist; before anything is measured.
        InfrastructureError: something could not be measured or written; the rest is printed first.
    """
    known = measurements()
    if args.list:
        width = max(map(len, known))
        for each in known.values():
            print(f"{each.name:<{width}}  {each.about}")
        return 0
    settings = settings_of(args)
    chosen = choose(known, args.only)
    output = None if str(args.output) == "-" else args.output
    as_json = args.json or output is None
    for path in (output, args.plot):
        if path is not None:
            check_output(path)
    head, results = take(chosen, settings, quick=args.quick)
    document = describe(head, results)
    text = json.dumps(document, indent=1) + "\n"
    print(text if as_json else f"{title(head)}\n\n{render(results)}", end="" if as_json else "\n")
    sys.stdout.flush()
    if output is not None:
        write_atomically(output, text)
    if args.plot is not None:
        write_atomically(args.plot, plot(document))
    failed = [result.name for result in results if result.failure]
    if failed:
        raise InfrastructureError(f"could not be measured: {', '.join(failed)}")
    return 0
